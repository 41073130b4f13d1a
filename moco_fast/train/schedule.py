"""The learning rate of every step."""

from __future__ import annotations

import math

from moco_fast.train.config import PretrainConfig


def learning_rate(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0.

    The peak is the config's ``lr``, scaled linearly from ``lr_batch_size`` to the batch of a step. Linear
    warm-up to it, then ``peak * (1 + cos(pi * t)) / 2`` with t from 0 to 1 over what follows the warm-up, or
    ``peak / 10**(milestones passed)``. Source: He et al. 2020, section 4; Chen et al. 2020, section 3; the
    scaling: Goyal et al. 2017, section 2.1.
    """
    peak = config.lr * config.batch_size / config.lr_batch_size
    epoch = step / steps_per_epoch
    if config.schedule == "step" and epoch >= config.warmup_epochs:
        return peak * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
    return cosine(peak, config.epochs, config.warmup_epochs, step, steps_per_epoch)


def cosine(peak: float, epochs: int, warmup_epochs: float, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up to ``peak``, then half a cosine to 0 after ``epochs``; ``step`` counts from 0."""
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak * min(1.0, (step + 1) / (warmup_epochs * steps_per_epoch))
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
