"""Logits (N, 1 + K) that take no memory: what a script gets to compute its loss and accuracy from.

``F.cross_entropy`` of them is the fused loss, whose gradient was computed in the forward pass; ``topk`` knows
the rank of the positive. Everything else (:mod:`moco_fast.compat.lazy`) computes the true logits.

Under autograd they are one node with two inputs, the losses of :func:`moco_fast.info_nce` and the queries.
The gradient that cross-entropy sends to that node is a :class:`SoftmaxGrad`, which takes no memory either,
and goes to the losses; a true one goes to the queries. So DistributedDataParallel, hooks and sums of losses
find an ordinary graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moco_fast.compat.lazy import PLAIN, Lazy, getter
from moco_fast.compat.source import QueueSnapshot, Source

_aten = torch.ops.aten


class Logits(Lazy):
    """See the module. ``detach``, ``clone`` and casts give further ones; so does nothing else.

    The dtype is that of true logits, the one of autocast if that is on; the loss is fp32 like that of
    :func:`moco_fast.info_nce`. Writing to them is noticed, also through ``.data`` or NumPy: from then on all
    operations see what was written. Not noticed is a write through ``.data`` or NumPy of a view of them.
    """

    PLAIN = PLAIN | {
        Tensor.detach, Tensor.clone, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.to,
        Tensor.cuda, Tensor.contiguous, torch.detach, torch.clone,
        Tensor.requires_grad_, Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    }  # fmt: skip
    FUSED: ClassVar[dict[Any, str]] = {
        F.cross_entropy: "_cross_entropy", Tensor.topk: "_topk", torch.topk: "_topk",
        Tensor.register_hook: "_keep_queue", Tensor.retain_grad: "_keep_queue",
        getter("data"): "_expose", Tensor.data_ptr: "_expose", Tensor.untyped_storage: "_expose",
        Tensor.numpy: "_expose", Tensor.__array__: "_expose", Tensor.__dlpack__: "_expose",
    }  # fmt: skip
    source: Source
    queue: QueueSnapshot
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, source: Source, queue: QueueSnapshot) -> Any:
        self = Lazy.__new__(cls, source.shape, source.dtype, source.q.device)
        self.source, self.queue, self._dense = source, queue, None
        return self

    def plain(self) -> Tensor:
        return self.source.values()

    def dense(self) -> Tensor:
        wants_graph = self.requires_grad and torch.is_grad_enabled()
        if self._dense is None or (wants_graph and not self._dense.requires_grad):
            self._dense = _Materialise.apply(self, self.source.values())
        return self._dense

    def _cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        """The fused loss, unless an option or labels other than the model's ask for another one."""
        ordinary = weight is size_average is reduce is None and ignore_index != 0 and label_smoothing == 0
        if not ordinary or reduction not in ("mean", "sum", "none") or self.source.changed:
            return NotImplemented
        if not self.source.are_labels(target) or target.shape != self.shape[:1]:
            return NotImplemented
        return _CrossEntropy.apply(self, reduction)

    def _topk(self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, **out: Any) -> Any:
        """The largest logits and their columns, see :class:`TopIndices`."""
        if dim not in (1, -1) or not largest or out or not 0 < k <= self.shape[1]:
            return NotImplemented

        was_changed = self.source.changed

        @cache
        def exact() -> tuple[Tensor, Tensor]:
            logits = self.dense()
            if self.source.changed and not was_changed:  # since this call
                unwritten = replace(self.source, true=None, exposed=False)
                logits = _Materialise.apply(self, unwritten.values())
            values, indices = torch.topk(logits, k, 1)
            return values, indices.t().contiguous().t()

        if was_changed:
            return torch.return_types.topk(exact())
        return torch.return_types.topk((TopValues(self, k, exact), TopIndices(self, k, exact)))

    def _keep_queue(self, *_: Any) -> Any:
        """For a gradient that somebody looks at, maybe after these logits are gone."""
        self.source.pinned = self.queue
        return NotImplemented

    def _expose(self, *_: Any, **__: Any) -> Any:
        """For somebody who gets at memory in which writes are not counted."""
        self.source.exposed = True
        return NotImplemented

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, Logits) and first.source.true is None:
            if func in (_aten.detach.default, _aten.alias.default):
                return Logits(first.source, first.queue)
            if func is _aten.view.default and tuple(args[1]) == first.shape:
                return Logits(first.source, first.queue)
            if func is _aten.clone.default:
                return Logits(replace(first.source), first.queue)
            if dtype := _cast_to(first, func, kwargs):
                return Logits(replace(first.source, dtype=dtype), first.queue)
        return super().__torch_dispatch__(func, types, args, kwargs)


