"""What runs tests on several processes."""

import operator

import pytest
import ranks
import torch
import torch.distributed as dist


def test_results_come_in_the_order_of_ranks(tmp_path):
    assert ranks.run(2, operator.neg, folder=tmp_path) == [0, -1]


def test_a_group_is_left_at_once(tmp_path):
    """By one rank, while others may still be at joining it: gloo would find their connections closed."""
    assert ranks.run(4, leave, folder=tmp_path) == [None] * 4


def leave(rank):
    dist.destroy_process_group()


def test_an_error_is_told_though_others_wait_for_the_rank(tmp_path):
    with pytest.raises(ranks.RankFailed, match=r"rank 1: (?s:.*)ValueError: this one"):
        ranks.run(2, fail_alone, folder=tmp_path)


def fail_alone(rank):
    if rank == 1:
        raise ValueError("this one")
    dist.all_reduce(torch.ones(1))
