"""Which interface gloo is sent to where the name of a machine leads to itself."""

import os
import socket

import pytest

from moco_fast.distributed import interface
from moco_fast.distributed.interface import ANYWHERE, VARIABLE, reachable_interface

ADDRESSES = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": "10.1.0.5"}


@pytest.fixture
def network(monkeypatch):
    """A machine that reaches some hosts by some addresses of its own; its name leads to 127.0.1.1."""
    routes = {"node0": "10.1.0.5", "node1": "127.0.1.1", ANYWHERE: "10.0.0.5"}
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setattr(interface, "_address_of", lambda host: "127.0.1.1")
    monkeypatch.setattr(interface, "_address_towards", routes.get)
    monkeypatch.setattr(interface, "_address_at", ADDRESSES.get)
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(ADDRESSES)))
    return monkeypatch


def chosen():
    with reachable_interface():
        name = os.environ.get(VARIABLE)
    return name


def test_the_way_to_rank_0(network):
    assert chosen() == "ib0"
    assert VARIABLE not in os.environ  # for groups in the block alone


@pytest.mark.parametrize("master", ["node1", "unknown", None])
def test_on_the_machine_of_rank_0_the_way_to_anywhere(network, master):
    """Rank 0's name leads to loopback there; and scripts that meet at a URL set no variable."""
    network.setenv("MASTER_ADDR", master) if master else network.delenv("MASTER_ADDR")
    assert chosen() == "eth0"


def test_scripts_that_no_launcher_started(network):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        network.delenv(name)
    assert chosen() == "eth0"


def test_gloos_own_choice_stays(network):
    with network.context() as patch:
        patch.setattr(interface, "_address_of", lambda host: "10.0.0.5")
        assert chosen() is None
    with network.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "4")  # no other machine
        assert chosen() is None
    with network.context() as patch:
        patch.setattr(interface, "_address_towards", lambda host: None)  # no network
        assert chosen() is None


def test_what_the_user_says_stays(network):
    network.setenv(VARIABLE, "eth7")
    assert chosen() == "eth7" == os.environ[VARIABLE]


def test_addresses_of_this_machine():
    assert interface._address_of("no.such.host.invalid") is None
    assert interface._address_towards("127.0.0.1") == "127.0.0.1"
    assert interface._address_at("lo") == "127.0.0.1"
    assert interface._address_at("no-such-one") is None
