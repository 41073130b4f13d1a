"""Every op in plain PyTorch: oracle of the tests, baseline of the benchmarks, fallback on any device.

Each function has the contract that every backend has to meet: arguments
already checked, arithmetic in fp32 (float64 if an operand is float64), nothing
read back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-12  # smallest norm a row is divided by, as in torch.nn.functional.normalize


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or float64 if a tensor is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def normalise(
    x: Tensor,  # (..., C)
) -> tuple[Tensor, Tensor]:
    """Return ``x / max(|x|, EPS)`` row by row, and the norms (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(EPS), norm


def _through_norm(
    d_hat: Tensor,  # (..., C) gradient to x_hat
    x_hat: Tensor,  # (..., C)
    norm: Tensor,  # (..., 1)
) -> Tensor:
    """The gradient to the rows whose normalised selves are ``x_hat``."""
    radial = (x_hat * d_hat).sum(dim=-1, keepdim=True)
    # A norm below EPS was clamped to a constant, through which no gradient flows.
    return (d_hat - torch.where(norm >= EPS, radial * x_hat, 0)) / norm.clamp_min(EPS)


def _cross_entropy(
    positive: Tensor,  # (...) logit of the positive
    negatives: Tensor,  # (..., K) logits of the negatives, -inf for none
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (...), exps (..., K) and total (...), whose ratio is p of the negatives, and 1 - p_0 (...)."""
    top = torch.maximum(negatives.amax(dim=-1), positive)
    exps = torch.exp(negatives - top[..., None])
    rest, e = exps.sum(dim=-1), torch.exp(positive - top)
    # log1p keeps the digits of a loss near zero, where the positive dominates.
    loss = torch.where(e == 1, torch.log1p(rest), torch.log(rest + e) + top - positive)
    return loss, exps, rest + e, rest / (rest + e)


def info_nce(
    q: Tensor,  # (N, C), raw
    k: Tensor,  # (N, C), raw
    queue: Tensor,  # (K, C), rows of unit norm
    temperature: float,
    precision: str,  # the least a backend must deliver; fp32 satisfies all
    need_dq: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """InfoNCE of each query and its gradient, in one forward.

    With ``s_0 = q^.k^ / T`` and ``s_j = q^.n_j / T``::

        loss = logsumexp(s_0, ..., s_K) - s_0
        dq^  = (sum_j p_j n_j - (1 - p_0) k^) / T,   p = softmax(s)
        dq   = (dq^ - q^ (q^.dq^)) / |q|

    Source: He et al. 2020, "Momentum Contrast", equation 1.

    Returns:
        loss (N,), dq (N, C) or (0, C), and (0,) each unless ``need_stats``: rank (N,) int64 = negatives
        above the positive, pos (N,) = q^.k^, neg (N,) = mean of q^.n_j.
    """
    dtype = compute_dtype(q, k, queue)
    q_hat, norm = normalise(q.to(dtype))
    k_hat, _ = normalise(k.to(dtype))
    rows = queue.to(dtype)

    pos = (q_hat * k_hat).sum(dim=1)
    similarities = q_hat @ rows.t()  # (N, K)
    neg = similarities.mean(dim=1)
    stats = slice(None if need_stats else 0)
    rank = (similarities > pos[:, None]).sum(dim=1)[stats]

    loss, exps, total, miss = _cross_entropy(pos / temperature, similarities / temperature)
    # exp(-inf) = 0 would swallow a queue row with an infinite feature; its mean similarity does not.
    loss = loss + 0 * neg

    if not need_dq:
        return loss, q.new_empty((0, q.shape[1]), dtype=dtype), rank, pos[stats], neg[stats]
    dq_hat = ((exps / total[:, None]) @ rows - miss[:, None] * k_hat) / temperature
    return loss, _through_norm(dq_hat, q_hat, norm), rank, pos[stats], neg[stats]


def nt_xent(
    z: Tensor,  # (2N, C), raw: view 1 of every image, then view 2
    temperature: float,
    precision: str,  # the least a backend must deliver; fp32 satisfies all
    need_dz: bool,
) -> tuple[Tensor, Tensor]:
    """NT-Xent of every view and the gradient of their sum, in one forward.

    With ``s_ij = z^_i.z^_j / T`` and i' the other view of i::

        loss_i = logsumexp_{j != i}(s_ij) - s_ii',    p_i = softmax_{j != i}(s_i)
        dz^_i  = (sum_{j != i, i'} (p_ij + p_ji) z^_j - (2 - p_ii' - p_i'i) z^_i') / T
        dz_i   = (dz^_i - z^_i (z^_i.dz^_i)) / |z_i|

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of
    Visual Representations", equation 1.

    Returns:
        loss (2N,), dz (2N, C) or (0, C): of the sum of the losses.
    """
    dtype = compute_dtype(z)
    z_hat, norm = normalise(z.to(dtype))
    rows = z.shape[0]
    other_hat = z_hat.roll(rows // 2, 0)
    index = torch.arange(rows, device=z.device)
    logits = z_hat @ z_hat.t() / temperature
    logits[index, index] = -torch.inf
    logits[index, index.roll(rows // 2)] = -torch.inf
    loss, exps, total, miss = _cross_entropy((z_hat * other_hat).sum(dim=1) / temperature, logits)
    if not need_dz:
        return loss, loss.new_empty((0, z.shape[1]))
    p = exps / total[:, None]
    dz_hat = ((p + p.t()) @ z_hat - (miss + miss.roll(rows // 2))[:, None] * other_hat) / temperature
    return loss, _through_norm(dz_hat, z_hat, norm)


def contrast(
    q: Tensor,  # (D, N, C), raw
    k: Tensor,  # (D, M, C), raw, M >= N
    temperature: float,
    labels: int,  # the positive of query i is key labels + i
    precision: str,  # the least a backend must deliver; fp32 satisfies all
    need_dq: bool,
    need_dk: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of queries against the keys of a batch and its gradients, for D problems side by side.

    With ``s_ij = q^_i.k^_j / T``, ``y_i = labels + i`` and p_i = softmax(s_i)::

        loss_i = logsumexp_j(s_ij) - s_iy
        dq^_i  = (sum_{j != y} p_ij k^_j - (1 - p_iy) k^_y) / T
        dk^_j  = (sum_{i: y_i != j} p_ij q^_i - sum_{i: y_i = j} (1 - p_ij) q^_i) / T

    and the gradients to q and k through their norms as in :func:`info_nce`.

    Source: Chen et al. 2021, "An Empirical Study of Training Self-Supervised
    Vision Transformers", algorithm 1, without its factor 2T.

    Returns:
        loss (D, N), and of the sum of the losses dq (D, N, C) or (D, 0, C), dk (D, M, C) or (D, 0, C).
    """
    dtype = compute_dtype(q, k)
    q_hat, q_norm = normalise(q.to(dtype))
    k_hat, k_norm = normalise(k.to(dtype))
    problems, rows, features = q.shape
    index = torch.arange(rows, device=q.device)
    own = slice(labels, labels + rows)
    logits = q_hat @ k_hat.mT / temperature  # (D, N, M)
    logits[:, index, index + labels] = -torch.inf
    positive = (q_hat * k_hat[:, own]).sum(dim=2) / temperature
    loss, exps, total, miss = _cross_entropy(positive, logits)
    dq, dk = (loss.new_empty((problems, 0, features)) for _ in range(2))
    p = exps / total[..., None] if need_dq or need_dk else exps
    if need_dq:
        dq_hat = (p @ k_hat - miss[..., None] * k_hat[:, own]) / temperature
        dq = _through_norm(dq_hat, q_hat, q_norm)
    if need_dk:
        dk_hat = p.mT @ q_hat
        dk_hat[:, own] -= miss[..., None] * q_hat
        dk = _through_norm(dk_hat / temperature, k_hat, k_norm)
    return loss, dq, dk


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


def enqueue_(
    queue: Tensor,  # (K, C)
    ptr: Tensor,  # (1,) int64
    keys: Tensor,  # (N, C), raw, N <= K
    mirror: Tensor | None = None,  # (K, C)
    order: Tensor | None = None,  # (N,) int64
) -> None:
    """Write the normalised keys in ``order`` to rows ``ptr, ptr + 1, ...`` modulo K, advance ``ptr``."""
    slots, count = queue.shape[0], keys.shape[0]
    if order is not None:
        keys = keys.index_select(0, order)
    rows, _ = normalise(keys.to(compute_dtype(queue, keys)))
    index = (ptr + torch.arange(count, device=queue.device)) % slots
    queue.index_copy_(0, index, rows.to(queue.dtype))
    if mirror is not None:
        mirror.index_copy_(0, index, rows.to(mirror.dtype))
    ptr.copy_((ptr + count) % slots)


def take_rows(
    x: Tensor,  # (R, ...)
    index: Tensor,  # (M,) int64
) -> Tensor:
    """``x[index]``, (M, ...), in the memory format of ``x``."""
    out = empty_rows(x, index.shape[0])
    torch.index_select(flat_rows(x), 0, index, out=flat_rows(out))
    return out


def is_channels_last(x: Tensor) -> bool:
    """Whether every row of ``x`` is one stretch of memory with the channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.ndim])


def flat_rows(
    x: Tensor,  # (R, ...) contiguous or channels_last
) -> Tensor:
    """The rows as they lie in memory, (R, values): a view."""
    return (x.movedim(1, -1) if is_channels_last(x) else x).view(x.shape[0], x.shape[1:].numel())


def empty_rows(x: Tensor, count: int) -> Tensor:
    """Memory for ``count`` rows such as those of ``x``, in its memory format."""
    shape = (count, *x.shape[1:])
    if is_channels_last(x):
        return x.new_empty((count, *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty(shape)


class SgdStep(NamedTuple):
    """Numbers of a step of SGD or LARS, in the order the kernels take them."""

    momentum: float
    dampening: float
    weight_decay: float
    trust: float  # LARS's trust coefficient; 0 for SGD
    nesterov: bool
    maximize: bool
    first: bool  # the buffers hold nothing yet


class AdamwStep(NamedTuple):
    """Numbers of a step of AdamW, in the order the kernels take them."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor] | list[None],  # None without momentum
    keys: list[Tensor | None],
    lr: float | Tensor,  # a tensor is 0-d, on the CPU or beside the parameters; so is m
    m: float | Tensor,
    step: SgdStep,
) -> None:
    """One step of SGD or LARS, and the EMA of the parameters that have a key, in place::

        d = -grad if maximize else grad
        d = d + weight_decay * param
        d = d * trust * |param| / |d|           LARS, where both norms are above 0
        buffer = d if first else momentum * buffer + (1 - dampening) * d
        d = d + momentum * buffer if nesterov else buffer
        param = param - lr * d
        key = m * key + (1 - m) * param

    Source: torch.optim.SGD; You et al. 2017, "Large Batch Training of Convolutional Networks".
    """
    values, updates = _widened(params), _widened(grads)
    if step.maximize:
        updates = list(torch._foreach_neg(updates))
    if step.weight_decay:
        updates = list(torch._foreach_add(updates, values, alpha=step.weight_decay))
    if step.trust:
        sizes, lengths = torch._foreach_norm(values), torch._foreach_norm(updates)
        updates = [
            d * torch.where((p > 0) & (n > 0), step.trust * p / n, 1).to(d.dtype)
            for d, p, n in zip(updates, sizes, lengths, strict=True)
        ]
    if step.momentum:
        held = [buffer for buffer in buffers if buffer is not None]
        if step.first:
            state = updates
        else:
            state = _widened(held)
            torch._foreach_mul_(state, step.momentum)
            torch._foreach_add_(state, updates, alpha=1 - step.dampening)
        _store(held, state)
        updates = list(torch._foreach_add(updates, state, alpha=step.momentum)) if step.nesterov else state
    if _on_device(lr):
        torch._foreach_add_(values, [d * -lr for d in updates])
    else:
        torch._foreach_add_(values, updates, alpha=-float(lr))
    _store(params, values)
    _follow(keys, params, m)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],  # 0-d float32, this step counted
    keys: list[Tensor | None],
    lr: float | Tensor,  # a tensor is 0-d, on the CPU or beside the parameters; so is m
    m: float | Tensor,
    step: AdamwStep,
) -> None:
    """One step of AdamW, and the EMA of the parameters that have a key, in place::

        g = -grad if maximize else grad
        average = beta1 * average + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * g^2
        param = param * (1 - lr * weight_decay)
        param = param - lr / (1 - beta1^t) * average / (sqrt(square) / sqrt(1 - beta2^t) + eps)
        key = m * key + (1 - m) * param

    Source: torch.optim.AdamW; Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    values, gradients = _widened(params), _widened(grads)
    means, spreads = _widened(averages), _widened(squares)
    if step.maximize:
        gradients = list(torch._foreach_neg(gradients))
    torch._foreach_lerp_(means, gradients, 1 - step.beta1)
    torch._foreach_mul_(spreads, step.beta2)
    torch._foreach_addcmul_(spreads, gradients, gradients, 1 - step.beta2)
    divisors = list(torch._foreach_sqrt(spreads))
    for value, mean, divisor, t in zip(values, means, divisors, steps, strict=True):
        t = t.double()
        divisor.div_((1 - step.beta2**t).sqrt()).add_(step.eps)
        value.mul_(1 - lr * step.weight_decay)
        value.sub_(mean * (lr / (1 - step.beta1**t)) / divisor)
    for held, state in ((averages, means), (squares, spreads), (params, values)):
        _store(held, state)
    _follow(keys, params, m)


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the dtype of the arithmetic: themselves where they have it, else copies."""
    return [tensor.to(compute_dtype(tensor)) for tensor in tensors]


