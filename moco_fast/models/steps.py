"""What the models of all methods share: building an encoder, checking a step, and its statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_fast import checks, distributed, ops
from moco_fast.models import heads
from moco_fast.reference import compute_dtype

BLOCK = 2**22  # similarities in memory at a time, 16 MB in fp32


def build_encoder(
    base_encoder: Callable[..., nn.Module], outputs: int, *, name: str = "dim", needs_head: bool = True
) -> tuple[nn.Module, str]:
    """``base_encoder(num_classes=outputs)``, and the dotted path of its head.

    Args:
        base_encoder: what builds the encoder.
        outputs: features that it returns.
        name: what the method calls them.
        needs_head: whether something is put in the head's place; without, an encoder may have none: "".

    Raises:
        TypeError: not callable, or outputs is not an integer.
        ValueError: outputs below 1, no head, or one of another width, unless more follows it.
    """
    if isinstance(base_encoder, nn.Module):
        raise TypeError(
            "base_encoder must be what builds the encoder, such as torchvision.models.resnet50 without "
            f"parentheses, got a {type(base_encoder).__name__}"
        )
    if not callable(base_encoder):
        raise TypeError(
            f"base_encoder must be callable as base_encoder(num_classes={name}), "
            f"got {type(base_encoder).__name__}"
        )
    checks.count(name, outputs)
    encoder = base_encoder(num_classes=outputs)
    try:
        head = heads.head_path(encoder)
    except ValueError:
        if needs_head:
            raise
        return encoder, ""
    linear = encoder.get_submodule(head)
    width = linear.out_features
    if width != outputs and (needs_head or list(encoder.modules())[-1] is linear):
        raise ValueError(
            f"base_encoder(num_classes={outputs}) must return {outputs} features, its head has {width}"
        )
    return encoder, head


def check_views(*, least: int = 1, same_shape: bool = False, **views: object) -> dict[str, object]:
    """Check the images of a step, given by name, and return their shapes and dtypes by name.

    Args:
        least: images there have to be.
        same_shape: whether they are encoded as one batch.
        views: every one (N, ...).

    Raises:
        TypeError: not a tensor of images.
        ValueError: another number of images than the first view, or another shape with ``same_shape``; none.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    facts: dict[str, object] = {}
    for name, images in views.items():
        if not isinstance(images, Tensor) or images.ndim == 0:
            shown = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{name} must be a tensor of images (N, ...), got {shown}")
        shapes[name] = tuple(images.shape)
        facts[name] = shapes[name], images.dtype
    (first, shape), *others = shapes.items()
    for name, other in others:
        if other[0] != shape[0]:
            raise ValueError(f"{name} must hold as many images as {first}, {shape[0]}, got {other[0]}")
        if same_shape and other != shape:
            raise ValueError(f"{name} must have the shape of {first}, {shape}, got {other}")
    if shape[0] < least:
        raise ValueError(f"{first} must hold at least {least} images, got shape {shape}")
    return facts


def agree(model: nn.Module, check: Callable[[], dict[str, object]], device: torch.device | None) -> None:
    """Raise what ``check`` raises before a step changes anything, in training the same on every rank.

    Args:
        model: in eval mode nothing is exchanged between ranks.
        check: raises, or returns what has to be the same on every rank.
        device: of the images, whose autocast must be the same.

    Raises:
        RuntimeError: training a replica of DataParallel.
        Disagreement: ranks were given different things, or one of them has a problem.
        Exception: in one process, what ``check`` raised.
    """
    if model.training and getattr(model, "_is_replica", False):
        raise RuntimeError(
            "torch.nn.DataParallel cuts the batch, and throws away what a step changes, such as a queue: use "
            "DistributedDataParallel, one process per GPU"
        )
    problem: Exception | None = None
    facts: dict[str, object] = {}
    try:
        facts = check()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        problem = error
    if model.training:
        if device is not None:
            enabled = torch.is_autocast_enabled(device.type)
            facts["autocast"] = torch.get_autocast_dtype(device.type) if enabled else None
        distributed.check_agreement(facts, problem)
    elif problem is not None:
        raise problem


def check_shards(
    model: nn.Module,
    target: str,  # name of a submodule
    source: str,
) -> None:
    """Check that :func:`follow_` can update what FSDP2 shards.

    Raises:
        RuntimeError: FSDP2 has gathered the parameters by now, and drops what is written to them.
    """
    if not hasattr(model, "unshard"):  # nothing is sharded
        return
    parameters = [p for name in (source, target) for p in model.get_submodule(name).parameters()]
    if not all(hasattr(p, "to_local") for p in parameters):
        raise RuntimeError(
            f"fully_shard(model) needs fully_shard(model.{source}) and fully_shard(model.{target}) before "
            f"it, so that the shards of {target} can be updated"
        )


@torch.no_grad()
def follow_(
    target: nn.Module,
    pairs: Iterable[tuple[Tensor, Tensor]],  # parameters of the target, and of what they follow
    m: float | Tensor,
    untrained: Iterable[tuple[Tensor, Tensor]] = (),
) -> None:
    """``target <- m * target + (1 - m) * source``, of a module's parameters; FSDP2's shard by shard.

    Before the target is used, and before what it follows is gathered. ``untrained`` pairs, mostly equal, move
    by ``(1 - m) (source - target)`` where they differ, which keeps what is equal to the last bit, as the
    average need not; integers are copied.
    """
    trained = [distributed.local_shards(pair) for pair in pairs]
    ops.ema_update_([own for own, _ in trained], [other for _, other in trained], m)
    for pair in untrained:
        own, other = distributed.local_shards(pair)
        if own.is_floating_point():
            other = torch.where(own == other, own, own + (other - own) * (1 - m))  # infinities are equal too
        own.copy_(other)
    unshard: Any = getattr(target, "unshard", None)
    if unshard is not None:  # else FSDP2 gathers on a stream that has not waited for this
        unshard()


@torch.no_grad()
def pair_stats(
    q: Tensor,  # (N, C), raw
    k: Tensor,  # (M, C), raw
    positive: Tensor,  # (N,) int64
    itself: Tensor | None = None,  # (N,) int64
) -> dict[str, Tensor]:
    """Similarities of queries to the keys of a batch, and how often the positive is the most similar.

    Args:
        q: queries.
        k: keys.
        positive: row of k that belongs to each query.
        itself: row of k that each query is, to be left out.

    Returns:
        "pos_sim", "neg_sim", "acc1": 0-d. ``neg_sim`` is 0 where there are no negatives.
    """
    dtype = compute_dtype(q, k)
    with torch.autocast(q.device.type, enabled=False):
        q, k = F.normalize(q.to(dtype), dim=1), F.normalize(k.to(dtype), dim=1)
        pos = (q * k[positive]).sum(dim=1)
        # The sum over all pairs is linear; a row that is a query too has a cosine of 1 with itself.
        total = q.sum(dim=0) @ k.sum(dim=0) - pos.sum()
        others = k.shape[0] - 1
        if itself is not None:
            total, others = total - (q * k[itself]).sum(), others - 1
        hits = []
        for block in torch.arange(q.shape[0], device=q.device).split(max(1, BLOCK // k.shape[0])):
            similarities = q[block] @ k.t()
            if itself is not None:
                similarities.scatter_(1, itself[block, None], -torch.inf)
            hits.append(similarities.argmax(dim=1) == positive[block])
    return {
        "pos_sim": pos.mean(),
        "neg_sim": total / (q.shape[0] * others) if others else torch.zeros_like(total),
        "acc1": torch.cat(hits).to(dtype).mean(),
    }
