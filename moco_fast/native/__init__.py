"""The native backend: from tensors to pointers. The only user of the compiled module ``_C``."""

from moco_fast.native.batch_norm import split_batch_norm, split_batch_norm_backward
from moco_fast.native.compiled import (
    DTYPES,
    MULTI_TENSOR,
    ON_REQUEST,
    OPS,
    build_info,
    cannot_serve,
    has_bf16_units,
    unavailable,
)
from moco_fast.native.losses import contrast, dino, info_nce, info_nce_sweep, nt_xent
from moco_fast.native.multi_tensor import adamw_, ema_update_, pair_up, sgd_
from moco_fast.native.rows import enqueue_, take_rows
from moco_fast.native.views import augment

__all__ = [
    "DTYPES",
    "MULTI_TENSOR",
    "ON_REQUEST",
    "OPS",
    "adamw_",
    "augment",
    "build_info",
    "cannot_serve",
    "contrast",
    "dino",
    "ema_update_",
    "enqueue_",
    "has_bf16_units",
    "info_nce",
    "info_nce_sweep",
    "nt_xent",
    "pair_up",
    "sgd_",
    "split_batch_norm",
    "split_batch_norm_backward",
    "take_rows",
    "unavailable",
]
