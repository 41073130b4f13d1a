"""SGD, AdamW and LARS whose step also updates the key encoder, in the same pass over memory.

A MoCo step writes every query parameter in the optimizer, and reads it again to
move its key parameter. Here the step does both: 28 instead of 32 bytes per
fp32 parameter for SGD with momentum, and one launch on a GPU instead of two
per parameter group.

    >>> model = moco_fast.MoCo(...)
    >>> optimizer = moco_fast.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4,
    ...                           ema=model.move_ema_into_step(), m=model.m)

Without ``ema`` they are plain optimizers. Arguments and state dicts are those of
``torch.optim``, whose checkpoints they load and which loads theirs. Of parameters
sharded by FSDP2 a rank updates its shards. Under ``torch.compile`` a step breaks the
graph and runs as it is; a CUDA graph can hold every step but the first.
"""

from moco_fast.optim.adamw import AdamW
from moco_fast.optim.sgd import LARS, SGD

__all__ = ["LARS", "SGD", "AdamW"]
