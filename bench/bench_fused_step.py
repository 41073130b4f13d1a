"""A whole optimizer step and the EMA after it, for all parameters of an encoder, fp32.

SGD with momentum 28 bytes per parameter (query, momentum and key read and written, gradient read), AdamW 36.
Timed where it matters, on a GPU, and in smoke runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import moco_fast
from bench.bench_ema_update import GPU_SIZES, LERP, MOMENTUM, lerp, official, parameters
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
    """Parameters with fixed gradients, their optimizer and the keys that follow them.

    Args:
        start: parameters and keys to begin with.
        name: in :data:`OPTIMIZERS`.
        update: moves the keys after the step; None where our optimizer moves them in its step.
        options: of the optimizer, beside its recipe.
    """

    def __init__(self, start: list[Tensor], name: str, update: Update | None, dtype=torch.float32, **options):
        make, recipe, _ = OPTIMIZERS[name]
        generator = torch.Generator(start[0].device).manual_seed(1)
        self.queries = [tensor.to(dtype, copy=True).requires_grad_() for tensor in start]
        self.keys = [tensor.to(dtype, copy=True) for tensor in start]
        for query in self.queries:
            query.grad = torch.randn(query.shape, generator=generator, device=query.device).to(dtype)
        if update is None:
            make = getattr(moco_fast, name)
            options["ema"] = list(zip(self.keys, self.queries, strict=True))
            options["m"] = MOMENTUM
        self.optimizer = make(self.queries, **recipe, **options)
        self.update = update

    def run(self) -> None:
        self.optimizer.step()
        if self.update:
            self.update(self.keys, [query.detach() for query in self.queries])

    def state(self) -> Tensor:
        """Queries and keys after two more steps, the second of which has a momentum."""
        self.run()
        self.run()
        return torch.cat([tensor.detach().flatten() for tensor in (*self.queries, *self.keys)])


class FusedStep(Step):
    """Our optimizer, on one backend."""

    def __init__(self, start: list[Tensor], name: str, backend: str):
        super().__init__(start, name, None)
        self.backend = backend

    def run(self) -> None:
        with moco_fast.use_backend(self.backend):
            super().run()


def case(size: str, name: str, device: torch.device) -> Case:
    """The case of one encoder and one optimizer."""
    start = parameters(size, device)
    want = Step(start, name, official, torch.float64, foreach=False).state()

    # Adam keeps its step count on the device, and can be captured, only when told so.
    graphs = {"capturable": True} if name == "AdamW" and device.type == "cuda" else {}

    def peer(make: Callable[[], Step]) -> Peer:
        return Peer(make().run, lambda: {"parameters": relative(make().state(), want)}, tolerance=1e-5)

    peers, absent = {}, {}
    if hasattr(moco_fast, name):
        fused, absent = serving(f"{name.lower()}_", start)
        peers = {f"{OURS} {backend}": peer(partial(FusedStep, start, name, backend)) for backend in fused}
    options = {"fused": True, **graphs}
    for backend in serving("ema_update_", start)[0]:
        update = ours_with(backend)
        peers[f"{OURS} {backend} after fused {name}"] = peer(partial(Step, start, name, update, **options))
    peers[f"{LERP} after fused {name}"] = peer(partial(Step, start, name, lerp, **options))
    peers[OFFICIAL] = peer(partial(Step, start, name, official, **graphs))
    count = sum(tensor.numel() for tensor in start)
    label = f"{name} + EMA, {size}, {count / 1e6:.1f} M parameters"
    return Case("fused step", label, peers, 12.0 * count, OPTIMIZERS[name][2] * count, absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per optimizer."""
    if quick or device.type == "cuda":
        for name in OPTIMIZERS:
            yield case(QUICK_SIZES[0] if quick else GPU_SIZES[0], name, device)
