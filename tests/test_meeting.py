"""Processes of one attempt find each other among what earlier attempts left in the store."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from moco_fast.train import meeting
from moco_fast.train.meeting import meet


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True)


def attempt(store, ranks, size=3, again=False):
    """What ``meet`` returns or raises on these ranks, by rank, called in this order."""
    found = {}

    def run(rank):
        try:
            found[rank] = meet(store, rank, size, again and rank == 0)
        except TimeoutError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_every_attempt_has_a_name_of_its_own(store, order):
    names = set()
    for i in range(3):
        found = attempt(store, order)
        assert len(found) == 3 and len(set(found.values())) == 1
        assert found[0].again == (i > 0)
        names.add(found[0].name)
    assert len(names) == 3


def test_what_a_dead_attempt_has_left_is_no_one(store, monkeypatch):
    """Ranks 0 and 1 come again, rank 2 does not: what it said in the attempt before does not count."""
    attempt(store, (0, 1, 2))
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=5))
    found = attempt(store, (0, 1))
    assert "rank 2 did not come within 0:00:05; this was rank 0" in str(found[0])


def test_rank_0_is_missed(store, monkeypatch):
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=5))
    assert "rank 0 did not come within 0:00:05; this was rank 1" in str(attempt(store, (1,))[1])


def test_what_rank_0_knows_of_restarts_all_know(store):
    assert all(found.again for found in attempt(store, (0, 1, 2), again=True).values())
