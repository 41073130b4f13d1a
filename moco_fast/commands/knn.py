"""The command ``moco-fast knn``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from moco_fast import checks
from moco_fast.commands.tables import accuracy_table
from moco_fast.data.datasets import load_dataset
from moco_fast.evaluate.probe import KnnProbe
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.build import build_model
from moco_fast.train.config import PretrainConfig
from moco_fast.train.methods import Facts


@dataclass
class Knn:
    """kNN accuracy of a checkpoint's query encoder, beside raw pixels and its random initialisation."""

    checkpoint: tyro.conf.Positional[Path]
    """Run folder, or the checkpoint.pth in it."""
    data: str | None = None
    """Dataset to measure on; default: the one it was trained on."""
    k: int = 20
    """Neighbours that vote."""
    bank: int = 60_000
    """Training images that vote, at most."""

    def run(self) -> int:
        """Returns the exit status."""
        checks.count("k", self.k)
        checks.count("bank", self.bank)
        saved = checkpoints.read(self.checkpoint)
        extras = saved["moco_fast"]
        config = PretrainConfig.from_dict(extras["config"])
        model = build_model(config, extras["channels"], Facts(1, 1))
        size = config.augment.image_size
        console = Console()
        dataset = load_dataset(
            self.data or config.data, canvas=round(size * config.canvas), log=console.print
        )
        if dataset.channels > extras["channels"]:
            raise ValueError(
                f"data {dataset.name!r} has {dataset.channels} channels, "
                f"the checkpoint's encoder takes {extras['channels']}"
            )
        probe = KnnProbe(
            dataset, image_size=size, mean=extras["mean"], std=extras["std"], device=torch.device("cpu"),
            k=self.k, bank=self.bank, workers=config.workers,
        )  # fmt: skip
        if reason := probe.measurable():
            raise ValueError(f"data {dataset.name!r} cannot be measured: {reason}")
        accuracy = {"raw pixels": probe.accuracy(None), "random init": probe.accuracy(model)}
        checkpoints.load_model(model, saved)
        accuracy["trained"] = probe.accuracy(model)
        console.print(
            f"{dataset.name}: {len(probe.bank):,} images vote, {len(dataset.test or ()):,} are asked"
        )
        console.print(accuracy_table(accuracy, self.k))
        return 0
