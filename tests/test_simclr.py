"""SimCLR equals its paper's algorithm, written out."""

import copy

import methods
import pytest
import torch
from torch import nn

from bench.eager_mechanisms import EagerSimCLR
from moco_fast.models.simclr import SimCLR


def build(cls=SimCLR, T=0.2):
    torch.manual_seed(3)
    return cls(methods.Net, 16, T)


def test_loss_and_gradients():
    methods.assert_loss_and_gradients(build(), build(EagerSimCLR), next(methods.views()))


def test_twenty_steps():
    methods.assert_trajectory(build(), build(EagerSimCLR), methods.views(20))


def test_eval_changes_nothing():
    methods.assert_eval_changes_nothing(build(), next(methods.views(batch=5)))


def test_checkpoint():
    methods.assert_goes_on_from_a_checkpoint(build, methods.views(4))


def test_autocast():
    methods.assert_autocast_and_layout(build(), next(methods.views()))


def test_stats():
    x1, x2 = next(methods.views())
    model = build()
    z = copy.deepcopy(model).encoder(torch.cat([x1, x2])).detach()
    _, stats = model(x1, x2, return_stats=True)
    index = torch.arange(24)
    methods.assert_pair_stats(stats, z, z, index.roll(12), index)


def test_head_is_an_mlp_and_features_come_before_it():
    model = build()
    assert list(model.state_dict())[-4:] == [
        f"encoder.fc.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")
    ]
    assert model.features(next(methods.views())[0]).shape == (12, 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"T": 0.0}, ValueError, "T must be finite and above 0, got 0.0"),
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"base_encoder": nn.Linear(2, 3)}, TypeError, "without parentheses, got a Linear"),
        ({"base_encoder": "resnet50"}, TypeError, "base_encoder must be callable .* got str"),
    ],
)
def test_bad_constructor_arguments(options, error, message):
    with pytest.raises(error, match=message):
        SimCLR(**({"base_encoder": methods.Net, "dim": 8} | options))


def test_bad_batches_change_nothing():
    model = build()
    before = copy.deepcopy(model.state_dict())
    x1, x2 = next(methods.views())
    for a, b, error, message in [
        (x1, x2[:5], ValueError, "x2 must hold as many images as x1, 12, got 5"),
        (x1, x2[..., 2:], ValueError, r"x2 must have the shape of x1, \(12, 3, 8, 8\), got \(12, 3, 8, 6\)"),
        (x1[:0], x2[:0], ValueError, "x1 must hold at least 1 images"),
        (x1, "x2", TypeError, "x2 must be a tensor of images .* got str"),
    ]:
        with pytest.raises(error, match=message):
            model(a, b)
    model.T = -1
    with pytest.raises(ValueError, match="T must be finite"):
        model(x1, x2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
