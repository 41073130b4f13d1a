"""What the tests of all methods share: a small encoder, views, a training, and what every model must do."""

import copy
import io

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Convolutions and a linear ``fc``; batch norm on request, which lets images see their neighbours."""

    def __init__(self, num_classes=10, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.fc = nn.Linear(10, num_classes)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def views(steps=1, batch=12, size=8, dtype=torch.float32, seed=5):
    """Pairs of views that resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = torch.randn(batch, 3, size, size, generator=generator)
        yield tuple(
            (images + 0.3 * torch.randn(images.shape, generator=generator)).to(dtype) for _ in range(2)
        )


def train(model, batches, lr=0.05):
    """Losses of SGD over tuples of the model's arguments."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for batch in batches:
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_same_state(got, want, rtol=1e-4, atol=1e-5):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_loss_and_gradients(model, eager, batch):
    """Equal to the eager model in float64, to rounding; both models must hold the same state."""
    model, eager = model.double(), eager.double()
    batch = [x.double() if x.is_floating_point() else x for x in batch]
    torch.manual_seed(1)
    got = model(*batch)
    torch.manual_seed(1)
    want = eager(*batch)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    got.backward()
    want.backward()
    expected = dict(eager.named_parameters())
    seen = 0
    for name, parameter in model.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
        seen += bool(parameter.grad.any())
    assert seen >= 3


def assert_as_near(got, want, exact, rtol=1e-5):
    """Losses of a training at most twice as far from those in float64 as the wanted ones are, and a little.

    Rounding grows from step to step, differently on every CPU.
    """
    ours, theirs = ((losses.double() - exact.double()).abs().max() for losses in (got, want))
    assert ours <= 2 * theirs + rtol * exact.abs().max()


def assert_trajectory(model, eager, batches, rtol=1e-5):
    """The losses of the eager model over all steps, and its state after them."""
    eager.load_state_dict(model.state_dict())
    batches = list(batches)
    in_float64 = [[x.double() if x.is_floating_point() else x for x in batch] for batch in batches]
    trainings = (model, batches), (eager, batches), (copy.deepcopy(eager).double(), in_float64)
    found = []
    for each, of_it in trainings:
        torch.manual_seed(1)
        found.append(train(each, of_it))
    assert_as_near(*found, rtol)
    assert found[0][-1] != found[0][0]
    assert_same_state(model, eager)


def means(stats):
    """Those of a model that tells them, or of one with statistics for every query, as MoCo."""
    return stats if isinstance(stats, dict) else stats.means()


def assert_eval_changes_nothing(model, batch):
    model.eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, (again, stats) = model(*batch), model(*batch, return_stats=True)
    assert torch.equal(first, again) and means(stats).keys() == {"pos_sim", "neg_sim", "acc1"}
    model.features(batch[0])
    assert torch.equal(random, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def assert_goes_on_from_a_checkpoint(build, batches):
    """A model loaded with the state of another goes on as that does; so does a copy."""
    batches = list(batches)
    model, loaded = build(), build()
    train(model, batches[:2])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    losses = []
    for each in (model, loaded, copy.deepcopy(loaded)):
        torch.manual_seed(2)
        losses.append(train(copy.deepcopy(each), batches[2:]))
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def assert_autocast_and_layout(model, batch):
    """bf16 autocast, channels-last images: a finite fp32 loss with gradients, statistics without."""
    model = model.to(memory_format=torch.channels_last)
    batch = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in batch]
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = model(*batch, return_stats=True)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.ndim == 0
    grads = [p.grad for p in model.encoder.parameters() if p.requires_grad]
    assert all(torch.isfinite(g).all() for g in grads if g is not None)
    for name, value in means(stats).items():
        assert value.ndim == 0 and not value.requires_grad and torch.isfinite(value), name


def assert_pair_stats(stats, q, k, positive, itself=None):
    """Against all similarities, written out."""
    similarity = F.normalize(q, dim=1) @ F.normalize(k, dim=1).t()
    rows = torch.arange(len(q))
    others = torch.ones_like(similarity, dtype=torch.bool)
    others[rows, positive] = False
    if itself is not None:
        others[rows, itself] = False
        similarity[rows, itself] = -1
    torch.testing.assert_close(stats["pos_sim"], similarity[rows, positive].mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats["neg_sim"], similarity[others].mean(), rtol=1e-4, atol=1e-5)
    assert stats["acc1"] == (similarity.argmax(1) == positive).float().mean()
