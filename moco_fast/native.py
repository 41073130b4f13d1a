"""The native backend: from tensors to pointers. The only user of the compiled module ``_C``."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_fast import reference
from moco_fast.kernels import backend as triton
from moco_fast.kernels import info_nce_sweep as sweep

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

# Ops over lists of tensors, the optimizers' steps among them: kernels for CPU and GPU, also in float64.
MULTI_TENSOR = ("ema_update_", "sgd_", "adamw_")
ROWS = ("take_rows",)  # of any dtype: bytes are moved, not numbers
OPS = ("info_nce", "contrast", "nt_xent", "dino", "enqueue_", *ROWS, *MULTI_TENSOR, "split_batch_norm")
# Ops whose CUDA kernel this backend launches only where it is forced; kernels/info_nce_sweep.py says when
# Triton's launcher takes it.
ON_REQUEST = ("info_nce",)

# Device types as DLPack numbers them.
DEVICES = {"cpu": 1, "cuda": 2}

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
    """Whether this CPU has matrix units for bf16 (AMX).

    AVX512-BF16 multiplies vectors: on Zen 4 the path through them took 1.1 to 2.1 times as long as fp32.
    """
    return torch.cpu._is_amx_tile_supported()


def cannot_serve(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why this backend cannot run ``op`` on the tensors, or None if it can."""
    if _C is None:
        return unavailable()
    if op not in OPS:
        return f"it has no {op} kernel"
    for tensor in tensors:
        kind = tensor.device.type
        if kind == "cuda" and op in (*MULTI_TENSOR, "info_nce"):
            if reason := _gpu_lacks(tensor.device) or (op == "info_nce" and sweep.lacks(tensor)):
                return reason
        elif kind != "cpu":
            return f"it runs on the CPU, the tensors are on {tensor.device}"
        if op in ROWS:
            continue
        if tensor.dtype not in DTYPES or (tensor.dtype == torch.float64 and op not in MULTI_TENSOR):
            return f"it has no {tensor.dtype} kernel"
    return None


