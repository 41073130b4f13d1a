"""The exchange of images between GPUs that read each other's memory, over NVLink: one-sided, without NCCL.

Every rank copies its batch into memory that the others have mapped, waits until all have, and takes the rows
it needs from where they lie. Built on ``torch.distributed._symmetric_memory``, which is not a stable
interface, and tested with the memory of one process: it has not run on several GPUs yet. So it is used on
request alone, ``MOCO_FAST_SHUFFLE=auto``, and then only where it works on all ranks and is faster.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moco_fast import reference
from moco_fast.distributed.agreement import largest

ROUNDS = 5  # of each way, to find the faster

_memory: dict[tuple, PeerMemory | None] = {}  # by shape and dtype; None: another way is better


class PeerMemory:
    """A batch of this rank that all ranks can read, and theirs."""

    def __init__(self, images: Tensor) -> None:
        symmetric: Any = importlib.import_module("torch.distributed._symmetric_memory")
        size = images.numel() * images.element_size()
        self._own = symmetric.empty(size, dtype=torch.uint8, device=images.device)
        self._handle = symmetric.rendezvous(self._own, dist.group.WORLD)
        self._peers = torch.tensor(self._handle.buffer_ptrs, device=images.device)

    def take(
        self,
        images: Tensor,  # (N, ...) of this rank
        places: Tensor,  # (N,) image of all ranks for each of this rank's places
    ) -> Tensor:
        """The images of this rank's places, on the current stream."""
        from moco_fast.kernels.take_rows import take_rows_of_peers

        self._handle.barrier(channel=0)  # all have read the batch before
        self._own.copy_(reference.flat_rows(images).view(torch.uint8).flatten())
        self._handle.barrier(channel=1)  # all have written theirs
        out = reference.empty_rows(images, len(places))
        with torch.cuda.device(images.device) if images.is_cuda else torch.device("cpu"):
            take_rows_of_peers(self._peers, places, len(images), out)
        return out


def memory_if_faster(images: Tensor, places: Tensor, otherwise: Callable[[], object]) -> PeerMemory | None:
    """Memory that all ranks can read, where they all can and that is faster than ``otherwise``.

    Found out at the first batch of a shape, by all ranks together.
    """
    key = (images.shape, images.dtype, images.device)
    if key not in _memory:
        _memory[key] = _measured(images, places, otherwise)
    return _memory[key]


def _measured(images: Tensor, places: Tensor, otherwise: Callable[[], object]) -> PeerMemory | None:
    memory = None
    try:
        memory = PeerMemory(images)
    except Exception:  # no NVLink, another machine, another version of torch: whatever the reason
        failed = 1
    else:
        failed = 0
    if largest(failed)[0]:
        return None
    assert memory is not None
    ways = (lambda: memory.take(images, places), otherwise)
    microseconds = largest(*(round(1e6 * _seconds(way, images.device)) for way in ways))
    return memory if microseconds[0] < microseconds[1] else None


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / ROUNDS
