"""Fine-tuning: supervised training of all weights of a pretrained backbone, from a checkpoint to a table.

Tests: tests/test_finetune.py.
"""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_fast.data.augment import random_view
from moco_fast.data.fraction import labelled_fraction
from moco_fast.data.images import ImageSet
from moco_fast.data.loader import BatchLoader
from moco_fast.distributed import check_agreement, largest, rank, world_size
from moco_fast.evaluate.features import View, all_features, need_labels
from moco_fast.evaluate.pictures import plot_confusion
from moco_fast.evaluate.scores import accuracy_at, confusion
from moco_fast.extras import new_console
from moco_fast.models.classifier import Classifier
from moco_fast.norm import average_statistics_
from moco_fast.optim import SGD, AdamW
from moco_fast.train.build import choose_device, data_parallel
from moco_fast.train.checkpoint import CheckpointError, shortened
from moco_fast.train.display import Display, opening
from moco_fast.train.finetune_config import FinetuneConfig
from moco_fast.train.interrupt import StopRequest
from moco_fast.train.layers import parameter_groups
from moco_fast.train.meter import Meter
from moco_fast.train.pretrained import dataset_for, load_pretrained
from moco_fast.train.processes import first_on_machine, joined, on_rank_0
from moco_fast.train.record import Recorder, draw_curves
from moco_fast.train.run import FolderLock, Resume, open_run
from moco_fast.train.schedule import cosine

SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class Scores:
    """How a classifier does on the test images.

    Attributes:
        loss: cross-entropy.
        acc1: share of images whose class has the highest logit.
        acc5: share of images whose class is among the five highest; 1 with up to five classes.
        confusion: images by true and predicted class, (C, C).
    """

    loss: float
    acc1: float
    acc5: float
    confusion: Tensor


@dataclass(frozen=True)
class FinetuneOutcome:
    """How a run ended."""

    folder: Path
    step: int
    interrupted: signal.Signals | None
    images: int
    """Images that it trained on."""
    scores: Scores | None
    """Of the end; None if the run was interrupted."""


def finetune(
    config: FinetuneConfig,
    out: Path,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: Resume = False,
    console: Any = None,
) -> FinetuneOutcome:
    """Train a pretrained backbone and a fresh linear layer on labelled images.

    Every process that torchrun started calls this with the same arguments; ``config.batch_size`` is shared
    out among them. Weights are those of the last step: test images choose nothing.

    The folder gets ``checkpoint.pth`` (which :func:`moco_fast.train.pretrained.load_pretrained` reads),
    ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``curves.png`` and ``confusion.png``.

    Args:
        config: the recipe.
        out: run folder.
        checkpoint: what to start from: run folder, checkpoint.pth or an official MoCo file.
        resume: continue from the checkpoint in ``out`` instead; losses are then those of an unbroken run, bit
            for bit (on a CPU with the same number of threads and processes). "auto": if there is one, of a
            run with this config and ``checkpoint``, else begin. "restart": if this launch of torchrun has
            begun in ``out``, else False.
        console: a rich Console; default: standard output. Only rank 0 writes to it.

    Raises:
        FileExistsError: ``out`` is not empty and the run is not resumed, or it is another run's.
        CheckpointError: a checkpoint that cannot be used, or not with this config.
        ValueError: images without labels, or that do not suit the backbone.
        NonFiniteLossError: the loss or the weights are not finite any more.
        Disagreement: the processes were given different arguments.
        PeerFailedError: another process died or failed.
    """
    if (resume is True) == (checkpoint is not None):
        raise ValueError(f"give either a checkpoint to start from or resume, got {checkpoint!r} and {resume}")
    with joined(config.device), FolderLock() as lock:
        return _finetune(config, out, checkpoint, resume, console or new_console(), lock)


