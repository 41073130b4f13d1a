"""What is compared: a case is one op at one size, a peer one way to compute it.

A peer is checked against float64 before it is timed; one that is wrong is
never timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import moco_fast
from moco_fast import backends

OURS = "moco_fast"  # the names of our own peers begin with it
NATIVE, REFERENCE, OFFICIAL = f"{OURS} native", f"{OURS} reference", "official formula"
BY_HAND = "by hand, no autograd"  # eager PyTorch with the gradient written out
PAIRS = "3 x fp16"  # product of operands that come as pairs of fp16: three in place of one


class WrongResult(RuntimeError):
    """One of our own ways, or the official one, differs from float64 by more than rounding explains."""


class Absent(RuntimeError):
    """Somebody else's way does not run here, or not rightly; says why."""


def trusted(name: str) -> bool:
    """Whether a peer is ours or the official formula, which have to be right."""
    return name.startswith(OURS) or name == OFFICIAL


def reason(error: Exception) -> str:
    """What an error says, in a line; its type too, unless it is one of ours."""
    told = (str(error).strip() or "no reason given").split("\n")[0][:200]
    return told if isinstance(error, WrongResult | Absent) else f"{type(error).__name__}: {told}"


@dataclass(frozen=True)
class Peer:
    """One way to compute the op of a case."""

    run: Callable[[], object]  # the call that is timed
    errors: Callable[[], dict[str, float]]  # runs it once more; relative errors against float64, by name
    # The largest error that still counts as rounding; eager fp32 reaches 1.4e-5 on clustered features.
    tolerance: float = 1e-4
    product: str = "fp32"  # operands of its matrix products: which rate bounds it
    bytes: float | None = None  # what it must move at least, where its inputs are not those of the case


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: the public name of the op.
        label: its sizes, for people.
        peers: by name; :data:`OFFICIAL` is always there.
        absent: peers that cannot run here, and why.
        flops: floating-point operations of the formula, exponentials not counted.
        bytes: the least it must move to and from memory.
    """

    op: str
    label: str
    peers: dict[str, Peer]
    flops: float
    bytes: float
    absent: dict[str, str] = field(default_factory=dict)

    def own(self) -> Case:
        """The same without other people's ways."""
        peers = {name: peer for name, peer in self.peers.items() if trusted(name)}
        absent = {name: why for name, why in self.absent.items() if trusted(name)}
        return replace(self, peers=peers, absent=absent)

    def check(self, name: str) -> dict[str, float]:
        """Return the errors of a peer against float64.

        Raises:
            WrongResult: ours or the official formula, with an error above its tolerance, or NaN.
            Absent: any other peer that fails or is wrong: not installed, no compiler, no such hardware.
        """
        peer = self.peers[name]
        try:
            errors = peer.errors()
        except Exception as error:  # of other people's libraries and of compilers: any type
            if trusted(name):
                raise
            raise Absent(reason(error)) from error
        for what, error in errors.items():
            if not error <= peer.tolerance:
                found = f"{what} {error:.1e} against float64, expected at most {peer.tolerance:.0e}"
                raise (WrongResult if trusted(name) else Absent)(f"its result is wrong: {found}")
        return errors


def serving(op: str, tensors: Sequence[Tensor]) -> tuple[list[str], dict[str, str]]:
    """Backends that serve ``op`` on the tensors; and, by the names of their peers, why the others do not."""
    names, absent = [], {}
    for name in backends.BACKENDS:
        if name == "triton" and tensors[0].device.type == "cpu":  # its interpreter is for tests
            absent[f"{OURS} {name}"] = "it runs on the GPU"
            continue
        try:
            with moco_fast.use_backend(name):
                served = hasattr(backends.choose(op, tensors), op)
        except RuntimeError as error:
            absent[f"{OURS} {name}"] = str(error).partition(f"cannot serve {op}: ")[2] or str(error)
            continue
        if served:
            names.append(name)
        else:
            absent[f"{OURS} {name}"] = f"it has no {op}"
    return names, absent


def bind(run: Callable, errors: Callable[[Callable], dict[str, float]], *inputs: object, **options) -> Peer:
    """A peer that times ``run(*inputs)`` and is judged by ``errors(run)``."""
    return Peer(partial(run, *inputs), partial(errors, run), **options)


def relative(
    got: Tensor,  # any shape
    want: Tensor,  # same shape, float64
) -> float:
    """``|got - want| / |want|`` in float64."""
    return float(torch.linalg.vector_norm(got.double() - want) / torch.linalg.vector_norm(want))
