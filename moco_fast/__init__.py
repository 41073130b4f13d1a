"""Fused kernels, a drop-in model and a trainer for MoCo self-supervised pretraining."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moco_fast._version import __version__

if TYPE_CHECKING:
    from moco_fast import checks
    from moco_fast.backends import use_backend
    from moco_fast.models.moco import MoCo
    from moco_fast.models.moco_v3 import MoCo_ResNet, MoCo_ViT
    from moco_fast.norm import SplitBatchNorm
    from moco_fast.ops import (
        InfoNCEStats,
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
_HOME = {
    "AdamW": "optim",
    "LARS": "optim",
    "SGD": "optim",
    "InfoNCEStats": "ops",
    "KeyQueue": "queue",
    "MoCo": "models.moco",
    "MoCo_ResNet": "models.moco_v3",
    "MoCo_ViT": "models.moco_v3",
    "SplitBatchNorm": "norm",
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
# Those that docs/api.md names; the rest are imported by their own names.
_MODULES = ("checks", "compat", "data", "distributed", "models", "reference")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"moco_fast.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'moco_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moco_fast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
