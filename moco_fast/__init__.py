"""Fused kernels, a drop-in model and a trainer for MoCo self-supervised pretraining."""

from moco_fast import checks
from moco_fast._version import __version__
from moco_fast.backends import use_backend
from moco_fast.models.moco import MoCo
from moco_fast.norm import SplitBatchNorm
from moco_fast.ops import InfoNCEStats, ema_update_, enqueue_, info_nce
from moco_fast.queue import KeyQueue

__all__ = [
    "InfoNCEStats",
    "KeyQueue",
    "MoCo",
    "SplitBatchNorm",
    "__version__",
    "checks",
    "ema_update_",
    "enqueue_",
    "info_nce",
    "use_backend",
]
