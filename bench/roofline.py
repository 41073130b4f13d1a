"""What the machine can do at most, measured in the same run: a copy and matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import cuda, measure
from bench.case import PAIRS
from moco_fast import native


@dataclass(frozen=True)
class Roofline:
    """What this machine reached in this run: the best of all tries, since a roof is a maximum."""

    copy: float  # bytes per second, read plus written
    products: dict[str, float]  # FLOP per second of torch.mm, by operand type

    def raised_by(self, other: Roofline) -> Roofline:
        """The higher of two roofs in every figure: a busy moment must not lower it."""
        products = {name: max(rate, self.products.get(name, 0.0)) for name, rate in other.products.items()}
        return Roofline(max(self.copy, other.copy), products)

    def share(self, flops: float, nbytes: float, product: str, seconds: float) -> float:
        """``max(flops / rate, bytes / bandwidth) / seconds``: 1 is as fast as the roof allows."""
        rate = self.products["fp16"] / 3 if product == PAIRS else self.products[product]
        return max(flops / rate, nbytes / self.copy) / seconds


def roofline(device: torch.device, quick: bool) -> Roofline:
    """Measure the bandwidth of a copy far larger than the caches, and the rate of square matrix products."""
    # Random operands: zeros switch fewer transistors and run faster than data do.
    numel, side = (2**20, 256) if quick else (2**28, 8192) if device.type == "cuda" else (2**26, 2048)
    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    copy = 2 * 4 * numel / _best(lambda: target.copy_(source), device, quick)
    a, b = torch.randn(2, side, side, device=device)
    rates = {name: 2 * side**3 / _best(product, device, quick) for name, product in _products(a, b, device)}
    return Roofline(copy, rates)


def _products(a: Tensor, b: Tensor, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    def of(dtype: torch.dtype) -> Callable[[], object]:
        low_a, low_b = a.to(dtype), b.to(dtype)
        return lambda: torch.mm(low_a, low_b)

    yield "fp32", of(torch.float32)
    if device.type == "cuda":
        yield "tf32", cuda.in_tf32(of(torch.float32))
        yield "fp16", of(torch.float16)
    if device.type == "cuda" or native.has_bf16_units():
        yield "bf16", of(torch.bfloat16)


def _best(run: Callable[[], object], device: torch.device, quick: bool) -> float:
    run()
    timer = cuda.device_clock(run, device) if device.type == "cuda" else measure.wall_clock(run)
    return min(timer() for _ in range(3 if quick else 8))
