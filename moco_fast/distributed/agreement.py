"""Checks that all ranks want the same thing, before they enter a collective that would hang if they did not.

The words travel between CPUs, over a group of their own where the default one is NCCL's, so that no rank
waits for its GPU. Agreeing takes ceil(log2 W) rounds of 16 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from moco_fast.distributed.collectives import rank, world_size
from moco_fast.distributed.interface import reachable_interface

T = TypeVar("T")

# With a rank that evaluates, downloads or compiles; one that died is noticed at once, by its connections.
PATIENCE = timedelta(hours=2)

# By default group; None: itself. A group that is kept when the script destroys it keeps its threads, which
# may be giving back tensors when Python ends: that aborts the process.
_control: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup | None] = WeakKeyDictionary()


class Disagreement(RuntimeError):
    """What ranks were given differs; the same message on every rank."""


def largest(*values: int) -> list[int]:
    """The maximum over ranks of every value, on the CPU.

    In round i a rank hears the one 2^i before it, which has heard 2^i ranks: after ceil(log2 W) rounds
    everyone has heard all.
    """
    if world_size() == 1:
        return list(values)
    mine = torch.tensor(values, device="cpu")  # whatever the default device is
    theirs = torch.empty_like(mine)
    group, own, ranks = _control_group(), rank(), world_size()
    distance = 1
    while distance < ranks:
        sending = dist.isend(mine.clone(), (own + distance) % ranks, group)
        receiving = dist.irecv(theirs, (own - distance) % ranks, group)
        for work in (sending, receiving):
            assert work is not None
            work.wait()
        mine, distance = torch.maximum(mine, theirs), 2 * distance
    return mine.tolist()


def check_agreement(
    facts: Mapping[str, object],  # by name; of types whose repr says all
    problem: Exception | None = None,  # what makes this rank unable to continue
) -> None:
    """Raise the same error on every rank unless all were given the same facts, and none has a problem.

    Raises:
        Disagreement: names each fact that differs and its value on every rank; or the rank with a problem.
        Exception: in one process, or where all have the same problem: that problem.
    """
    if world_size() > 1:
        described = None if problem is None else str(problem) or type(problem).__name__
        word = repr((described, sorted(facts.items())))
        digest = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=7).digest(), "big")
        most, least = largest(digest, -digest)
        if most != -least:
            raise Disagreement(_differences(from_all((described, dict(facts)))))
    if problem is not None:
        raise problem


def check_equal(
    name: str,
    value: Tensor,  # () int64
) -> None:
    """Raise the same error on every rank unless all hold the same value, such as a checksum of ``name``.

    Raises:
        Disagreement: names the ranks that differ from rank 0.
    """
    if world_size() == 1:
        return
    values = from_all(int(value))
    if different := [i for i, other in enumerate(values) if other != values[0]]:
        raise Disagreement(f"{name} differs between ranks: not that of rank 0 on {name_ranks(different)}")


def from_rank_0(value: T) -> T:
    """What rank 0 passed, on every rank; anything that can be pickled."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=_control_group())
    return box[0]


def from_all(value: T) -> list[T]:
    """What every rank passed, by rank, on every rank; anything that can be pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=_control_group())
    return values


def to_rank_0(value: T) -> list[T]:
    """What every rank passed, by rank, on rank 0; nothing on the others; anything that can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, values or None, dst=0, group=_control_group())
    return values


def _differences(given: list[tuple[str | None, dict[str, object]]]) -> str:
    troubled: dict[str, list[int]] = {}
    for i, (problem, _) in enumerate(given):
        if problem is not None:
            troubled.setdefault(problem, []).append(i)
    if troubled:
        return "; ".join(f"{name_ranks(ranks)}: {problem}" for problem, ranks in troubled.items())
    parts = []
    for name in given[0][1]:
        by_value: dict[str, list[int]] = {}
        for i, (_, facts) in enumerate(given):
            value = facts.get(name)
            by_value.setdefault(value if isinstance(value, str) else repr(value), []).append(i)
        if len(by_value) > 1:
            shown = ", ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in by_value.items())
            parts.append(f"{name} must be the same on every rank, got {shown}")
    return "; ".join(parts)


def name_ranks(ranks: list[int]) -> str:
    """``rank 1``, ``ranks 1, 2``: for messages; the first eight by number."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _control_group() -> dist.ProcessGroup:
    """A group of CPUs with the ranks of the default one; made by all of them, at their first agreement."""
    default = dist.group.WORLD
    assert default is not None
    if default not in _control:
        _control[default] = None if dist.get_backend(default) == "gloo" else _gloo_group()
    return _control[default] or default


def _gloo_group() -> dist.ProcessGroup:
    with reachable_interface():
        return dist.new_group(backend="gloo", timeout=PATIENCE)  # type: ignore[return-value]  # all are in it
