"""What each op checks of its tensors before it changes anything.

They raise as :mod:`moco_fast.checks` does, and return what they were given.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from moco_fast import checks, native, reference

MOST_PIXELS = 16384  # of a side of a view: kernels number its values in 32 bits
BOX_SLACK = 1e-5  # by which crops may be rounded out of the image


def info_nce(q: object, k: object, queue: object) -> tuple[Tensor, Tensor, Tensor]:
    """Check the tensors of :func:`moco_fast.info_nce`."""
    q = checks.tensor("q", q, ndim=2)
    k = checks.tensor("k", k, ndim=2)
    queue = checks.tensor("queue", queue, ndim=2)
    _not_empty("q", q)
    checks.same_shape("q", q, "k", k)
    _same_dtype("q", q, "k", k)
    _queue_of_width(queue, "q", q)
    checks.same_device("q", q, "k", k)
    checks.same_device("q", q, "queue", queue)
    if k.requires_grad:
        raise ValueError("k requires grad, but InfoNCE treats keys as constants: pass k.detach()")
    if queue.requires_grad:
        raise ValueError(
            "queue requires grad, but its rows are keys of past batches, to which no gradient flows: "
            "pass queue.detach()"
        )
    return q, k, queue


def multi_info_nce(
    q: object, k: object, queue: object, labels: object, queue_labels: object, classes: object
) -> bool:
    """Check the tensors of :func:`moco_fast.multi_info_nce`; returns whether k has three dimensions."""
    several = isinstance(k, Tensor) and k.ndim == 3
    if several:
        k = checks.tensor("k", k, ndim=3)
        if k.shape[1] == 0:
            raise ValueError(f"k must hold at least one key for each query, got shape {tuple(k.shape)}")
    q, _, queue = info_nce(q, k[:, 0] if several and isinstance(k, Tensor) else k, queue)
    given = {"labels": labels, "queue_labels": queue_labels, "classes": classes}
    if labels is None and queue_labels is None and classes is None:
        return several
    for name, value in given.items():
        if value is None:
            raise ValueError(
                f"{name} must be given, as labels, queue_labels and classes go together, got None"
            )
    end = checks.count("classes", classes)
    labels = checks.per_row("labels", labels, "q", q)
    checks.in_range("labels", labels, end, start=-1)
    queue_labels = checks.per_row("queue_labels", queue_labels, "queue", queue)
    checks.in_range("queue_labels", queue_labels, end, start=-1)
    return several


def nt_xent(z1: object, z2: object) -> tuple[Tensor, Tensor]:
    """Check the tensors of :func:`moco_fast.nt_xent`."""
    z1 = checks.tensor("z1", z1, ndim=2)
    z2 = checks.tensor("z2", z2, ndim=2)
    _not_empty("z1", z1)
    checks.same_shape("z1", z1, "z2", z2)
    _same_dtype("z1", z1, "z2", z2)
    checks.same_device("z1", z1, "z2", z2)
    return z1, z2


def contrast(q: object, k: object, first: object) -> tuple[Tensor, Tensor, int]:
    """Check the tensors and first of :func:`moco_fast.contrast`."""
    several = isinstance(q, Tensor) and q.ndim == 3
    q = checks.tensor("q", q, ndim=3 if several else 2)
    k = checks.tensor("k", k, ndim=q.ndim)
    _not_empty("q", q)
    if k.shape[-1] != q.shape[-1] or k.shape[:-2] != q.shape[:-2]:
        expected = ", ".join(map(str, (*q.shape[:-2], "M", q.shape[-1])))
        raise ValueError(f"k must have shape ({expected}) to match q {tuple(q.shape)}, got {tuple(k.shape)}")
    _same_dtype("q", q, "k", k)
    checks.same_device("q", q, "k", k)
    if isinstance(first, bool) or not isinstance(first, int):
        raise TypeError(f"first must be an integer, got {type(first).__name__} {first!r}")
    last = k.shape[-2] - q.shape[-2]
    if last < 0:
        raise ValueError(f"k must hold a key for each of the {q.shape[-2]} queries, got {k.shape[-2]}")
    if not 0 <= first <= last:
        raise ValueError(
            f"first, the row of k that is the first query's key, must be in [0, {last}] for "
            f"{q.shape[-2]} queries and {k.shape[-2]} keys, got {first}"
        )
    return q, k, first


def dino(
    student: object, teacher: object, prototypes: object, teacher_prototypes: object, center: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Check the tensors of :func:`moco_fast.dino`."""
    student = checks.tensor("student", student, ndim=2)
    teacher = checks.tensor("teacher", teacher, ndim=2)
    prototypes = checks.tensor("prototypes", prototypes, ndim=2)
    teacher_prototypes = checks.tensor("teacher_prototypes", teacher_prototypes, ndim=2)
    center = checks.tensor("center", center, ndim=1)
    _not_empty("student", student)
    checks.same_shape("student", student, "teacher", teacher)
    _same_dtype("student", student, "teacher", teacher)
    if prototypes.shape[0] == 0 or prototypes.shape[1] != student.shape[1]:
        raise ValueError(
            f"prototypes must have shape (P, {student.shape[1]}), P > 0, to match student "
            f"{tuple(student.shape)}, got {tuple(prototypes.shape)}"
        )
    checks.same_shape("prototypes", prototypes, "teacher_prototypes", teacher_prototypes)
    if center.shape != prototypes.shape[:1]:
        raise ValueError(
            f"center must have shape ({prototypes.shape[0]},) to match prototypes "
            f"{tuple(prototypes.shape)}, got {tuple(center.shape)}"
        )
    if center.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"center must be torch.float32 or torch.float64, got {center.dtype}")
    constants = {"teacher": teacher, "teacher_prototypes": teacher_prototypes, "center": center}
    for name, value in ({"prototypes": prototypes} | constants).items():
        checks.same_device("student", student, name, value)
    for name, value in constants.items():
        if value.requires_grad:
            raise ValueError(
                f"{name} requires grad, but no gradient flows to the teacher: pass {name}.detach()"
            )
    return student, teacher, prototypes, teacher_prototypes, center


