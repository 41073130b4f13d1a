"""The exchange of images between GPUs that read each other's memory, over NVLink: one-sided, without NCCL.

Every rank copies its batch into memory that the others have mapped, waits until all have, and takes the rows
it needs from where they lie. Built on ``torch.distributed._symmetric_memory``, which is not a stable
interface, and tested with the memory of one process: it has not run on several GPUs yet. So it is used on
request alone, ``MOCO_FAST_SHUFFLE=auto``, and then only where it works on all ranks and is faster.
"""

from __future__ import annotations

import importlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from moco_fast import reference
from moco_fast.distributed.agreement import from_all, largest
from moco_fast.kernels import backend

ROUNDS = 5  # of each way, to find the faster

# By process group, as long as there is one, and what a batch is like; None: another way is better.
_memory: WeakKeyDictionary[dist.ProcessGroup, dict[tuple, PeerMemory | None]] = WeakKeyDictionary()


class PeerMemory:
    """A batch of this rank that all ranks can read, and theirs.

    Args:
        own: bytes in symmetric memory, as many as a batch has.
    """

    def __init__(self, own: Tensor) -> None:
        self._own, self._handle = own, _symmetric().rendezvous(own, dist.group.WORLD)
        pointers = self._handle.buffer_ptrs
        if not all(pointers):
            raise RuntimeError("the memory of some ranks has no address on this one")
        # The addresses are those of segments, in which the memory may lie further on.
        if offset := getattr(self._handle, "offset", 0):
            raise RuntimeError(f"the memory starts {offset} bytes into its segment")
        self._peers = torch.tensor(pointers, device=own.device)

    def take(
        self,
        images: Tensor,  # (N, ...) of this rank
        places: Tensor,  # (N,) image of all ranks for each of this rank's places
    ) -> Tensor:
        """The images of this rank's places, on the current stream."""
        from moco_fast.kernels.take_rows import take_rows_of_peers

        self._handle.barrier(channel=0)  # all have read the batch before
        images = reference.dense(images)
        self._own.copy_(reference.flat_rows(images).view(torch.uint8).flatten())
        self._handle.barrier(channel=1)  # all have written theirs
        out = reference.empty_rows(images, len(places))
        with backend.on_device_of(images):
            take_rows_of_peers(self._peers, places, len(images), out)
        return out


def memory_if_faster(images: Tensor, places: Tensor, otherwise: Callable[[], object]) -> PeerMemory | None:
    """Memory that all ranks can read, where they all can and that is faster than ``otherwise``.

    Found out at the first batch of a shape, by all ranks together.
    """
    group = dist.group.WORLD
    assert group is not None
    known = _memory.setdefault(group, {})
    batch = (images.shape, images.dtype, images.device)
    if batch not in known:
        known[batch] = _measured(images, places, otherwise)
    return known[batch]


def _measured(images: Tensor, places: Tensor, otherwise: Callable[[], object]) -> PeerMemory | None:
    memory = _shared_by_all(images)
    if memory is None:
        return None
    ways = (lambda: memory.take(images, places), otherwise)
    microseconds = largest(*(round(1e6 * _seconds(way, images.device)) for way in ways))
    return memory if microseconds[0] < microseconds[1] else None


def _shared_by_all(images: Tensor) -> PeerMemory | None:
    """Memory for batches like this one; None on all ranks if one cannot have it.

    In a rendezvous a rank waits for one that has failed before it, and for ever for one on another machine:
    they hand file descriptors from process to process.
    """
    size = images.numel() * images.element_size()
    own: Any = None
    if backend.cannot_serve("take_rows", (images,)) is None:  # whose kernel file has that of the peers
        own = _attempt(lambda: _symmetric().empty(size, dtype=torch.uint8, device=images.device))
    if set(from_all((_machine(), own is not None))) != {(_machine(), True)}:
        return None
    memory = _attempt(lambda: PeerMemory(own))
    return None if largest(int(memory is None))[0] else memory


def _attempt(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception:  # no NVLink, another version of torch: whatever the reason
        return None


def _symmetric() -> Any:
    return importlib.import_module("torch.distributed._symmetric_memory")


def _machine() -> tuple[str, str]:
    """What tells machines apart, and containers that share one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.exists() else ""


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
