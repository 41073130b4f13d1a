"""What a step of MoCo is checked for, before it changes anything."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from torch import Tensor, nn

from moco_fast import checks, distributed
from moco_fast.models import steps
from moco_fast.reference import is_channels_last

if TYPE_CHECKING:
    from moco_fast.models.moco import MoCo


def step(
    model: MoCo, im_q: Tensor, im_k: Tensor, return_loss: bool, return_stats: bool, shuffles: bool
) -> dict[str, object]:
    """Raise for what is wrong with a step; return what has to be the same on every rank for it to be one."""
    if return_stats and not return_loss:
        raise ValueError("return_stats must be left out without return_loss=True, got True")
    if model.symmetric and not return_loss:
        raise ValueError(
            "return_loss must be True for a symmetric model, which has no single logits, got False"
        )
    checks.fraction("m", model.m)  # these may have been set since the constructor, by a schedule
    checks.temperature("T", model.T)
    checks.count("accumulation_steps", model.accumulation_steps)
    steps.check_views(least=0, im_q=im_q, im_k=im_k)
    _check_batch(model, len(im_q))
    if model.training:
        encoders(model, len(im_q))
    return {} if distributed.world_size() == 1 else _facts(model, im_q, im_k, shuffles)


def _check_batch(model: MoCo, images: int) -> None:
    enqueued, K = images, len(model.rows)
    if model.training:
        enqueued *= model.accumulation_steps * (2 if model.symmetric else 1)
        enqueued *= distributed.world_size() if model.queue_sync == "global" else 1
    if not 1 <= enqueued <= (K if model.training else enqueued):
        views = " of both views" if model.symmetric else ""
        raise ValueError(f"the batch must hold 1 to K={K} images{views}, got {enqueued}")


def encoders(model: MoCo, images: int) -> None:
    """Raise if the encoders cannot take a batch of so many images in training."""
    if not model.ema_in_step:
        steps.check_shards(model, "encoder_k", "encoder_q")
    if images % model.bn_splits:
        raise ValueError(f"bn_splits={model.bn_splits} must divide the batch, got {images} samples")
    if model.bn_splits > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in model.encoder_k.modules()):
        raise RuntimeError(
            f"bn_splits={model.bn_splits} asks for statistics of parts of the batch, but the encoder was "
            "converted to SyncBatchNorm, which takes them over all of it: leave one of the two out"
        )


def _facts(model: MoCo, im_q: Tensor, im_k: Tensor, shuffles: bool) -> dict[str, object]:
    if model._parameter_digest is None:
        state = [*model.named_parameters(), *model.named_buffers()]
        described = [(name, tuple(x.shape), x.dtype) for name, x in state if name != "queue"]
        model._parameter_digest = hashlib.blake2b(repr(described).encode(), digest_size=8).hexdigest()
    # Rows travel as they lie in memory.
    travelling = {"im_q": im_q, "im_k": im_k} if model.symmetric else {"im_k": im_k}
    views = {
        name: (tuple(x.shape), x.dtype, "NHWC" if is_channels_last(x) else "NCHW")
        for name, x in travelling.items()
    }
    return {
        "im_q": (tuple(im_q.shape), im_q.dtype),
        **views,
        "K": model.K,
        "dim": model.rows.shape[1],
        "T": float(model.T),  # however it is written
        "m": float(model.m),
        "bn_splits": model.bn_splits,
        "queue_sync": model.queue_sync,
        "symmetric": model.symmetric,
        "accumulation_steps": (len(model._waiting), model.accumulation_steps),
        "MOCO_FAST_SHUFFLE": (distributed.scheme(), shuffles),
        "the state of the shuffle": model.shuffle.digest(),
        "ema_in_step": model.ema_in_step,
        "the encoders' parameters and buffers (names, shapes, dtypes)": model._parameter_digest,
    }
