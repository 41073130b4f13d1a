"""The end-to-end mechanism equals its formula, with gradient to queries and keys."""

import copy

import methods
import pytest
import torch

from bench.eager_mechanisms import EagerEndToEnd
from moco_fast.models.end_to_end import EndToEnd


def build(cls=EndToEnd, mlp=False):
    torch.manual_seed(3)
    return cls(methods.Net, 16, 0.2, mlp)


@pytest.mark.parametrize("mlp", [False, True])
def test_loss_and_gradients(mlp):
    methods.assert_loss_and_gradients(build(mlp=mlp), build(EagerEndToEnd, mlp), next(methods.views()))


def test_twenty_steps():
    methods.assert_trajectory(build(), build(EagerEndToEnd), methods.views(20))


def test_eval_changes_nothing():
    methods.assert_eval_changes_nothing(build(), next(methods.views(batch=5)))


def test_checkpoint():
    methods.assert_goes_on_from_a_checkpoint(build, methods.views(4))


def test_autocast():
    methods.assert_autocast_and_layout(build(), next(methods.views()))


def test_stats():
    x1, x2 = next(methods.views())
    model = build()
    twin = copy.deepcopy(model)
    q, k = twin.encoder(x1).detach(), twin.encoder(x2).detach()
    _, stats = model(x1, x2, return_stats=True)
    methods.assert_pair_stats(stats, q, k, torch.arange(12))


def test_one_image_has_no_negatives():
    loss, stats = build().eval()(*next(methods.views(batch=1)), return_stats=True)
    assert loss == 0 and stats["neg_sim"] == 0 and stats["acc1"] == 1


def test_views_of_other_sizes():
    x1, x2 = next(methods.views())
    assert torch.isfinite(build()(x1, x2[..., 2:]))


def test_bad_arguments():
    with pytest.raises(ValueError, match="T must be finite and above 0, got -1"):
        EndToEnd(methods.Net, T=-1)
    x1, x2 = next(methods.views())
    with pytest.raises(ValueError, match="x2 must hold as many images as x1, 12, got 3"):
        build()(x1, x2[:3])
