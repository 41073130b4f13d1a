"""The command ``moco-fast map``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from moco_fast import checks
from moco_fast.evaluate.embedding import FEWEST, spread_over_classes
from moco_fast.evaluate.features import View, features_of
from moco_fast.evaluate.pictures import plot_embedding
from moco_fast.evaluate.probe import KnnProbe
from moco_fast.extras import new_console
from moco_fast.train.build import choose_device
from moco_fast.train.pretrained import dataset_for, load_pretrained
from moco_fast.train.processes import one_process

BANK = 20_000  # training images among which neighbours are looked for


@dataclass
class Map:
    """Draw what a checkpoint finds alike: a t-SNE map of its features, and nearest neighbours of some images.

    examples:
      moco-fast map runs/NAME                               embedding.png and neighbours.png in that folder
      moco-fast map moco_v2_800ep_pretrain.pth.tar --data imagenet/val --out v2.png
    """

    checkpoint: tyro.conf.Positional[Path]
    """Run folder, the checkpoint.pth in it, or an official MoCo v1, v2 or v3 file."""
    data: str | None = None
    """Dataset to show, its test images if it has labels; default: the one it was trained on."""
    points: int = 2000
    """Images on the map at most, as many of every class."""
    out: Path | None = None
    """Picture to write, with neighbours.png beside it; default: embedding.png beside the checkpoint."""
    seed: int = 0
    """Seed of the choice of images and of the t-SNE."""
    arch: str | None = None
    """Backbone, for a file that does not name it rightly."""
    image_size: int | None = None
    """Side of the views; default: as in training, 224 for official files."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1"."""
    workers: int = 2
    """Processes that decode a directory's images."""

    def run(self) -> int:
        """Returns the exit status."""
        checks.count("points", self.points, least=FEWEST)
        one_process("map")
        if self.out is not None and self.out.is_dir():
            raise ValueError(f"out must be a picture to write, such as map.png, got the folder {self.out}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        console, device = new_console(), choose_device(self.device)
        subject = load_pretrained(self.checkpoint, arch=self.arch, image_size=self.image_size)
        dataset = dataset_for(subject, self.data, console.print)
        network = subject.backbone.to(device)
        folder = self.checkpoint if self.checkpoint.is_dir() else self.checkpoint.parent
        out = self.out or folder / "embedding.png"

        shown = dataset.test or dataset.train
        rows = spread_over_classes(shown.labels, len(shown), self.points, self.seed)
        view = View(subject.image_size, subject.mean, subject.std, device, self.workers)
        plot_embedding(
            features_of(network, shown, rows, view), None if shown.labels is None else shown.labels[rows],
            dataset.class_names, out, self.seed,
            heading=f"{dataset.short_name}, {subject.arch}, {subject.method}",
        )  # fmt: skip
        probe = KnnProbe(
            dataset, image_size=subject.image_size, mean=subject.mean, std=subject.std, device=device,
            k=1, bank=BANK, workers=self.workers,
        )  # fmt: skip
        neighbours = out.with_name("neighbours.png")
        probe.gallery(network, neighbours)
        console.print(f"{len(rows):,} images of {dataset.name}: {out} and {neighbours}", soft_wrap=True)
        return 0