@cache
def _gpu_lacks(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on a GPU, or None if they can."""
    if not _C.has_cuda or torch.version.cuda is None:
        return f"it was built without CUDA, the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its CUDA kernels want compute capability 8.0, {device} has {major}.{minor}"
    if not _C.cuda_devices():
        return "its CUDA runtime finds no GPU: the driver is older than the toolkit it was built with"
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
    if q.is_cuda:
        sweep.check_queue(queue, precision)
        return triton.info_nce(q, k, queue, temperature, precision, need_dq, need_stats, by_hand=True)
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


def info_nce_sweep(
    q: Tensor,  # (N, C) raw
    k: Tensor,  # (N, C) raw, of the same dtype
    queue: Tensor,  # (K, C) fp16 or bf16
    pairs: Sequence[Tensor],  # |q|, |k| and their cosine, (N,)
    found: Sequence[Tensor],  # sums (SHARES, N, C), totals, shifts, and if wanted cosines, ranks (SHARES, N)
    steps: int,  # tiles per share
    numbers: tuple[float, float, float],  # scale, fixed shift, offset
    online: bool,
) -> None:
    """Queue the kernel of csrc/info_nce_sweep.h, which writes ``pairs`` and ``found``."""
    about, written = ([tensor.data_ptr() for tensor in group] for group in (pairs, found))
    _C.info_nce_sweep(
        (q.data_ptr(), k.data_ptr(), DTYPES[q.dtype], queue.data_ptr(), DTYPES[queue.dtype]),
        tuple(about), (*written, 0, 0)[:5],
        (len(q), *queue.shape, len(found[0]), steps), numbers, online, q.device.index, _stream(q.device),
    )  # fmt: skip


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


def contrast(
    q: Tensor, k: Tensor, temperature: float, labels: int, precision: str, need_dq: bool, need_dk: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.contrast`."""
    q, k = q.contiguous(), k.contiguous()
    problems, queries, features = q.shape
    keys = k.shape[1]
    loss = torch.empty(problems, queries, **FP32)
    dq = torch.empty(problems, queries if need_dq else 0, features, **FP32)
    dk = torch.empty(problems, keys if need_dk else 0, features, **FP32)
    _C.contrast(
        q.data_ptr(), k.data_ptr(), DTYPES[q.dtype], problems, queries, keys, features, labels, temperature,
        loss.data_ptr(), dq.data_ptr() if need_dq else 0, dk.data_ptr() if need_dk else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return loss, dq, dk


def nt_xent(z: Tensor, temperature: float, precision: str, need_dz: bool) -> tuple[Tensor, Tensor]:
    """See :func:`moco_fast.reference.nt_xent`."""
    z = z.contiguous()
    rows, features = z.shape
    loss = torch.empty(rows, **FP32)
    dz = torch.empty(rows if need_dz else 0, features, **FP32)
    _C.nt_xent(
        z.data_ptr(), DTYPES[z.dtype], rows, features, temperature,
        loss.data_ptr(), dz.data_ptr() if need_dz else 0, torch.get_num_threads(),
    )  # fmt: skip
    return loss, dz


def dino(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    precision: str,
    need_ds: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.dino`."""
    student, teacher, center = student.contiguous(), teacher.contiguous(), center.contiguous()
    prototypes, teacher_prototypes = prototypes.contiguous(), teacher_prototypes.contiguous()
    sizes = (rows, count, features) = len(student), *prototypes.shape
    loss = torch.empty(rows, **FP32)
    ds = torch.empty(rows if need_ds else 0, features, **FP32)
    dw = torch.empty(count if need_dw else 0, features, **FP32)
    _C.dino(
        (student.data_ptr(), teacher.data_ptr(), DTYPES[student.dtype]),
        *((w.data_ptr(), DTYPES[w.dtype]) for w in (prototypes, teacher_prototypes)),
        center.data_ptr(), sizes, (student_temperature, teacher_temperature),
        (loss.data_ptr(), ds.data_ptr() if need_ds else 0, dw.data_ptr() if need_dw else 0),
        torch.get_num_threads(),
    )  # fmt: skip
    return loss, ds, dw


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], m: Tensor, masters: Sequence[Tensor] = ()
) -> None:
    """See :func:`moco_fast.reference.ema_update_`."""
    device = targets[0].device
    if m.is_cuda and device.type != "cuda":
        m = m.cpu()
    if m.is_cuda and m.dtype not in (torch.float32, torch.float64):
        m = m.double()
    roles = [list(targets), list(sources), *([list(masters)] if masters else [])]
    rows, rest = _rows(roles, device)
    if rest:
        left, taken, *averages = _take(roles, rest)
        reference.ema_update_(left, taken, m, *averages)
    _C.ema_update(rows, _scalar(m), torch.get_num_threads(), _stream(device))


def _rows(
    roles: list[list],  # of tensors or None, one list per role
    device: torch.device,
    *,
    uniform: bool = False,
    steps: list[Tensor] | None = None,  # one more role, of 0-d float32 tensors
) -> tuple[Any, list[int]]:
    """Addresses of tensors that belong together, row by row, and the indices of rows without a kernel.

    A kernel takes tensors that each fill one stretch of memory, in the same order, of dtypes that mix:
    float64 with float64 only, or one dtype for all if ``uniform``.
    """
    where = DEVICES[device.type], device.index or 0
    if _READS_TENSORS:
        return _C.read_tensors(roles, uniform, *where, steps)
    good: list[int] = []
    rest: list[int] = []
    for i, row in enumerate(zip(*roles, strict=True)):
        (good if _fits([t for t in row if t is not None], device, uniform) else rest).append(i)
    kept = _take(roles if steps is None else [*roles, steps], good)
    addresses = [[0 if t is None else t.data_ptr() for t in role] for role in kept]
    dtypes = [[0 if t is None else DTYPES[t.dtype] for t in role] for role in kept]
    return _C.Rows(addresses, [t.numel() for t in kept[0]], dtypes, *where), rest


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor] | list[None],
    keys: list[Tensor | None],
    lr: float | Tensor,
    m: float | Tensor,
    step: reference.SgdStep,
) -> None:
    """See :func:`moco_fast.reference.sgd_`."""
    device = params[0].device
    roles: list[list] = [params, grads, buffers, keys]
    rows, rest = _rows(roles, device, uniform=True)
    if rest:
        left, with_grads, with_buffers, with_keys = _take(roles, rest)
        reference.sgd_(left, with_grads, with_buffers, with_keys, lr, m, step)
    scratch = torch.empty(_C.sgd_scratch(rows) if step.trust else 0, dtype=torch.float64, device=device)
    _C.sgd_step(
        rows, tuple(step), _scalar(lr), _scalar(m), scratch.data_ptr(),
        torch.get_num_threads(), _stream(device),
    )  # fmt: skip


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    keys: list[Tensor | None],
    lr: float | Tensor,
    m: float | Tensor,
    step: reference.AdamwStep,
) -> None:
    """See :func:`moco_fast.reference.adamw_`."""
    device = params[0].device
    roles: list[list] = [params, grads, averages, squares, keys]
    rows, rest = _rows(roles, device, uniform=True, steps=steps)
    if rest:
        left, with_grads, means, spreads, with_keys, counts = _take([*roles, steps], rest)
        reference.adamw_(left, with_grads, means, spreads, counts, with_keys, lr, m, step)
    _C.adamw_step(rows, tuple(step), _scalar(lr), _scalar(m), torch.get_num_threads(), _stream(device))


def _fits(tensors: list[Tensor], device: torch.device, uniform: bool) -> bool:
    """Whether a kernel takes these tensors together."""
    dtypes = {tensor.dtype for tensor in tensors}
    return (
        dtypes <= DTYPES.keys()
        and (len(dtypes) == 1 or not (uniform or torch.float64 in dtypes))
        and all(tensor.device == device and tensor.shape == tensors[0].shape for tensor in tensors)
        and (
            all(tensor.is_contiguous() for tensor in tensors)
            or (
                tensors[0].ndim == 4
                and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
            )
        )
    )


def _take(roles: list[list], indices: list[int]) -> list[list]:
    """The given rows of every role."""
    return [[role[i] for i in indices] for role in roles]


def _scalar(x: float | Tensor) -> tuple[float, int, int]:
    """A number as the kernels take it: its value, or where it is on a GPU and as which dtype."""
    if isinstance(x, Tensor) and x.is_cuda:
        return 0.0, x.data_ptr(), DTYPES[x.dtype]
    return float(x), 0, DTYPES[torch.float64]


def _stream(device: torch.device) -> int:
    """The address of torch's current stream on a GPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def enqueue_(
    queue: Tensor, ptr: Tensor, keys: Tensor, mirror: Tensor | None = None, order: Tensor | None = None
) -> None:
    """See :func:`moco_fast.reference.enqueue_`."""
    if mirror is not None or not queue.is_contiguous():  # on a CPU nothing reads a mirror
        return reference.enqueue_(queue, ptr, keys, mirror, order)
    keys = keys.contiguous()
    order = None if order is None else order.contiguous()
    _C.enqueue(
        queue.data_ptr(), DTYPES[queue.dtype], *queue.shape, ptr.data_ptr(),
        keys.data_ptr(), DTYPES[keys.dtype], keys.shape[0], 0 if order is None else order.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """See :func:`moco_fast.reference.take_rows`."""
    out, index = reference.empty_rows(x, index.shape[0]), index.contiguous()
    _C.take_rows(
        x.data_ptr(), x[0].numel() * x.element_size(), index.data_ptr(), index.shape[0], out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def split_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, splits: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.split_batch_norm`."""
    x, shape = _parts(x, splits)
    weight, bias = _in_fp32(weight), _in_fp32(bias)
    y, mean, var = torch.empty_like(x), *(torch.empty(splits, shape[2], **FP32) for _ in range(2))
    _C.split_batch_norm(
        shape, DTYPES[x.dtype], x.data_ptr(), _address(weight), _address(bias), eps,
        y.data_ptr(), mean.data_ptr(), var.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, var


def split_batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.split_batch_norm_backward`."""
    x, shape = _parts(x, len(mean))
    dy, weight = reference.like(dy, x), _in_fp32(weight)
    dx, dw, db = torch.empty_like(x), *(torch.empty(shape[2], **FP32) for _ in range(2))
    _C.split_batch_norm_backward(
        shape, DTYPES[x.dtype], dy.data_ptr(), x.data_ptr(), _address(weight), mean.data_ptr(),
        var.data_ptr(), eps, dx.data_ptr(), dw.data_ptr(), db.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dw, db


def _parts(x: Tensor, splits: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """A dense tensor, and its parts, rows of each, channels and run as it lies in memory."""
    x = reference.dense(x)
    rows, run = reference.runs(x)
    return x, (splits, rows // splits, x.shape[1], run)


def _in_fp32(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
