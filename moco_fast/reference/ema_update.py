"""The momentum (EMA) update of parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moco_fast.reference.common import compute_dtype


def ema_update_(
    targets: Sequence[Tensor],  # any shapes
    sources: Sequence[Tensor],  # same shapes and order
    m: Tensor,  # () on the CPU or on the tensors' device
    masters: Sequence[Tensor] = (),  # fp32, one per target, or none at all
) -> None:
    """``target <- m * target + (1 - m) * source`` for every pair, in place.

    With masters ``master <- m * master + (1 - m) * source`` and ``target <- master``, rounded.
    """
    for state, target, source in zip(masters or targets, targets, sources, strict=True):
        dtype = compute_dtype(state, source)
        # (1 - m) is rounded once, from the precision m came in, as a Python scalar would be.
        keep, take = m.to(dtype), (1 - m).to(dtype)
        state.copy_(state.to(dtype) * keep + source.to(dtype) * take)
        if state is not target:
            target.copy_(state)
