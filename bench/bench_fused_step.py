"""A whole optimizer step and the EMA after it, for all parameters of an encoder, fp32.

SGD with momentum 28 bytes per parameter (query, momentum and key read and written, gradient read), AdamW 36.
Timed where it matters, on a GPU, and in smoke runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.bench_ema_update import GPU_SIZES, LERP, lerp, official, parameters
from bench.bench_ema_update import QUICK as QUICK_SIZES
from bench.bench_ema_update import ours as ours_with
from bench.case import OFFICIAL, OURS, Case, Peer, relative, serving

Update = Callable[[list[Tensor], list[Tensor]], None]  # moves the keys towards the queries
# name: constructor, its options, bytes per parameter of step and EMA
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict, float]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}, 28.0),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}, 36.0),
}


class Step:
    """Parameters with fixed gradients, their optimizer and the keys that follow them."""

    def __init__(self, start: list[Tensor], name: str, update: Update, dtype=torch.float32, **options):
        make, recipe, _ = OPTIMIZERS[name]
        generator = torch.Generator().manual_seed(1)
        self.update = update
        self.queries = [tensor.to(dtype, copy=True).requires_grad_() for tensor in start]
        self.keys = [tensor.to(dtype, copy=True) for tensor in start]
        for query in self.queries:
            query.grad = torch.randn(query.shape, generator=generator).to(query)
        self.optimizer = make(self.queries, **recipe, **options)

    def run(self) -> None:
        self.optimizer.step()
        self.update(self.keys, [query.detach() for query in self.queries])

    def state(self) -> Tensor:
        """Queries and keys after two more steps, the second of which has a momentum."""
        self.run()
        self.run()
        return torch.cat([tensor.detach().flatten() for tensor in (*self.queries, *self.keys)])


def case(size: str, name: str, device: torch.device) -> Case:
    """The case of one encoder and one optimizer."""
    start = parameters(size, device)
    want = Step(start, name, official, torch.float64, foreach=False).state()

    # Adam keeps its step count on the device, and can be captured, only when told so.
    graphs = {"capturable": True} if name == "AdamW" and device.type == "cuda" else {}

    def peer(update: Update, **options) -> Peer:
        def errors() -> dict[str, float]:
            return {"parameters": relative(Step(start, name, update, **options).state(), want)}

        return Peer(Step(start, name, update, **options).run, errors, tolerance=1e-5)

    backends, absent = serving("ema_update_", start)
    fused = {"fused": True, **graphs}
    peers = {
        f"{OURS} {backend} after fused {name}": peer(ours_with(backend), **fused) for backend in backends
    }
    peers[f"{LERP} after fused {name}"] = peer(lerp, **fused)
    peers[OFFICIAL] = peer(official, **graphs)
    count = sum(tensor.numel() for tensor in start)
    label = f"{name} + EMA, {size}, {count / 1e6:.1f} M parameters"
    return Case("fused step", label, peers, 12.0 * count, OPTIMIZERS[name][2] * count, absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per optimizer."""
    if quick or device.type == "cuda":
        for name in OPTIMIZERS:
            yield case(QUICK_SIZES[0] if quick else GPU_SIZES[0], name, device)
