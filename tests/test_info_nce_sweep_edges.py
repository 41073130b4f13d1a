"""The sweep written for Hopper, where a single query decides how all of its block are computed."""

import math

import pytest
import torch
from test_info_nce_sweep import sweep
from torch.nn import functional as F


@pytest.mark.parametrize("what", ["far", "long"])
@pytest.mark.parametrize("row", [1, 9])  # a thread looks after two, 8 apart
def test_one_query_alone_takes_the_running_maximum(what, row):
    """As its exponentials under the fixed shift are too small, or infinite."""
    direction = F.normalize(torch.randn(128), dim=0)
    q = direction + 0.02 * torch.randn(20, 128)
    queue = F.normalize(direction + 0.02 * torch.randn(200, 128), dim=1)
    fixed = 1 / (math.log(2) * 0.07) - 15
    *_, shifts, _, _ = sweep(q, q.clone(), queue.half(), 0.07, 1, 2, least=2.0**-10)
    assert (shifts == fixed).all()
    if what == "far":
        q[row] *= -1
    else:
        q[row] = torch.randn(128)
        queue[5] = 1.3 * F.normalize(q[row], dim=0)
    least = 2.0**-10 if what == "far" else 0.0
    *_, shifts, _, _ = sweep(q, q.clone(), queue.half(), 0.07, 1, 2, least=least)
    assert (shifts != fixed).any()
