"""The command ``moco-fast linear``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from moco_fast._version import __version__
from moco_fast.bar import Bar
from moco_fast.commands.tables import linear_table, sweep_table
from moco_fast.evaluate.linear import LinearConfig, LinearResult, evaluate_linear
from moco_fast.extras import new_console
from moco_fast.files import write_text
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.processes import one_process
from moco_fast.train.subject import TRAINED, Subject, load_subject

WEIGHTS_FILE, RESULTS_FILE, PICTURE_FILE = "linear.pth", "results.json", "confusion.png"


@dataclass
class Linear:
    """Linear classification of a checkpoint's frozen features, beside raw pixels and its random init.

    By default features are extracted once and five learning rates are tried side by side; of them the one
    that does best on a held-out tenth of the training images counts. MoCo's own protocol, crops
    and test view included, is --augment --lr 30 on a directory's images at 224 pixels.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Run folder, the checkpoint.pth in it, or an official MoCo v1, v2 or v3 file."""
    data: str | None = None
    """Dataset to classify; default: the one it was trained on."""
    out: Path | None = None
    """Folder for linear.pth, results.json and confusion.png; default: linear-DATA beside the checkpoint."""
    protocol: Annotated[LinearConfig, tyro.conf.arg(name="")] = field(default_factory=LinearConfig)
    baselines: bool = True
    """Also measure raw pixels and the random initialisation."""
    arch: str | None = None
    """Backbone, for a file that does not name it rightly."""
    image_size: int | None = None
    """Side of the views; default: as in training, 224 for official files."""
    crop: float | None = None
    """Side of the central square that is shown, over the shorter side of the image; default: 0.875, what
    Resize(256) and CenterCrop(224) leave, of a directory's images at 224 pixels or more, else 1."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1"."""
    workers: int = 2
    """Processes that decode a directory's images."""

    def run(self) -> int:
        """Returns the exit status."""
        one_process("linear")
        console, began = new_console(), time.monotonic()
        subject = load_subject(
            self.checkpoint, self.data, self.device, console.print,
            arch=self.arch, image_size=self.image_size, workers=self.workers, crop=self.crop,
        )  # fmt: skip
        dataset = subject.dataset
        rows = subject.rows(len(dataset.train), self.baselines)
        results: dict[str, LinearResult] = {}
        with Bar(console, len(rows) * self.protocol.epochs, "epochs") as bar:
            for name, network, view in rows:
                bar.now(name)
                results[name] = evaluate_linear(
                    network, dataset, view, self.protocol, on_epoch=lambda _: bar.advance()
                )
        own = results[TRAINED]
        if own.never_held_out and len(self.protocol.lr) > 1:
            names = ", ".join(dataset.class_names[label] for label in own.never_held_out[:5])
            console.print(f"Not held out, for they have one training image: {names}")
        console.print(
            f"{subject}: {len(dataset.train):,} images to learn, {len(dataset.test or ()):,} to test"
        )
        if len(self.protocol.lr) > 1:
            console.print(sweep_table(own))
            if own.best.lr in (min(self.protocol.lr), max(self.protocol.lr)):
                console.print(f"lr {own.best.lr:g} is at the end of the range: one beyond may do better.")
        console.print(linear_table(results))
        folder = self.out or subject.folder("linear")
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_atomic(folder / WEIGHTS_FILE, self._classifier(subject, own))
        written = self._record(subject, results) | {"seconds": round(time.monotonic() - began, 1)}
        write_text(folder / RESULTS_FILE, json.dumps(written, indent=2) + "\n")
        subject.plot_confusion(own.classes[:, 0], folder / PICTURE_FILE, "linear classification")
        console.print(
            f"The classifier ({WEIGHTS_FILE}), {RESULTS_FILE} and {PICTURE_FILE} are in {folder}",
            soft_wrap=True,
        )
        return 0

    def _classifier(self, subject: Subject, result: LinearResult) -> dict[str, Any]:
        """Backbone and head in the layout and under the names of MoCo's linear evaluation."""
        pretrained = subject.pretrained
        state = checkpoints.model_state(pretrained.backbone)
        for name, value in (("weight", result.weight), ("bias", result.bias)):
            state[f"{checkpoints.PREFIX}{pretrained.head}.{name}"] = value
        return {
            "epoch": self.protocol.epochs,
            "arch": pretrained.arch,
            "state_dict": {name: value.cpu() for name, value in state.items()},
            "best_acc1": 100 * result.best.acc1,
            "moco_fast": {
                "version": __version__,
                "linear": asdict(self.protocol),
                "image_size": pretrained.image_size,
                "crop": subject.crop,
                "mean": list(pretrained.mean),
                "std": list(pretrained.std),
                "channels": pretrained.channels,
                "class_names": list(subject.dataset.class_names),
            },
        }

    def _record(self, subject: Subject, results: dict[str, LinearResult]) -> dict[str, Any]:
        """What results.json holds."""
        return {
            "checkpoint": str(self.checkpoint),
            "arch": subject.pretrained.arch,
            "method": subject.pretrained.method,
            "data": subject.dataset.name,
            "dataset": subject.dataset.note,
            "image_size": subject.pretrained.image_size,
            "crop": subject.crop,
            "protocol": asdict(self.protocol),
            "features": {
                name: {"chosen": asdict(result.best), "heads": [asdict(head) for head in result.heads]}
                for name, result in results.items()
            },
        }
