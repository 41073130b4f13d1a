"""What runs tests on several processes: groups that gloo could not make are made again, and then given up."""

import operator

import pytest
import ranks


def test_a_rank_that_ends_before_there_is_a_group(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "_rank", operator.not_)  # fails at once: too many arguments
    with pytest.raises(ranks.NoGroup, match="a rank of 2 ended before there was a group"):
        ranks.run(2, operator.neg, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == ranks.ATTEMPTS


def test_results_come_in_the_order_of_ranks(tmp_path):
    assert ranks.run(2, operator.neg, folder=tmp_path) == [0, -1]