def enqueue(
    queue: object, ptr: object, keys: object, mirror: object, order: object
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check the tensors of :func:`moco_fast.enqueue_`."""
    queue = checks.tensor("queue", queue, ndim=2)
    keys = checks.tensor("keys", keys, ndim=2)
    if not isinstance(ptr, Tensor) or ptr.dtype != torch.int64 or ptr.shape != (1,):
        shown = f"{ptr.dtype} {tuple(ptr.shape)}" if isinstance(ptr, Tensor) else type(ptr).__name__
        raise TypeError(f"ptr must be an int64 tensor of shape (1,), got {shown}")
    if keys.shape[0] == 0:
        raise ValueError(f"keys must hold at least one row, got shape {tuple(keys.shape)}")
    _queue_of_width(queue, "keys", keys)
    if keys.shape[0] > queue.shape[0]:
        raise ValueError(
            f"keys holds {keys.shape[0]} rows, more than the queue's {queue.shape[0]} slots: "
            "use a larger queue or a smaller batch"
        )
    checks.same_device("queue", queue, "ptr", ptr)
    checks.same_device("queue", queue, "keys", keys)
    if queue.requires_grad:
        raise ValueError("queue requires grad, but enqueue_ overwrites it in place: pass queue.detach()")
    if order is not None:
        order = checks.index("order", order)
        if order.shape != keys.shape[:1]:
            raise ValueError(f"order must number the {keys.shape[0]} keys, got shape {tuple(order.shape)}")
        checks.same_device("queue", queue, "order", order)
    if mirror is None:
        return queue, ptr, keys, None, order
    mirror = checks.tensor("mirror", mirror, ndim=2)
    checks.same_shape("queue", queue, "mirror", mirror)
    checks.same_device("queue", queue, "mirror", mirror)
    if mirror.requires_grad:
        raise ValueError("mirror requires grad, but enqueue_ overwrites it in place: pass mirror.detach()")
    return queue, ptr, keys, mirror, order


def take_rows(x: object, index: object) -> tuple[Tensor, Tensor]:
    """Check the tensors of :func:`moco_fast.take_rows`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"x must hold at least one row, got shape {tuple(x.shape)}")
    index = checks.index("index", index)
    checks.same_device("x", x, "index", index)
    return x, index


