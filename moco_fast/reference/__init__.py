"""Every op in plain PyTorch: oracle of the tests, baseline of the benchmarks, fallback on any device.

Each function has the contract that every backend has to meet: arguments
already checked, arithmetic in fp32 (float64 if an operand is float64), nothing
read back from the device.
"""

from moco_fast.reference.batch_norm import split_batch_norm, split_batch_norm_backward
from moco_fast.reference.common import (
    EPS,
    compute_dtype,
    dense,
    empty_rows,
    flat_rows,
    is_channels_last,
    like,
    normalise,
    runs,
)
from moco_fast.reference.distillation import dino
from moco_fast.reference.ema_update import ema_update_
from moco_fast.reference.losses import contrast, info_nce, nt_xent
from moco_fast.reference.optim import AdamwStep, SgdStep, adamw_, sgd_
from moco_fast.reference.rows import enqueue_, take_rows
from moco_fast.reference.views import (
    AMOUNTS,
    BOX,
    COLUMNS,
    GRAY,
    HUE,
    LUMA,
    ORDER,
    SATURATION,
    SIGMA,
    THRESHOLD,
    augment,
    blur_radius,
    empty_views,
)

__all__ = [
    "AMOUNTS",
    "BOX",
    "COLUMNS",
    "EPS",
    "GRAY",
    "HUE",
    "LUMA",
    "ORDER",
    "SATURATION",
    "SIGMA",
    "THRESHOLD",
    "AdamwStep",
    "SgdStep",
    "adamw_",
    "augment",
    "blur_radius",
    "compute_dtype",
    "contrast",
    "dense",
    "dino",
    "ema_update_",
    "empty_rows",
    "empty_views",
    "enqueue_",
    "flat_rows",
    "info_nce",
    "is_channels_last",
    "like",
    "normalise",
    "nt_xent",
    "runs",
    "sgd_",
    "split_batch_norm",
    "split_batch_norm_backward",
    "take_rows",
]
