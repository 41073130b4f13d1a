"""Fused kernels, a drop-in model and a trainer for MoCo self-supervised pretraining."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moco_fast._version import __version__
from moco_fast.exports import imported_when_used

if TYPE_CHECKING:
    from moco_fast import checks
    from moco_fast.backends import use_backend
    from moco_fast.models.moco import MoCo
    from moco_fast.models.moco_v3 import MoCo_ResNet, MoCo_ViT
    from moco_fast.norm import SplitBatchNorm
    from moco_fast.ops import (
        InfoNCEStats,
        augment,
        contrast,
        dino,
        ema_update_,
        enqueue_,
        info_nce,
        multi_info_nce,
        nt_xent,
        split_batch_norm,
        take_rows,
    )
    from moco_fast.optim import LARS, SGD, AdamW
    from moco_fast.queue import KeyQueue

__all__ = [
    "LARS",
    "SGD",
    "AdamW",
    "InfoNCEStats",
    "KeyQueue",
    "MoCo",
    "MoCo_ResNet",
    "MoCo_ViT",
    "SplitBatchNorm",
    "__version__",
    "augment",
    "checks",
    "contrast",
    "dino",
    "ema_update_",
    "enqueue_",
    "info_nce",
    "multi_info_nce",
    "nt_xent",
    "split_batch_norm",
    "take_rows",
    "use_backend",
]

# Imported when first used: the command line has to set OpenMP's policy before anything imports torch.
_HOMES = {
    "AdamW": "optim",
    "LARS": "optim",
    "SGD": "optim",
    "InfoNCEStats": "ops",
    "KeyQueue": "queue",
    "MoCo": "models.moco",
    "MoCo_ResNet": "models.moco_v3",
    "MoCo_ViT": "models.moco_v3",
    "SplitBatchNorm": "norm",
    "augment": "ops",
    "contrast": "ops",
    "dino": "ops",
    "ema_update_": "ops",
    "enqueue_": "ops",
    "info_nce": "ops",
    "multi_info_nce": "ops",
    "nt_xent": "ops",
    "split_batch_norm": "ops",
    "take_rows": "ops",
    "use_backend": "backends",
}
_MODULES = (
    "checks",
    "compat",
    "data",
    "distributed",
    "evaluate",
    "models",
    "ops",
    "optim",
    "reference",
    "train",
)

__getattr__, __dir__ = imported_when_used(__name__, _HOMES, _MODULES)