def _store(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write what was computed where it was not computed in place."""
    for tensor, value in zip(tensors, values, strict=True):
        if tensor is not value:
            tensor.copy_(value)


def _follow(keys: Sequence[Tensor | None], params: Sequence[Tensor], m: float | Tensor) -> None:
    """The EMA of the parameters that have a key."""
    pairs = [(key, param) for key, param in zip(keys, params, strict=True) if key is not None]
    momentum = m if isinstance(m, Tensor) else torch.tensor(m, dtype=torch.float64, device="cpu")
    ema_update_([key for key, _ in pairs], [param for _, param in pairs], momentum)


def _on_device(x: float | Tensor) -> bool:
    """Whether a number is known to the device only."""
    return isinstance(x, Tensor) and x.device.type != "cpu"


def dense(x: Tensor) -> Tensor:  # (N, C, ...)
    """The tensor itself if contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def runs(x: Tensor) -> tuple[int, int]:
    """Rows and run of a dense tensor (N, C, ...) as it lies in memory: (rows, C, run).

    With L values of a channel in a sample, that is (N, L) if contiguous, (N L, 1) if channels-last.
    """
    length = x.numel() // (x.shape[0] * x.shape[1])
    return (x.shape[0], length) if x.is_contiguous() else (x.shape[0] * length, 1)


def like(dy: Tensor, x: Tensor) -> Tensor:
    """A gradient in the dtype of a dense tensor, and as that lies in memory."""
    same = dy.dtype == x.dtype and dy.is_contiguous() == x.is_contiguous()
    return dy if same and dense(dy) is dy else torch.empty_like(x).copy_(dy)


def split_batch_norm(
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    splits: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation of S consecutive parts of a batch, each with its own statistics.

    Over the M values that a channel has in part s::

        mean_s = sum(x) / M,    var_s = sum((x - mean_s)^2) / M
        y      = (x - mean_s) / sqrt(var_s + eps) * weight + bias

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1, as S devices do it.

    Returns:
        y, dense as x, in its dtype; mean (S, C) and var (S, C) in that of the arithmetic.
    """
    parts = _parts(x, splits)
    mean = parts.mean((1, 3), keepdim=True)  # (S, 1, C, 1)
    centred = parts - mean
    rest = centred.mean((1, 3), keepdim=True)  # what rounding left, where the mean is large
    mean, centred = mean + rest, centred.sub_(rest)
    var = centred.square().mean((1, 3), keepdim=True)  # on a CPU torch.var_mean takes several times as long
    y = centred * (var + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(y.dtype)[:, None]
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None]
    return torch.empty_like(dense(x)).copy_(y.reshape(x.shape)), mean[:, 0, :, 0], var[:, 0, :, 0]


def split_batch_norm_backward(
    dy: Tensor,  # (N, C, ...)
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,)
    mean: Tensor,  # (S, C)
    var: Tensor,  # (S, C)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`split_batch_norm` to x, weight and bias.

    With ``x^ = (x - mean_s) / sqrt(var_s + eps)`` and sums over the M values of a channel in a part::

        db = sum_s sum(dy),    dw = sum_s sum(dy x^)
        dx = weight / sqrt(var_s + eps) * (dy - sum(dy) / M - x^ sum(dy x^) / M)

    Returns:
        dx, dense as x, in its dtype; dw (C,) and db (C,) in that of the arithmetic.
    """
    parts, grads = _parts(x, len(mean)), _parts(dy, len(mean))
    scale = (var + eps).rsqrt()[:, None, :, None]
    x_hat = (parts - mean[:, None, :, None]) * scale
    dw, db = ((grads * factor).sum((1, 3), keepdim=True) for factor in (x_hat, 1))
    values = parts.shape[1] * parts.shape[3]
    dx = (grads - db / values - x_hat * (dw / values)) * scale
    if weight is not None:
        dx = dx * weight.to(dx.dtype)[:, None]
    dx = torch.empty_like(dense(x)).copy_(dx.reshape(x.shape))
    return dx, dw.sum((0, 1, 3)), db.sum((0, 1, 3))


def _parts(x: Tensor, splits: int) -> Tensor:
    """(N, C, ...) as (S, N/S, C, L) in the dtype of the arithmetic."""
    x = x.to(compute_dtype(x))
    return (x.flatten(2) if x.ndim > 2 else x[..., None]).unflatten(0, (splits, -1))
