"""The batch shuffle: ranks exchange images before they encode the keys.

The batch norm of the key encoder then sees other neighbours than that of the query encoder, so statistics
cannot tell a positive from a negative.

Every rank draws the same permutation from a generator of the same seed; nothing is broadcast. Of its N images
a rank sends N/W to every other, in one ``all_to_all_single`` of the bytes they have: N (W-1)/W rows leave it,
where the official code gathers all images on all ranks and receives (W-1) N.

A rank whose batch norm is split into S parts counts as S devices, so what V devices compute does not depend
on how they are spread over ranks: one process with V splits equals V ranks.

Source: shuffling BN, He et al. 2020, section 3.3.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moco_fast import checks, ops, reference
from moco_fast.distributed.collectives import all_gather_rows, own_rows, rank, world_size
from moco_fast.distributed.generator import CommonGenerator
from moco_fast.distributed.peers import memory_if_faster

SCHEMES = ("all_to_all", "all_gather", "auto")

_chosen: ContextVar[str | None] = ContextVar("moco_fast_shuffle", default=None)
_side_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def use_scheme(name: str) -> Iterator[None]:
    """Exchange images by another scheme in the block; MOCO_FAST_SHUFFLE does so for a whole run.

    Args:
        name: "all_to_all"; "all_gather", all images to all ranks: the official code's, for comparison; or
            "auto", one-sided reads between GPUs where they work and are faster, see ``peers``.

    Raises:
        ValueError: unknown name.
    """
    checks.one_of("scheme", name, SCHEMES)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def scheme() -> str:
    """The scheme chosen by :func:`use_scheme` or MOCO_FAST_SHUFFLE."""
    name = _chosen.get() or os.environ.get("MOCO_FAST_SHUFFLE") or SCHEMES[0]
    checks.one_of("MOCO_FAST_SHUFFLE", name, SCHEMES)
    return name


def balanced_order(
    devices: int,  # V
    rows: int,  # n, of each
    generator: torch.Generator,  # on the CPU
) -> Tensor:
    """A random order of V n images in which every device gives every other as many, to one.

    Which images travel where is uniformly random. Balance keeps the sizes of messages from changing, and a
    device from keeping more than its share of its own images by chance. In a device's new batch images stand
    in the order of the devices they come from, which a batch norm cannot see.

    Returns:
        (V n,) int64: the image at every place. Images and places of a device are consecutive.
    """
    each, rest = divmod(rows, devices)
    with torch.device("cpu"):  # whatever the default device is
        own = torch.rand(devices, rows, generator=generator).argsort(dim=1, stable=True)
        # The first V * each of a device's images go round; which devices get one more differs by row.
        givers = torch.randperm(devices, generator=generator)
        takers = torch.randperm(devices, generator=generator)
        to = torch.arange(each * devices).remainder(devices).expand(devices, -1)
        more = takers[(givers[:, None] + torch.arange(rest)).remainder(devices)]
        images = own + rows * torch.arange(devices)[:, None]
    return images.flatten()[torch.cat([to, more], dim=1).flatten().argsort(stable=True)]


class Plan(NamedTuple):
    """One permutation, as this rank carries it out. Indices are on the device of the images."""

    order: Tensor  # (W N,) image at every place
    home: Tensor  # (W N,) place of every image: what un-shuffles keys
    leaving: Tensor  # (N,) images of this rank in the order of the places they go to
    arriving: Tensor | None  # (N,) what arrived, by place; None: as it arrived
    sent: list[int]  # (W,) images that leave for every rank
    received: list[int]  # (W,)


class BatchShuffle(CommonGenerator):
    """Permutations that are the same on every rank."""

    def plan(
        self,
        rows: int,  # N, of each rank
        splits: int,  # S, of each rank
        device: torch.device,
    ) -> Plan:
        """Draw the next permutation of all ranks' images."""
        assert self.generator is not None, "agree() comes first"
        ranks, own = world_size(), rank()
        order = balanced_order(ranks * splits, rows // splits, self.generator)
        home = order.argsort()
        source, place = order.div(rows, rounding_mode="floor"), torch.arange(len(order), device="cpu")
        leaving = (source == own).nonzero().flatten()
        here = source[own_rows(rows)]
        arriving = here.argsort(stable=True).argsort()
        counts = [torch.bincount(x, minlength=ranks).tolist() for x in (place[leaving] // rows, here)]
        index = torch.cat([order, home, order[leaving] - own * rows, arriving])
        if device.type == "cuda":
            index = index.pin_memory().to(device, non_blocking=True)
        order, home, leaving, arriving = index.split([len(order), len(order), rows, rows])
        sent, received = counts
        return Plan(order, home, leaving, arriving if ranks > 1 and splits > 1 else None, sent, received)


class Exchange:
    """Images on their way to the ranks that encode them.

    On a GPU they are packed and sent on a stream of their own, beside whatever the current one does until
    :meth:`images`.

    Args:
        images: (N, ...) of this rank, contiguous or channels_last, of any dtype.
        plan: where they go.
    """

    def __init__(self, images: Tensor, plan: Plan) -> None:
        self.plan = plan
        self._work: dist.Work | None = None
        self._stream = _side_stream(images.device)
        if world_size() == 1:
            self._arrived = ops.take_rows(images, plan.order)
            return
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(images.device))
            images.record_stream(self._stream)
        with _on(self._stream):
            places = plan.order[own_rows(len(images))]
            if scheme() == "all_gather":
                self._arrived = ops.take_rows(all_gather_rows(images), places)
                return
            memory = None
            if scheme() == "auto" and images.is_cuda:
                memory = memory_if_faster(images, places, lambda: _send(images, plan)[1].wait())
            if memory is not None:
                self._arrived = memory.take(images, places)
                return
            self._arrived, self._work = _send(images, plan)

    def images(self) -> Tensor:
        """The images of this rank's places, (N, ...); waits for them."""
        with _on(self._stream):
            if self._work is not None:
                self._work.wait()
                if self.plan.arriving is not None:
                    self._arrived = ops.take_rows(self._arrived, self.plan.arriving)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._arrived.device)
            current.wait_stream(self._stream)
            self._arrived.record_stream(current)
        return self._arrived

    def keys_of_all(
        self,
        keys: Tensor,  # (N, C) of this rank's places
    ) -> tuple[Tensor, Tensor]:
        """Gather the keys of all places once, and pick those of this rank's images.

        Returns:
            keys (N, C) of this rank's images; and those of all, (W N, C), in the order of their places, which
            ``plan.home`` turns into the order of the images.
        """
        gathered = all_gather_rows(keys)
        return ops.take_rows(gathered, self.plan.home[own_rows(len(keys))]), gathered

    def keys_back(
        self,
        keys: Tensor,  # (N, C) of this rank's places
    ) -> Tensor:
        """Send keys back to the ranks that their images came from: (N, C), of this rank's images."""
        plan = self.plan
        if world_size() == 1:
            return ops.take_rows(keys, plan.home)
        if plan.arriving is not None:
            keys = ops.take_rows(keys, plan.arriving.argsort())
        returned = torch.empty_like(keys)
        dist.all_to_all_single(returned, keys.contiguous(), plan.sent, plan.received)
        return ops.take_rows(returned, plan.leaving.argsort())


def _send(images: Tensor, plan: Plan) -> tuple[Tensor, dist.Work]:
    """Start the exchange; returns what arrives, rank by rank, and what to wait for."""
    packed = ops.take_rows(images, plan.leaving)
    arrived = reference.empty_rows(packed, len(images))
    # As bytes: not every backend knows every dtype.
    to, of = (reference.flat_rows(x).view(torch.uint8) for x in (arrived, packed))
    work = dist.all_to_all_single(to, of, plan.received, plan.sent, async_op=True)
    assert work is not None
    return arrived, work


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda" or world_size() == 1:
        return None
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]


def _on(stream: torch.cuda.Stream | None):
    return nullcontext() if stream is None else torch.cuda.stream(stream)