class TopIndices(Lazy):
    """Columns of the largest logits, (N, k) or, transposed, (k, N).

    Compared with the model's labels they say where in the order the positive stands, which is its rank; that,
    and transposing, is all that the official ``accuracy`` does. Any other operation gets the true columns,
    (N, k) with strides (1, N), so that ``correct[:k].view(-1)`` of the transpose is possible. Negatives as
    similar as the positive count as less similar here, in an arbitrary order there.
    """

    FUSED: ClassVar[dict[Any, str]] = {
        Tensor.t: "_t", torch.t: "_t", getter("T"): "_t",
        Tensor.eq: "_eq", Tensor.__eq__: "_eq", torch.eq: "_eq",
    }  # fmt: skip
    logits: Logits
    k: int
    exact: Callable[[], tuple[Tensor, Tensor]]
    transposed: bool

    @staticmethod
    def __new__(cls, logits: Logits, k: int, exact: Callable[[], Any], transposed: bool = False) -> Any:
        rows = logits.shape[0]
        shape = (k, rows) if transposed else (rows, k)
        self = Lazy.__new__(cls, shape, torch.int64, logits.device, column_major=not transposed)
        self.logits, self.k, self.exact, self.transposed = logits, k, exact, transposed
        return self

    def dense(self) -> Tensor:
        return self.exact()[1].t() if self.transposed else self.exact()[1]

    plain = dense

    def _t(self) -> TopIndices:
        return TopIndices(self.logits, self.k, self.exact, not self.transposed)

    def _eq(self, other: Any) -> Any:
        source = self.logits.source
        if not source.are_labels(other) or torch.broadcast_shapes(self.shape, other.shape) != self.shape:
            return NotImplemented
        places = torch.arange(self.k, device=self.device)
        hits = places[:, None] == source.rank  # (k, N)
        return hits if self.transposed else hits.t()


class TopValues(Lazy):
    """The largest logits, (N, k), true ones with their gradient whatever is done with them."""

    @staticmethod
    def __new__(cls, logits: Logits, k: int, exact: Callable[[], Any]) -> Any:
        self = Lazy.__new__(cls, (logits.shape[0], k), logits.dtype, logits.device)
        self.exact = exact
        return self

    PLAIN = PLAIN - set(map(getter, ("requires_grad", "grad_fn", "is_leaf")))
    exact: Callable[[], tuple[Tensor, Tensor]]

    def dense(self) -> Tensor:
        return self.exact()[0]

    def plain(self) -> Tensor:
        return self.exact()[0].detach()


class SoftmaxGrad(Lazy):
    """``scale_i (softmax(logits)_ij - [j = 0])``, (N, 1 + K): gradient of cross-entropy to the logits."""

    source: Source
    scale: Tensor  # (N,)
    queue: QueueSnapshot | None  # kept for whoever looks at the values, if it is still there

    @staticmethod
    def __new__(cls, source: Source, scale: Tensor, dtype: torch.dtype) -> Any:
        self = Lazy.__new__(cls, source.shape, dtype, scale.device)
        self.source, self.scale, self.queue = source, scale, source.queue()
        return self

    def plain(self) -> Tensor:
        p = torch.softmax(self.source.values().to(self.scale.dtype), dim=1)
        p[:, 0] -= 1
        return (p * self.scale[:, None]).to(self.dtype)

    dense = plain

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0]
        if func is _aten.add.Tensor and not kwargs and all(isinstance(x, SoftmaxGrad) for x in args):
            return SoftmaxGrad(first.source, first.scale + args[1].scale, first.dtype)
        if func in (_aten.detach.default, _aten.clone.default):
            return SoftmaxGrad(first.source, first.scale, first.dtype)
        if dtype := _cast_to(first, func, kwargs):
            return SoftmaxGrad(first.source, first.scale, dtype)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _cast_to(x: Tensor, func: object, options: Any) -> torch.dtype | None:
    """The dtype that a call casts to on the same device; None if it does anything else."""
    if func is not _aten._to_copy.default or options.get("device") not in (None, x.device):
        return None
    return options.get("dtype") or x.dtype


class _Attach(torch.autograd.Function):
    """Logits as a node above the losses and the queries."""

    @staticmethod
    def forward(ctx, loss, q, source, queue):
        ctx.source = source
        return Logits(source, queue)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if isinstance(grad, SoftmaxGrad):
            return grad.scale, None, None, None
        return None, ctx.source.gradient(grad), None, None


class _Materialise(torch.autograd.Function):
    """The true logits of logits."""

    @staticmethod
    def forward(ctx, logits, values):
        return values.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, reduction):
        if torch.is_anomaly_enabled():  # which looks at every gradient
            logits.source.pinned = logits.queue
        ctx.source, ctx.reduction = logits.source, reduction
        loss = logits.source.loss
        loss = loss.to(torch.promote_types(loss.dtype, logits.source.dtype))  # fp32 at least
        return loss.clone() if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows = ctx.source.shape[0]
        scale = (grad / rows if ctx.reduction == "mean" else grad).expand(rows)
        return SoftmaxGrad(ctx.source, scale.to(ctx.source.loss.dtype), ctx.source.dtype), None


@torch.compiler.disable
def fused_logits(
    loss: Tensor,  # (N,) of moco_fast.info_nce, with its gradient
    rank: Tensor,  # (N,) int64
    q: Tensor,  # (N, C), raw
    k: Tensor,  # (N, C), raw
    queue: QueueSnapshot,
    temperature: float,
) -> tuple[Logits, Tensor]:
    """Logits (N, 1 + K) and labels (N,), int64 zeros, of a loss that has been computed."""
    labels = torch.zeros(q.shape[0], dtype=torch.long, device=q.device)
    dtype = q.dtype
    if torch.is_autocast_enabled(q.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
    source = Source(
        q.detach(), k.detach(), weakref.ref(queue), queue.rows.shape[0], temperature,
        loss.detach(), rank, labels, dtype,
    )  # fmt: skip
    return _Attach.apply(loss, q, source, queue), labels
