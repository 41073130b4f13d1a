"""Tiny runs of the trainer, and what two of them have to share."""

import json

import torch
from rich.console import Console

from moco_fast.data.augment import AugmentConfig
from moco_fast.train import checkpoint
from moco_fast.train.config import PretrainConfig
from moco_fast.train.loop import pretrain

TINY = PretrainConfig(
    data="digits", epochs=2, batch_size=256, width=8, dim=16, queue_size=512, bn_splits=2, log_every=1,
    checkpoint_every=3, knn_every=4, knn_bank=200, knn_queries=50, augment=AugmentConfig(image_size=8),
    threads=1, warmup_epochs=0.0, lr=0.06, lr_batch_size=256,
)  # fmt: skip
STEPS = 10  # 1,437 digits in batches of 256, twice
TIMED = {"images_per_s", "data_wait"}


def run(folder, config=TINY, **options):
    return pretrain(config, folder, console=Console(quiet=True), **options)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def assert_same_run(folder, other, after=0):
    """Bitwise: the metrics of every step after one, weights, queue, optimizer and generator."""
    rows = [[row for row in metrics(path) if row["step"] > after] for path in (folder, other)]
    assert rows[0] == rows[1]
    a, b = checkpoint.read(folder), checkpoint.read(other)
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for index, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][index]["momentum_buffer"])
    assert torch.equal(a["moco_fast"]["views"], b["moco_fast"]["views"])
