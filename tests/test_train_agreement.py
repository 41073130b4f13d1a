"""What a run makes sure of on its processes: one queue, and random numbers of their own."""

from dataclasses import replace

import pytest
import ranks
import torch
from training import TINY, run

import moco_fast
from moco_fast.train.display import Display


@pytest.fixture
def verified(monkeypatch):
    """The steps after which the queue was verified."""
    taken, steps, advance = [], [], Display.advance
    monkeypatch.setattr(Display, "advance", lambda self, step: taken.append(step) or advance(self, step))
    monkeypatch.setattr(moco_fast.MoCo, "verify_queue", lambda self: steps.append(taken[-1]))
    return steps


def test_the_queue_is_verified_every_so_many_steps_and_when_resumed(verified, tmp_path):
    config = replace(TINY, verify_every=4)
    run(tmp_path, config)
    assert verified == [4, 8]
    run(tmp_path, replace(config, epochs=3), resume=True)
    assert verified == [4, 8, 10, 12]


def rank_training(rank, folder):
    """The seed of a step's dropout, and that of the shuffle."""
    seeds = []

    def verify_queue(self):
        seeds.append((torch.initial_seed(), self.shuffle.generator.initial_seed()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco_fast.MoCo, "verify_queue", verify_queue)
        run(folder / "run", replace(TINY, epochs=1, verify_every=5))
    return seeds


def test_processes_draw_numbers_of_their_own(tmp_path):
    """But for those that have to be the same."""
    ((first, common),), ((second, also_common),) = ranks.run(2, rank_training, tmp_path, folder=tmp_path)
    assert first != second and common == also_common
