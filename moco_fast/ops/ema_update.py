"""The momentum (EMA) update of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moco_fast import backends, checks
from moco_fast.ops import arguments, library


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor],  # any shapes, one device
    sources: Sequence[Tensor],  # same shapes and order
    m: float | Tensor,
    *,
    masters: Sequence[Tensor] | None = None,
) -> None:
    """Move every target towards its source, in place: ``target <- m * target + (1 - m) * source``.

    A bf16 target stalls at m = 0.999: the step is smaller than half a unit in its last place. With
    ``masters`` the average is kept in fp32: ``master <- m * master + (1 - m) * source``,
    ``target <- master``, rounded.
    Source: He et al. 2020, "Momentum Contrast", equation 2.

    Args:
        targets: tensors to write, of any shapes, floating-point, without grad, on one device.
        sources: tensors to read, of the same shapes and in the same order.
        m: momentum in [0, 1]; a 0-d tensor stays on its device and is not read back, so that a captured
            CUDA graph sees it change.
        masters: float32 copies of the targets, written too; for targets of at most that precision.

    Raises:
        TypeError: not a floating-point tensor, m is not a number, or a master is not float32.
        ValueError: lengths, shapes or devices do not match, m outside [0, 1], a target or master requires
            grad.

    Example:
        >>> moco_fast.ema_update_(list(encoder_k.parameters()), list(encoder_q.parameters()), 0.999)
    """
    targets, sources = list(targets), list(sources)
    arguments.ema_update(targets, sources)
    averages = [] if masters is None else list(masters)
    if masters is not None:
        arguments.ema_masters(targets, averages)
    if not isinstance(m, Tensor):
        m = torch.tensor(checks.fraction("m", m), dtype=torch.float64, device="cpu")
    if targets:
        checks.scalar_tensor("m", m, "targets[0]", targets[0])
        _ema_update_(targets, sources, m, averages)


@library.op("ema_update_", mutates=("targets", "masters"))
def _ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], m: Tensor, masters: Sequence[Tensor]
) -> None:
    if m.device.type == "cpu":
        checks.fraction("m", m.item())
    # One tensor decides: all share a device, and a backend leaves pairs of odd dtypes to the reference.
    backends.choose("ema_update_", targets[:1]).ema_update_(targets, sources, m, masters)
