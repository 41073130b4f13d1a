"""Batches of images: the same ones in the same order for the same seed, whoever decodes them.

The order of an epoch is a function of (seed, epoch) alone, so a run that
resumes at step s of an epoch sees exactly the batches that it had not seen.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from moco_fast import checks
from moco_fast.data.images import Fetched, ImageSet, ImageSource, Log

PREFETCH = 2  # batches that every worker keeps ready
WORKER_DIED = "DataLoader worker (pid"  # begins the RuntimeError that torch raises, wherever a run is then
# Forked workers start at once and share the list of files; Python 3.14 would start each of them anew.
# macOS has libraries that do not survive a fork, Windows has no fork.
START_METHOD = "fork" if sys.platform == "linux" else None


class Batch(NamedTuple):
    """What a training step starts from."""

    images: Tensor  # (B, C, H, W) uint8
    aspect: Tensor | None  # (B,) original width / height of squashed images
    indices: Tensor  # (B,) int64, rows of the image set


class BatchLoader:
    """Shuffled batches to train on, and ordered ones to evaluate.

    With several processes, ``batch_size`` is per process: one global permutation is dealt out, and no
    image goes to two of them.

    Args:
        dataset: images to serve.
        batch_size: images per batch.
        seed: with the epoch, decides the order; at least 0.
        workers: processes that decode files; images in memory need none and get none.
        rank: this process among ``world_size``.
        world_size: processes that train together.
        pin_memory: put batches in page-locked memory, for copies to a GPU that do not block.
        log: receives one line per file that turns out to be broken.

    Attributes:
        wait_seconds: time that the consumer of ``batches`` has spent waiting for images so far.

    Raises:
        ValueError: fewer images than one global batch, or an argument out of range.
    """

    def __init__(
        self,
        dataset: ImageSet,
        batch_size: int,
        seed: int,
        workers: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        log: Log = print,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        if len(dataset) < batch_size * world_size:
            each = f" on each of {world_size} processes" if world_size > 1 else ""
            raise ValueError(f"dataset has {len(dataset)} images, fewer than batch_size={batch_size}{each}")
        self.source = dataset.images
        self.batch_size = batch_size
        self.seed = seed
        self.workers = 0 if self.source.in_memory else workers
        self.rank = rank
        self.world_size = world_size
        self.pin_memory = pin_memory
        self.wait_seconds = 0.0
        self._log = log
        self._reported: set[int] = set()

    def __len__(self) -> int:
        """Batches per epoch; the images left over sit this epoch out."""
        return len(self.source) // (self.batch_size * self.world_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches ``start`` to the last of an epoch; those before are not decoded.

        Args:
            epoch: number of the epoch, from 0.
            start: batches to skip.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be in [0, {len(self)}], got {start}")
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
        order = order[: len(self) * self.batch_size * self.world_size]
        dealt = torch.from_numpy(order).view(len(self), self.world_size, self.batch_size)
        served = self._serve(dealt[start:, self.rank])
        while True:
            began = time.perf_counter()
            batch = next(served, None)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def in_order(self, indices: Sequence[int] | Tensor | None = None) -> Iterator[Batch]:
        """Batches of the images at ``indices`` (default: all) in that order; the last may be short."""
        count = len(self.source)
        rows = torch.as_tensor(range(count) if indices is None else indices, dtype=torch.int64)
        checks.in_range("indices", rows, count, wait=True)
        return self._serve(rows.split(self.batch_size))

    def _serve(self, requests: Sequence[Tensor] | Tensor) -> Iterator[Batch]:
        """Fetch every request, here or in workers, and report broken files once each."""
        fetched = self._from_workers(requests) if self.workers else map(self.source.fetch, requests)
        for answer in fetched:
            if isinstance(answer, str):
                raise OSError(answer)
            images, aspect, indices, broken = answer
            for index, why in broken:
                if index not in self._reported:
                    self._reported.add(index)
                    name, number = self.source.name_of(index), len(self._reported)
                    self._log(f"Broken image, replaced by another ({number} so far): {name}: {why}")
            if self.pin_memory:
                images, aspect = images.pin_memory(), None if aspect is None else aspect.pin_memory()
            yield Batch(images, aspect, indices)

    def _from_workers(self, requests: Sequence[Tensor] | Tensor) -> Iterator[Fetched | str]:
        loader = DataLoader(
            _Requests(self.source),
            sampler=requests,  # type: ignore[arg-type]  # anything sized will do; an item is a whole batch
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=PREFETCH,
            multiprocessing_context=START_METHOD,
            worker_init_fn=_leave_interrupts_to_parent,
            collate_fn=_as_is,
            # Its own generator: the default one is global, and drawing from it would change the run.
            generator=torch.Generator(),
        )
        before = set(multiprocessing.active_children())
        with _interrupts_held():
            batches = iter(loader)
        _workers.update(set(multiprocessing.active_children()) - before)
        return batches


_workers: WeakSet[multiprocessing.process.BaseProcess] = WeakSet()


@atexit.register
def _end_workers() -> None:
    """Where an error ends the process: Python would send SIGTERM, which they ignore, and wait forever."""
    for worker in _workers:
        worker.kill()


class _Requests(TorchDataset[Fetched | str]):
    """A source as DataLoader wants it: one request in, one batch out.

    Or why files cannot be had: an error raised here would arrive with a traceback for its message.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Tensor) -> Fetched | str:
        try:
            return self.source.fetch(indices)
        except OSError as error:
            return str(error)


def _as_is(fetched: Any) -> Any:
    return fetched


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the block is over.

    Starting workers forks, and Python drops an exception that is raised in a fork callback: a key
    pressed in that moment would be lost.
    """
    # Only the main thread may set handlers; without a Python handler there is no exception to lose.
    if threading.current_thread() is not threading.main_thread() or not callable(
        previous := signal.getsignal(signal.SIGINT)
    ):
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _leave_interrupts_to_parent(_: int) -> None:
    """What ends a run goes to all its processes; workers go on until the parent ends."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
