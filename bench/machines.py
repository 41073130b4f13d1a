"""Machines that are network namespaces of this one, each with an address and a cable to one switch.

They need Linux, root and iproute2's ``ip`` and ``tc``. A cable can be cut, as no process of a machine notices
that closes no connection, and it can be given the speed of a real one, which loopback has not.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

NETWORK = "10.77.0."
INTERFACE = "eth0"
_CLONE_NEWNET = 0x40000000  # linux/sched.h


@cache
def unavailable() -> str | None:
    """Why there can be none here, or None."""
    if missing := [command for command in ("ip", "tc") if not shutil.which(command)]:
        return f"iproute2's {missing[0]} is not installed"
    try:
        with machines(1, gbit=1):
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {error.stderr.strip()}"


class Machine:
    """One of them."""

    def __init__(self, prefix: str, number: int) -> None:
        self.name, self.address = f"{prefix}-{number}", f"{NETWORK}{number + 1}"

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        """A program on it, in a group of processes of its own."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE} | environment,
        )

    def cut_off(self) -> None:
        """Nothing leaves or reaches it any more."""
        _ip("-n", self.name, "link", "set", INTERFACE, "down")


def move_to(name: str) -> None:
    """Let this process, which must not have started threads that use the network, be on the machine."""
    with open(f"/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {name} failed")
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


@contextmanager
def machines(
    count: int,
    gbit: float | None = None,  # Gb/s of every cable in each direction; None: what the CPU can copy
) -> Iterator[list[Machine]]:
    """So many, on one switch that is never the bottleneck."""
    prefix = f"moco{uuid.uuid4().hex[:6]}"
    made, switch = [Machine(prefix, i) for i in range(count)], f"{prefix}-switch"
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for i, machine in enumerate(made):
            ends = ((machine.name, INTERFACE), (switch, f"port{i}"))
            _ip("netns", "add", machine.name)
            _ip("-n", machine.name, "link", "set", "lo", "up")
            _ip("link", "add", INTERFACE, "netns", machine.name, "type", "veth",
                "peer", "name", f"port{i}", "netns", switch)  # fmt: skip
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", INTERFACE)
            for namespace, end in ends:
                if gbit:
                    shape = ("tbf", "rate", f"{gbit * 1e3:.0f}mbit", "burst", "256kb", "latency", "50ms")
                    _run("tc", "-n", namespace, "qdisc", "add", "dev", end, "root", *shape)
                _ip("-n", namespace, "link", "set", end, "up")
            _ip("-n", switch, "link", "set", f"port{i}", "master", "switch")
        yield made
    finally:
        for name in (switch, *(machine.name for machine in made)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)
