"""Where the time of a training step goes, by marks on the clock of the device.

A mark ends a stage: a CUDA event on the GPU, ``perf_counter`` on the CPU. The
encoders are marked by forward hooks, the loss in the backward pass by the hook
that sees its gradient arrive at the queries, EMA, shuffle and enqueue by
wrapping the calls that do them. Marks do not wait, so the host runs ahead of a
GPU as it does in training.

A stage on a GPU lasts from mark to mark, and so includes the moments in which
the GPU had nothing to do because the host was late. Those together are the host
gaps: the step minus the time in which a kernel ran, by torch's profiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn

from moco_fast import distributed, ops

STAGES = ("encoders", "loss", "EMA", "shuffle", "enqueue", "optimizer", "other")


class Clock:
    """Marks of one step at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def start(self) -> None:
        self._marks = [("", self._now())]

    def mark(self, stage: str) -> None:
        """What came since the last mark was ``stage``."""
        self._marks.append((stage, self._now()))

    def _now(self) -> torch.cuda.Event | float:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # on the current stream, which in the backward pass is that of the forward
        return event

    def seconds(self) -> dict[str, float]:
        """Seconds by stage since :meth:`start`; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = dict.fromkeys(STAGES, 0.0)
        for (_, begin), (stage, end) in zip(self._marks, self._marks[1:], strict=False):
            found[stage] += end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3
        return found


@contextmanager
def watch(model: nn.Module, clock: Clock) -> Iterator[None]:
    """Let the parts of a MoCo, ours or the eager one, mark what they did."""

    def wrapped(call: Callable, before: str, after: str) -> Callable:
        def run(*arguments, **options):
            clock.mark(before)
            result = call(*arguments, **options)
            clock.mark(after)
            return result

        return run

    def encoded_queries(module, inputs, queries):
        clock.mark("encoders")
        queries.register_hook(lambda gradient: clock.mark("loss"))

    with ExitStack() as undo:
        for handle in (
            model.encoder_q.register_forward_pre_hook(lambda module, inputs: clock.mark("other")),
            model.encoder_q.register_forward_hook(encoded_queries),
            model.encoder_k.register_forward_pre_hook(lambda module, inputs: clock.mark("shuffle")),
            model.encoder_k.register_forward_hook(lambda module, inputs, keys: clock.mark("encoders")),
        ):
            undo.callback(handle.remove)
        updater = (
            (model, "update_key_encoder") if hasattr(model, "update_key_encoder") else (ops, "ema_update_")
        )
        for (owner, name), before, after in (
            (updater, "other", "EMA"),
            ((distributed.Exchange, "keys_of_all"), "other", "shuffle"),
            ((distributed, "Exchange"), "other", "shuffle"),
            ((model, "enqueue_"), "loss", "enqueue"),
        ):
            call = wrapped(getattr(owner, name), before, after)
            undo.enter_context(mock.patch.object(owner, name, call))
        yield


def busy_seconds(step: Callable[[], object], device: torch.device, steps: int = 3) -> float | None:
    """Seconds per step in which the GPU ran a kernel or a copy; None on a CPU, or without a profiler."""
    if device.type == "cpu":
        return None
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    with ExitStack() as stack:
        try:
            stack.enter_context(profile)
        except (AssertionError, RuntimeError):  # where it knows of no GPU
            return None
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    # One stream: kernels do not overlap, and their times add up.
    microseconds = sum(event.self_device_time_total for event in profile.key_averages())
    return microseconds / 1e6 / steps or None
