"""SimSiam equals its paper's formula, and collapses without the stop-gradient."""

import copy

import methods
import pytest
import torch

from bench.eager_mechanisms import EagerSimSiam
from moco_fast.models.simsiam import SimSiam


def build(cls=SimSiam, **options):
    torch.manual_seed(3)
    return cls(methods.Net, 16, 8, **options)


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_loss_and_gradients(stop_gradient):
    model, eager = (build(cls, stop_gradient=stop_gradient) for cls in (SimSiam, EagerSimSiam))
    eager.load_state_dict(model.state_dict())
    methods.assert_loss_and_gradients(model, eager, next(methods.views()))


def test_twenty_steps():
    methods.assert_trajectory(build(), build(EagerSimSiam), methods.views(20))


def test_eval_changes_nothing():
    methods.assert_eval_changes_nothing(build(), next(methods.views(batch=5)))


def test_checkpoint():
    methods.assert_goes_on_from_a_checkpoint(build, methods.views(4))


def test_autocast():
    methods.assert_autocast_and_layout(build(), next(methods.views()))


def test_without_the_stop_gradient_embeddings_collapse():
    """Towards one embedding of all images: a better loss, and images that cannot be told apart."""
    found = {}
    for stop_gradient in (True, False):
        model = build(stop_gradient=stop_gradient)
        losses = methods.train(model, methods.views(300, batch=32, size=6), lr=0.1)
        found[stop_gradient] = (
            losses[-10:].mean(),
            model(*next(methods.views(batch=64)), return_stats=True)[1],
        )
    (loss, stats), (collapsed_loss, collapsed) = found[True], found[False]
    assert collapsed_loss < loss
    # Over six seeds the largest of the one was 0.01 and the smallest of the other 0.31.
    assert stats["neg_sim"] < 0.05 and collapsed["neg_sim"] > 0.2
    assert collapsed["acc1"] < stats["acc1"]


def test_stats():
    x1, x2 = next(methods.views())
    model = build()
    twin = copy.deepcopy(model)
    z1, z2 = twin.encoder(x1).detach(), twin.encoder(x2).detach()
    _, stats = model(x1, x2, return_stats=True)
    methods.assert_pair_stats(stats, z1, z2, torch.arange(12))


def test_bad_arguments():
    with pytest.raises(ValueError, match="pred_dim must be at least 1, got 0"):
        SimSiam(methods.Net, 16, 0)
    x1, x2 = next(methods.views())
    with pytest.raises(ValueError, match="x2 must hold as many images as x1, 12, got 3"):
        build()(x1, x2[:3])
