"""What is measured: module by name; each offers ``cases(quick, device)``."""

from collections.abc import Iterator

import torch

from bench import (
    bench_augment,
    bench_contrast,
    bench_dino,
    bench_ema_update,
    bench_enqueue,
    bench_fused_step,
    bench_info_nce,
    bench_nt_xent,
    bench_split_batch_norm,
    bench_take_rows,
)
from bench.case import Case

OPS = {
    "info_nce": bench_info_nce,
    "nt_xent": bench_nt_xent,
    "contrast": bench_contrast,
    "dino": bench_dino,
    "ema_update_": bench_ema_update,
    "fused step": bench_fused_step,
    "enqueue_": bench_enqueue,
    "split_batch_norm": bench_split_batch_norm,
    "take_rows": bench_take_rows,
    "augment": bench_augment,
}


def cases(op: str, quick: bool, device: torch.device, own: bool) -> Iterator[Case]:
    """The cases of an op, one at a time; ``own`` leaves out other people's ways, which then never run."""
    for case in OPS[op].cases(quick, device):
        yield case.own() if own else case
