"""Processes that fall silent without closing a connection: stopped, or on a machine that was cut off."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from moco_fast.train import heartbeat
from moco_fast.train.heartbeat import INTERVAL, MISSED, STORE_GONE, Heartbeat

TICK = 0.05


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL", TICK)


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True)


class Process:
    """A rank of this process, and what it was told."""

    def __init__(self, store, rank, size):
        self.told, self.ended = [], threading.Event()
        self.heartbeat = Heartbeat(store, rank, size, self.end)
        self.heartbeat.start()

    def end(self, who):
        self.told.append(who)
        self.ended.set()


def test_the_silent_are_named_within_a_minute(store):
    processes = [Process(store, rank, 4) for rank in range(4)]
    time.sleep(2 * MISSED * TICK)
    assert not any(process.told for process in processes)
    for silent in processes[1:3]:
        silent.heartbeat._stopped.set()  # both at once; stop() waits for the thread
    for silent in processes[1:3]:
        silent.heartbeat.stop()
    for heard in (processes[0], processes[3]):
        assert heard.ended.wait(60)
        assert heard.told == ["ranks 1, 2 died or stopped answering"]
    assert heartbeat.silent(store) == "ranks 1, 2 died or stopped answering"
    assert not processes[1].told
    # The beat that is missed, then one in which the others read of it, and one until the end.
    assert (MISSED + 3) * INTERVAL < 60


def test_rank_0_is_watched_by_the_others(store):
    processes = [Process(store, rank, 3) for rank in range(3)]
    processes[0].heartbeat.stop()
    for process in processes[1:]:
        assert process.ended.wait(60)
        assert process.told == ["rank 0 died or stopped answering"]


class SilentStore:
    """The client of a store whose machine is gone: no call returns."""

    def __init__(self):
        self.gone = threading.Event()

    def clone(self):
        return self

    def set(self, key, value):
        pass

    def multi_get(self, keys):
        self.gone.wait(20)
        raise RuntimeError("gone")


def test_a_store_that_never_answers():
    store = SilentStore()
    process = Process(store, 1, 2)
    assert process.ended.wait(60) and process.told == [STORE_GONE]
    store.gone.set()
    time.sleep(5 * TICK)
    assert process.told == [STORE_GONE]  # not twice


def test_a_store_that_has_closed():
    store = SilentStore()
    store.gone.set()
    process = Process(store, 1, 2)
    assert process.ended.wait(60) and process.told == [STORE_GONE]


def test_the_end_of_a_run_is_none_of_it(store):
    processes = [Process(store, rank, 2) for rank in range(2)]
    for process in processes:
        process.heartbeat.stop()
    time.sleep(2 * MISSED * TICK)
    assert not any(process.told for process in processes)


# Rank 1 of a group stops, as by Ctrl-Z, while rank 0 waits for it in a collective.
STOPPED = """
import os, signal
from moco_fast import distributed
from moco_fast.train import heartbeat, processes
heartbeat.INTERVAL = 0.5
with processes.joined("cpu"):
    distributed.largest(1)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    distributed.largest(2)
"""


def test_a_stopped_process_is_named_by_the_one_that_waits(store):
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STOPPED],
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        _, said = ranks[0].communicate(timeout=240)
    finally:
        ranks[1].send_signal(signal.SIGKILL)
        ranks[1].communicate()
    assert "moco-fast: rank 1 died or stopped answering; this was rank 0 of 2" in said, said
    assert ranks[0].returncode == 1
