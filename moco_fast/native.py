"""The native backend: from tensors to pointers. The only user of the compiled module ``_C``."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_fast import reference

_C: Any
try:
    # torch is imported above, so that both share one OpenMP runtime.
    from moco_fast import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _C = None
    _import_error = str(error)

# torch >= 2.10 lets the compiled module read a list of tensors in one pass.
_READS_TENSORS = (
    _C is not None
    and hasattr(Tensor, "__dlpack_c_exchange_api__")
    and _C.read_tensors_through(Tensor.__dlpack_c_exchange_api__)
)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# Dtypes of target and source that have a kernel together: float64 mixes with no other.
EMA_DTYPES = {
    (target, source) for target in range(4) for source in range(4) if (target == 3) == (source == 3)
}

OPS = ("info_nce", "ema_update_", "enqueue_")  # that have a kernel here

FP32: Any = {"dtype": torch.float32, "device": "cpu"}

# Queue rows per tile of the bf16 path: 2 MB of similarities at N = 256, and products large enough for oneDNN.
BF16_TILE = 2048
_bf16_lock = threading.Lock()


def build_info() -> dict:
    """What the installation built and why, as recorded by setup.py; empty if it recorded nothing."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def unavailable() -> str | None:
    """Why the compiled module is missing, or None if it is there."""
    if _C is not None:
        return None
    return build_info().get("why") or f"moco_fast._C cannot be imported ({_import_error})"


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cannot_serve(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why this backend cannot run ``op`` on the tensors, or None if it can."""
    if _C is None:
        return unavailable()
    if op not in OPS:
        return f"it has no {op} kernel"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {tensor.device}"
        if tensor.dtype not in DTYPES or (tensor.dtype == torch.float64 and op != "ema_update_"):
            return f"it has no {tensor.dtype} kernel"
    return None


def pair_up(targets: list, sources: list) -> bool:
    """Whether both lists certainly hold floating-point tensors of pairwise equal shapes on one device.

    False may also mean that this cannot tell, so the caller looks for itself.
    """
    return _READS_TENSORS and not torch.compiler.is_compiling() and _C.tensors_pair_up(targets, sources)


def info_nce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, precision: str, need_dq: bool, need_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.info_nce`."""
    q, k, queue = q.contiguous(), k.contiguous(), queue.contiguous()
    if precision == "medium" and has_bf16_units():
        return _info_nce_bf16(q, k, queue, temperature, need_dq, need_stats)
    n, features = q.shape
    # Options are spelled out: torch's default dtype and device are the user's to change.
    loss, pos, neg = (torch.empty(n, **FP32) for _ in range(3))
    rank = torch.empty(n, dtype=torch.int64, device="cpu")
    dq = torch.empty(n if need_dq else 0, features, **FP32)
    _C.info_nce(
        q.data_ptr(), k.data_ptr(), DTYPES[q.dtype], queue.data_ptr(), DTYPES[queue.dtype],
        n, queue.shape[0], features, temperature,
        loss.data_ptr(), dq.data_ptr() if need_dq else 0, rank.data_ptr(), pos.data_ptr(), neg.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    stats = slice(None if need_stats else 0)
    return loss, dq, rank[stats], pos[stats], neg[stats]


def _info_nce_bf16(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, need_dq: bool, need_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same tile by tile, with the products in torch's GEMM, whose bf16 kernels use the matrix units.

    Operands are rounded to bf16 inside the GEMM; sums and everything else stay fp32.
    """
    q_hat, norm = reference.normalise(q.float())
    k_hat, _ = reference.normalise(k.float())
    n, features = q.shape
    negatives, threads = queue.shape[0], torch.get_num_threads()
    pos = (q_hat * k_hat).sum(dim=1)
    top = pos.clone()
    total, cosine_sum, loss, neg = (torch.zeros(n, **FP32) for _ in range(4))
    rank = torch.zeros(n, dtype=torch.int64, device="cpu")
    weighted = torch.zeros(n if need_dq else 0, features, **FP32)
    dq = torch.empty_like(weighted)
    weighted_ptr, dq_ptr = (weighted.data_ptr(), dq.data_ptr()) if need_dq else (0, 0)

    with _gemm_in_bf16():
        for rows in queue.split(BF16_TILE):
            rows = rows.float()
            tile = q_hat @ rows.t()
            _C.info_nce_tile(
                tile.data_ptr(), n, rows.shape[0], features, temperature, pos.data_ptr(), top.data_ptr(),
                total.data_ptr(), cosine_sum.data_ptr(), rank.data_ptr(), weighted_ptr, threads,
            )  # fmt: skip
            if need_dq:
                weighted.addmm_(tile, rows)
    _C.info_nce_finish(
        top.data_ptr(), total.data_ptr(), cosine_sum.data_ptr(), pos.data_ptr(), weighted_ptr,
        q_hat.data_ptr(), k_hat.data_ptr(), norm.data_ptr(), n, negatives, features, temperature,
        loss.data_ptr(), dq_ptr, neg.data_ptr(), threads,
    )  # fmt: skip
    stats = slice(None if need_stats else 0)
    return loss, dq, rank[stats], pos[stats], neg[stats]


@contextmanager
def _gemm_in_bf16() -> Iterator[None]:
    """Let oneDNN round the operands of fp32 matrix products to bf16, where the CPU has units for it.

    The setting is the process's: calls from several threads wait for each other, so that each restores
    what it found.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _bf16_lock:
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


def ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], m: Tensor) -> None:
    """See :func:`moco_fast.reference.ema_update_`."""
    if _READS_TENSORS and _C.ema_update_tensors(targets, sources, float(m), torch.get_num_threads()):
        return
    kinds = [
        (DTYPES.get(target.dtype), DTYPES.get(source.dtype)) if _one_stretch(target, source) else None
        for target, source in zip(targets, sources, strict=True)
    ]
    if not EMA_DTYPES.issuperset(kinds):  # some pairs are left to the reference
        rest = [i for i, kind in enumerate(kinds) if kind not in EMA_DTYPES]
        reference.ema_update_([targets[i] for i in rest], [sources[i] for i in rest], m)
        keep = [i for i, kind in enumerate(kinds) if kind in EMA_DTYPES]
        targets, sources = [targets[i] for i in keep], [sources[i] for i in keep]
        kinds = [kinds[i] for i in keep]
    if kinds:
        # map() over methods: for a hundred small parameters these lists cost as much as the update.
        _C.ema_update(
            list(map(Tensor.data_ptr, targets)),
            list(map(Tensor.data_ptr, sources)),
            list(map(Tensor.numel, targets)),
            *zip(*kinds, strict=True),
            float(m),
            torch.get_num_threads(),
        )


def _one_stretch(target: Tensor, source: Tensor) -> bool:
    """Whether both tensors fill one stretch of memory, in the same order."""
    if target.is_contiguous() and source.is_contiguous():
        return True
    return (
        target.ndim == 4
        and target.is_contiguous(memory_format=torch.channels_last)
        and source.is_contiguous(memory_format=torch.channels_last)
    )


def enqueue_(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    """See :func:`moco_fast.reference.enqueue_`."""
    if not queue.is_contiguous():
        return reference.enqueue_(queue, ptr, keys)
    keys = keys.contiguous()
    _C.enqueue(
        queue.data_ptr(), DTYPES[queue.dtype], *queue.shape, ptr.data_ptr(),
        keys.data_ptr(), DTYPES[keys.dtype], keys.shape[0], torch.get_num_threads(),
    )  # fmt: skip
