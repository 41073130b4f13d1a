"""Parameters, gradients and optimizers for the tests of moco_fast.optim."""

import torch

from moco_fast.optim import SGD

SHAPES = [(0, 4), (), (1,), (5,), (37, 3), (16, 3, 3, 3), (257,), (70_001,)]


def parameters(device="cpu", dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in SHAPES]
    made[5] = made[5].to(memory_format=torch.channels_last)
    return [tensor.requires_grad_() for tensor in made]


def give_gradients(params, step, skip=None):
    """The same values in every dtype and on every device; one parameter may get none."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator, device="cpu").bfloat16()
        param.grad = None if i == skip else torch.empty_like(param).copy_(grad).detach()


def keys_of(params):
    return [param.detach() + 1 for param in params]


def close(got, want, dtype, factor=4):
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want.double(), rtol=factor * eps, atol=factor * eps)


def make(kind, params, **options):
    if kind is SGD:
        return SGD(params, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True, **options)
    return kind(params, 0.1, weight_decay=0.01, **options)