def ema_update(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Check the tensors of :func:`moco_fast.ema_update_`."""
    if len(targets) != len(sources):
        raise ValueError(
            f"sources must pair up with targets: got {len(sources)} sources, {len(targets)} targets"
        )
    # Hundreds of tensors every step: looked at one by one only if a glance at all does not settle it.
    if native.pair_up(targets, sources) and not any(map(attrgetter("requires_grad"), targets)):
        return
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        _check_pair(i, targets[0], target, source)


def ema_masters(targets: list[Tensor], masters: list[Tensor]) -> None:
    """Check the masters of :func:`moco_fast.ema_update_`, whose targets are checked."""
    if len(masters) != len(targets):
        raise ValueError(
            f"masters must pair up with targets: got {len(masters)} masters, {len(targets)} targets"
        )
    for i, (target, master) in enumerate(zip(targets, masters, strict=True)):
        if not isinstance(master, Tensor):
            raise TypeError(f"masters[{i}] must be a torch.Tensor, got {type(master).__name__}")
        if master.dtype != torch.float32:
            raise TypeError(f"masters[{i}] must be torch.float32, got {master.dtype}")
        if target.dtype == torch.float64:
            raise TypeError(f"targets[{i}] is torch.float64, more than its master masters[{i}] can hold")
        checks.same_shape(f"targets[{i}]", target, f"masters[{i}]", master)
        checks.same_device(f"targets[{i}]", target, f"masters[{i}]", master)
        if master.requires_grad:
            raise ValueError(f"masters[{i}] requires grad, but the EMA overwrites it: pass master.detach()")


def _check_pair(i: int, first: Tensor, target: object, source: object) -> None:
    for name, value in ((f"targets[{i}]", target), (f"sources[{i}]", source)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    assert isinstance(target, Tensor) and isinstance(source, Tensor)
    checks.same_shape(f"targets[{i}]", target, f"sources[{i}]", source)
    checks.same_device("targets[0]", first, f"targets[{i}]", target)
    checks.same_device(f"targets[{i}]", target, f"sources[{i}]", source)
    if target.requires_grad:
        raise ValueError(
            f"targets[{i}] requires grad, but the EMA overwrites it in place: "
            "call requires_grad_(False) on the key encoder's parameters"
        )


def augment(
    images: object,
    parameters: object,
    size: object,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: object,
    memory_format: object,
) -> None:
    """Check the arguments of :func:`moco_fast.augment`, but for the values of the parameters."""
    images = checks.images(images)
    parameters = checks.tensor("parameters", parameters, ndim=2)
    if parameters.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"parameters must be torch.float32 or torch.float64, got {parameters.dtype}")
    if parameters.shape != (len(images), reference.COLUMNS):
        raise ValueError(
            f"parameters must have shape ({len(images)}, {reference.COLUMNS}), a row for each image, "
            f"got {tuple(parameters.shape)}"
        )
    checks.same_device("images", images, "parameters", parameters)
    if checks.count("size", size) > MOST_PIXELS:
        raise ValueError(f"size must be at most {MOST_PIXELS}, got {size}")
    checks.statistics(mean, std, images.shape[1])
    checks.views(dtype, memory_format)


def augment_values(parameters: Tensor) -> None:
    """Check the values of parameters of :func:`moco_fast.augment`, if they are on a CPU."""
    if parameters.device.type != "cpu":
        return
    checks.finite(parameters=parameters)
    starts, extents = parameters[:, reference.BOX].chunk(2, dim=1)
    ends = torch.cat((starts, starts + extents), dim=1)
    if len(bad := ((ends < -BOX_SLACK) | (ends > 1 + BOX_SLACK)).any(1).nonzero()):
        row = int(bad[0])
        raise ValueError(
            "parameters must hold crops within the image in columns 0 to 3, as fractions of it, got "
            f"{parameters[row, reference.BOX].tolist()} in row {row}"
        )
    order = parameters[:, reference.ORDER]
    if len(bad := (order.sort(1).values != torch.arange(order.shape[1])).any(1).nonzero()):
        row = int(bad[0])
        raise ValueError(
            f"parameters must hold a permutation of 0 to {order.shape[1] - 1} in columns "
            f"{reference.ORDER.start} to {reference.ORDER.stop - 1}, got {order[row].tolist()} in row {row}"
        )


def split_batch_norm(
    x: object, weight: object, bias: object, splits: object, eps: object
) -> tuple[Tensor, Tensor | None, Tensor | None, int, float]:
    """Check the arguments of :func:`moco_fast.split_batch_norm`."""
    x = checks.tensor("x", x, ndim=x.ndim if isinstance(x, Tensor) else 2)
    splits, eps = checks.count("splits", splits), checks.not_negative("eps", eps)
    if x.ndim < 2:
        raise ValueError(f"x must have at least 2 dimensions (N, C, ...), got shape {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    if channels == 0:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    if batch % splits:
        raise ValueError(f"splits={splits} must divide the batch, got {batch} samples")
    if x.numel() <= splits * channels:  # torch's own words, for the same mistake
        raise ValueError(
            f"Expected more than 1 value per channel in each of splits={splits} parts of the batch, "
            f"got x of shape {tuple(x.shape)}"
        )
    return x, _per_channel("weight", weight, x), _per_channel("bias", bias, x), splits, eps


def _per_channel(name: str, value: object, x: Tensor) -> Tensor | None:
    if value is None:
        return None
    value = checks.tensor(name, value, ndim=1)
    if value.shape[0] != x.shape[1]:
        raise ValueError(
            f"{name} must have shape ({x.shape[1]},) to match x {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    if value.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{name} must be torch.float32 or have the dtype of x, {x.dtype}, got {value.dtype}")
    checks.same_device("x", x, name, value)
    return value


def _not_empty(name: str, value: Tensor) -> None:
    if 0 in value.shape:
        raise ValueError(f"{name} must hold at least one row and one feature, got shape {tuple(value.shape)}")


def _same_dtype(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    if value.dtype != first.dtype:
        raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {value.dtype}")


def _queue_of_width(queue: Tensor, name: str, rows: Tensor) -> None:
    if queue.shape[0] == 0:
        raise ValueError(f"queue must hold at least one row, got shape {tuple(queue.shape)}")
    if queue.shape[1] != rows.shape[1]:
        raise ValueError(
            f"queue must have shape (K, {rows.shape[1]}) to match {name} {tuple(rows.shape)}, "
            f"got {tuple(queue.shape)}"
            + (": pass queue.t(), the rows" if queue.shape[0] == rows.shape[1] else "")
        )
