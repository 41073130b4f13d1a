"""Training over several processes: collectives, the batch shuffle, and that all ranks agree.

Everything is the identity without a process group. Batches and keys travel in the default group.
"""

import torch.distributed as dist

if dist.is_available():  # before there is a group, which the defaults of its functions would keep
    import torch.distributed.nn  # noqa: F401

from moco_fast.distributed.agreement import (
    PATIENCE,
    Disagreement,
    check_agreement,
    check_equal,
    from_all,
    from_rank_0,
    largest,
    name_ranks,
    to_rank_0,
)
from moco_fast.distributed.collectives import (
    all_gather_rows,
    all_gather_rows_with_grad,
    average_,
    broadcast_,
    local_shards,
    own_rows,
    rank,
    world_size,
)
from moco_fast.distributed.generator import CommonGenerator
from moco_fast.distributed.interface import reachable_interface
from moco_fast.distributed.shuffle import SCHEMES, BatchShuffle, Exchange, balanced_order, scheme, use_scheme

__all__ = [
    "PATIENCE",
    "SCHEMES",
    "BatchShuffle",
    "CommonGenerator",
    "Disagreement",
    "Exchange",
    "all_gather_rows",
    "all_gather_rows_with_grad",
    "average_",
    "balanced_order",
    "broadcast_",
    "check_agreement",
    "check_equal",
    "from_all",
    "from_rank_0",
    "largest",
    "local_shards",
    "name_ranks",
    "own_rows",
    "rank",
    "reachable_interface",
    "scheme",
    "to_rank_0",
    "use_scheme",
    "world_size",
]
