"""Public ops: check the arguments, then call the torch.library op, which picks a backend at run time.

Each op is opaque to torch.compile (fullgraph works), has a fake kernel and
declares what it writes.
"""

from moco_fast.ops.batch_norm import split_batch_norm
from moco_fast.ops.distillation import dino
from moco_fast.ops.ema_update import ema_update_
from moco_fast.ops.losses import InfoNCEStats, contrast, info_nce, nt_xent
from moco_fast.ops.multi import multi_info_nce
from moco_fast.ops.rows import enqueue_, take_rows
from moco_fast.ops.views import augment

__all__ = [
    "InfoNCEStats",
    "augment",
    "contrast",
    "dino",
    "ema_update_",
    "enqueue_",
    "info_nce",
    "multi_info_nce",
    "nt_xent",
    "split_batch_norm",
    "take_rows",
]