def _finetune(
    config: FinetuneConfig,
    out: Path,
    checkpoint: str | os.PathLike[str] | None,
    resume: Resume,
    console: Any,
    lock: FolderLock,
) -> FinetuneOutcome:
    everywhere = console
    if rank() > 0:
        console = new_console(quiet=True)
    run = open_run(config, out, resume, checkpoint=None if checkpoint is None else str(checkpoint))
    config, saved = run.config, run.saved
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)

    # data
    start = load_pretrained(
        out if saved or checkpoint is None else checkpoint, arch=config.arch, image_size=config.image_size
    )
    dataset = first_on_machine(lambda: dataset_for(start, config.data, console.print))
    need_labels(dataset, "learned")
    assert dataset.train.labels is not None and dataset.test is not None
    train, test = dataset.train, dataset.test
    if config.labels_fraction < 1:
        train = train.subset(labelled_fraction(dataset.train.labels, config.labels_fraction, config.seed))
    assert train.labels is not None
    labels, classes = train.labels, len(dataset.class_names)
    config = _fit_to(len(train), config, console)
    sizes = len(train), len(test)
    counts = *sizes, dataset.class_names, start.channels, start.mean, start.std
    check_agreement({"the dataset": (dataset.name, *counts)})
    loader = BatchLoader(
        train, config.batch_size // world_size(), config.seed, config.workers, rank=rank(),
        world_size=world_size(), pin_memory=device.type == "cuda", log=everywhere.print,
    )  # fmt: skip
    steps_per_epoch = len(loader)
    if saved and list(dataset.class_names) != (trained := saved["moco_fast"]["class_names"]):
        raise CheckpointError(
            f"data must have the classes that the run in {out} was trained on, {shortened(trained)}; "
            f"{dataset.name!r} has {shortened(dataset.class_names)}"
        )
    run.check_epochs(config, steps_per_epoch)
    data = {"images": sizes, "mean": start.mean, "std": start.std}
    run.tell_changes(config, data, console.print)
    total = config.epochs * steps_per_epoch
    view = View(start.image_size, start.mean, start.std, device, config.workers)
    augment = config.augment(start.image_size)
    randomness = torch.Generator().manual_seed(config.seed)

    # model
    torch.manual_seed(config.seed)
    backbone = start.fresh() if config.from_scratch and not saved else start.backbone
    model = Classifier(backbone, start.head, start.width, classes)
    model = model.to(device).to(memory_format=torch.channels_last)
    torch.manual_seed(config.seed + rank())  # dropout and the like differ between processes
    groups = parameter_groups(model, config.decay, config.layer_decay)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = AdamW(groups, config.peak_lr)
    else:
        optimizer = SGD(groups, config.peak_lr, momentum=SGD_MOMENTUM)
    step = 0 if saved is None else run.restore(model, optimizer, randomness)
    begin = saved["moco_fast"]["start"] if saved else str(checkpoint)
    run.describe(config, lock, start=begin, dataset=dataset.note)
    replica = data_parallel(model, device)
    if saved:
        method = saved["moco_fast"]["config"]["method"]
    else:
        method = "supervised" if config.from_scratch else f"{start.method}, fine-tuned"
    what = f"{method} {start.arch}, {classes} classes"
    console.print(
        opening(dataset, len(train), what, device, total - step, config.batch_size, out),
        highlight=False, soft_wrap=True,
    )  # fmt: skip

    def save() -> None:
        facts = {
            # as in a checkpoint of pretraining, whose reader serves for both
            "config": {
                "method": method,
                "augment": {"image_size": start.image_size},
                "width": start.first_width,
                "dim": classes,
                "seed": config.seed,
                "canvas": start.canvas,
                "data": config.data or start.data,
            },
            "channels": start.channels,
            "mean": list(start.mean),
            "std": list(start.std),
            "images": list(sizes),
            "finetune": config.to_dict(),
            "start": begin,
            "class_names": list(dataset.class_names),
        }
        run.save(
            model, optimizer, randomness, arch=start.arch, step=step, steps_per_epoch=steps_per_epoch,
            facts=facts,
        )  # fmt: skip

    recorder = Recorder(out if rank() == 0 else None, step, console.print)
    meter = Meter(loader, config.batch_size, out)

    def record() -> None:
        """Write down and show the losses of the steps since the last record."""
        values = meter.fetch(step)
        if not values:
            return
        values |= {"epoch": step / steps_per_epoch, "lr": rate}
        display.metrics(step, values)
        recorder.write(step, train_loss=values.pop("loss"), **values)

    scores: Scores | None = None
    measured = recorder.last("test_acc1")

    def measure() -> None:
        """Test the model at the end of an epoch."""
        nonlocal scores, measured
        scores, measured = _evaluate(model, test, view, classes), step
        recorder.write(step, test_loss=scores.loss, test_acc1=scores.acc1, test_acc5=scores.acc5)
        display.say(
            f"epoch {step // steps_per_epoch}: test accuracy {scores.acc1:.2%}, among the first five "
            f"{scores.acc5:.2%}"
        )
        meter.restart()  # measuring is not training

    stopped, rate = 0, 0.0
    chance = math.log(classes)
    with StopRequest() as stop, Display(console, total, step, chance, "fine-tuning") as display:
        try:
            model.train()
            while step < total and not stopped:
                epoch, skipped = divmod(step, steps_per_epoch)
                if step > measured and not skipped:
                    measure()
                for read in loader.batches(epoch, skipped):
                    rate = cosine(config.peak_lr, config.epochs, config.warmup_epochs, step, steps_per_epoch)
                    for group in optimizer.param_groups:
                        group["lr"] = rate * group["lr_scale"]
                    images = read.images.to(device, non_blocking=True).expand(-1, start.channels, -1, -1)
                    drawn = randomness, read.aspect, (rank(), world_size())
                    seen = random_view(images, augment, start.mean, start.std, *drawn)
                    targets = labels[read.indices].to(device, non_blocking=True)
                    optimizer.zero_grad()
                    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                        logits = replica(seen)
                    loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
                    loss.backward()
                    optimizer.step()
                    meter.add({"loss": loss.detach()})
                    step += 1
                    display.advance(step)
                    if step % config.log_every == 0 or step % steps_per_epoch == 0:
                        record()
                    stopped = largest(stop.signal or 0)[0]
                    if stopped:
                        break
                    # Also before measuring, for which whoever ends a run may not wait.
                    if step % config.checkpoint_every == 0 or step % steps_per_epoch == 0:
                        record()
                        save()
            if stopped:
                record()
                save()
            elif step > measured:
                measure()
        finally:
            recorder.close()

    ended_by = signal.Signals(stopped) if stopped else None
    if step > 0:
        on_rank_0(lambda: draw_curves(out, console.print))
    if ended_by:
        console.print(f"{ended_by.name}: saved step {step}. Continue with: moco-fast finetune --resume {out}")
        return FinetuneOutcome(out, step, ended_by, len(train), None)
    scores = scores or _evaluate(model, test, view, classes)  # a finished run may be resumed
    heading = f"{dataset.short_name}, {start.arch}, {method}"
    on_rank_0(lambda: plot_confusion(scores.confusion, dataset.class_names, out / "confusion.png", heading))
    return FinetuneOutcome(out, step, None, len(train), scores)


def _evaluate(model: Classifier, test: ImageSet, view: View, classes: int) -> Scores:
    """Scores on central views of all test images, which the processes share out among them."""
    assert test.labels is not None
    average_statistics_(model)
    logits = all_features(model, test, torch.arange(len(test)), view).cpu()
    best = logits.topk(min(5, classes), dim=1).indices
    return Scores(
        F.cross_entropy(logits, test.labels).item(),
        accuracy_at(best, test.labels, 1),
        accuracy_at(best, test.labels, 5),
        confusion(best[:, 0], test.labels, classes),
    )


def _fit_to(images: int, config: FinetuneConfig, console: Any) -> FinetuneConfig:
    """A batch that the images fill and the processes can share, said where it differs from the config's."""
    if config.batch_size % world_size():
        raise ValueError(f"batch_size={config.batch_size} must be a multiple of the {world_size()} processes")
    size = min(config.batch_size, images - images % world_size())
    if size == config.batch_size:
        return config
    if size < 2 * world_size():  # batch norm needs two
        raise ValueError(f"{images} training images are too few for {world_size()} processes, each needs two")
    console.print(f"{images} training images: batch_size {config.batch_size} -> {size}.")
    return replace(config, batch_size=size)
