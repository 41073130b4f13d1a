"""The command ``moco-fast knn``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from torch import Tensor

from moco_fast import checks
from moco_fast.commands.tables import knn_table
from moco_fast.distributed import rank
from moco_fast.evaluate.features import all_features, own_features, spread
from moco_fast.evaluate.knn import CHUNK, knn_predict
from moco_fast.extras import new_console
from moco_fast.files import write_text
from moco_fast.train.processes import joined
from moco_fast.train.subject import Subject, load_subject

RESULTS_FILE, PICTURE_FILE = "results.json", "confusion.png"


@dataclass
class Knn:
    """kNN accuracy of a checkpoint's encoder, beside raw pixels and its random initialisation.

    Under torchrun the images are shared out; the accuracies are those of one process. A test class without
    images in the bank cannot be found; one image is enough.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Run folder, the checkpoint.pth in it, or an official MoCo v1, v2 or v3 file."""
    data: str | None = None
    """Dataset to measure on; default: the one it was trained on."""
    k: tuple[int, ...] = (20,)
    """Neighbours that vote; several numbers share one search."""
    temperature: float | None = 0.1
    """Votes weigh exp(similarity / temperature); None: one each."""
    bank: int = 60_000
    """Training images that vote, at most."""
    arch: str | None = None
    """Backbone, for a file that does not name it rightly."""
    image_size: int | None = None
    """Side of the views; default: as in training, 224 for official files."""
    crop: float | None = None
    """Side of the central square that is shown, over the shorter side of the image; default: 0.875, what
    Resize(256) and CenterCrop(224) leave, of a directory's images at 224 pixels or more, else 1."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1"; under torchrun every process has its own."""
    workers: int = 2
    """Processes that decode a directory's images, for every process."""
    out: Path | None = None
    """Folder for results.json and confusion.png; default: knn-DATA beside the checkpoint."""

    def run(self) -> int:
        """Returns the exit status."""
        if not self.k:
            raise ValueError("k must be one number or more, got none")
        for k in self.k:
            checks.count("k", k)
        if self.temperature is not None:
            checks.temperature("temperature", self.temperature)
        checks.count("bank", self.bank)
        with joined(self.device):
            subject = load_subject(
                self.checkpoint, self.data, self.device, new_console(quiet=rank() > 0).print,
                arch=self.arch, image_size=self.image_size, workers=self.workers, crop=self.crop,
            )  # fmt: skip
            accuracy, classes, note = self._measure(subject, new_console(quiet=rank() > 0))
            if rank() > 0:
                return 0
        console = new_console()
        console.print(note)
        for k, rows in accuracy.items():
            first, five = ({name: values[i] for name, values in rows.items()} for i in (0, 1))
            console.print(knn_table(first, k, weighted=self.temperature is not None, of_five=five))
        folder = self.out or subject.folder("knn")
        found = {
            "knn": accuracy,
            "note": note,
            "image_size": subject.pretrained.image_size,
            "crop": subject.crop,
        }
        write_text(folder / RESULTS_FILE, json.dumps(found, indent=2) + "\n")
        subject.plot_confusion(classes, folder / PICTURE_FILE, f"{self.k[0]} nearest neighbours")
        console.print(f"{RESULTS_FILE} and {PICTURE_FILE} are in {folder}", soft_wrap=True)
        return 0

    def _measure(
        self, subject: Subject, console: Console
    ) -> tuple[dict[int, dict[str, tuple[float, float]]], Tensor, str]:
        """Accuracy at one and at five guesses by k and row of the table, the classes that the first k of the
        trained features chooses, and what was measured."""
        dataset = subject.dataset
        train, test = dataset.train, dataset.test
        assert test is not None and test.labels is not None and train.labels is not None
        bank, queries = spread(len(train), self.bank), torch.arange(len(test))
        if max(self.k) > len(bank):
            raise ValueError(f"k must be at most the {len(bank):,} images of the bank, got {max(self.k)}")
        absent = sorted(set(test.labels.tolist()) - set(train.labels[bank].tolist()))
        if absent:
            names = ", ".join(dataset.class_names[label] for label in absent[:5])
            console.print(f"No image in the bank for {len(absent)} of the queries' classes: {names}")
        accuracy: dict[int, dict[str, tuple[float, float]]] = {k: {} for k in self.k}
        for name, network, view in subject.rows(len(bank)):  # those of the trained features come last
            predicted = knn_predict(
                own_features(network, train, bank, view, CHUNK), train.labels[bank],
                all_features(network, test, queries, view),
                k=self.k, temperature=self.temperature, sharded=True,
            )  # fmt: skip
            for k, classes in predicted.items():
                accuracy[k][name] = classes.accuracy(test.labels), classes.accuracy(test.labels, 5)
        note = f"{subject}: {len(bank):,} images vote, {len(test):,} are queries"
        return accuracy, predicted[self.k[0]].classes[:, 0], note
