"""DINO equals its paper's algorithm with the logits of both models, written out."""

import copy

import methods
import pytest
import torch

from bench.eager_mechanisms import EagerDINO
from moco_fast.models.dino import DINO


def build(cls=DINO):
    torch.manual_seed(3)
    return cls(methods.Net, 12, 70, 20, 0.1, 0.04, 0.9)


class Stepped(DINO):
    """Its momentum is fixed, so that all arguments are tensors."""

    def forward(self, x1, x2, **options):
        return super().forward(x1, x2, 0.9, **options)


class EagerStepped(EagerDINO):
    def forward(self, x1, x2):
        return super().forward(x1, x2, 0.9)


def test_loss_and_gradients():
    """With a center that is not 0, and a teacher that is not the student."""
    model, eager = build(Stepped).double(), build(EagerStepped).double()
    methods.train(model, (tuple(x.double() for x in batch) for batch in methods.views(3)), lr=0.5)
    model.zero_grad()
    eager.load_state_dict(model.state_dict())
    assert model.center.abs().max() > 1e-3
    methods.assert_loss_and_gradients(model, eager, next(methods.views(seed=8)))
    torch.testing.assert_close(model.center, eager.center)


def test_twenty_steps():
    # One rounding of a teacher's logit, 1e-6 at 1 / T_t = 25, is 4e-6 of losses near 0.25, and grows.
    methods.assert_trajectory(build(Stepped), build(EagerStepped), methods.views(20), rtol=2e-4)


def test_eval_changes_nothing():
    methods.assert_eval_changes_nothing(build(Stepped), next(methods.views(batch=5)))


def test_checkpoint():
    methods.assert_goes_on_from_a_checkpoint(lambda: build(Stepped), methods.views(4))


def test_autocast():
    methods.assert_autocast_and_layout(build(Stepped), next(methods.views()))


def test_initial_state():
    """The teacher is the student, frozen; it is what gets evaluated."""
    model = build()
    for target, source in model._pairs():
        assert torch.equal(target, source) and source.requires_grad and not target.requires_grad
    assert model.encoder is model.teacher and not model.center.any()
    assert model.features(next(methods.views())[0]).shape == (12, 10)
    torch.testing.assert_close(model.prototypes.norm(dim=1), torch.ones(70))


def test_temperature_of_a_step():
    x1, x2 = next(methods.views())
    model = build().eval()
    other = copy.deepcopy(model)
    other.teacher_T = 0.07
    assert torch.equal(model(x1, x2, 0.9, teacher_T=0.07), other(x1, x2, 0.9))
    assert model(x1, x2, 0.9) != other(x1, x2, 0.9)


def test_stats():
    x1, x2 = next(methods.views())
    model = build()
    twin = copy.deepcopy(model)
    images = torch.cat([x1, x2])
    student, teacher = twin.student(images).detach(), twin.teacher(images).detach()
    _, stats = model(x1, x2, 0.9, return_stats=True)
    methods.assert_pair_stats(stats, student.roll(12, 0), teacher, torch.arange(24))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prototypes": 0}, ValueError, "prototypes must be at least 1, got 0"),
        ({"mlp_dim": 2.5}, TypeError, "mlp_dim must be an integer"),
        ({"student_T": 0.0}, ValueError, "student_T must be finite and above 0"),
        ({"teacher_T": -1}, ValueError, "teacher_T must be finite and above 0"),
        ({"center_momentum": 2}, ValueError, r"center_momentum must be in \[0, 1\], got 2"),
    ],
)
def test_bad_constructor_arguments(options, error, message):
    with pytest.raises(error, match=message):
        DINO(methods.Net, **options)


def test_bad_steps_change_nothing():
    model = build()
    before = copy.deepcopy(model.state_dict())
    x1, x2 = next(methods.views())
    for arguments, message in [
        ((x1, x2, 1.5), r"m must be in \[0, 1\], got 1.5"),
        ((x1, x2, 0.9, 0.0), "teacher_T must be finite and above 0"),
        ((x1, x2[:3], 0.9), "x2 must hold as many images as x1"),
        ((x1, x2[..., 1:], 0.9), "x2 must have the shape of x1"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
