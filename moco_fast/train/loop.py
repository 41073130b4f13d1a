"""Pretraining, from images to a checkpoint: config, data, model, step, record, save."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_fast._version import __version__
from moco_fast.data.augment import TwoCrops
from moco_fast.data.datasets import load_dataset
from moco_fast.data.loader import BatchLoader
from moco_fast.evaluate.pictures import plot_curves
from moco_fast.evaluate.probe import KnnProbe
from moco_fast.extras import extra
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.build import (
    build_model,
    channel_statistics,
    choose_device,
    fit_to_dataset,
    input_channels,
)
from moco_fast.train.config import PretrainConfig
from moco_fast.train.display import Display
from moco_fast.train.interrupt import StopRequest
from moco_fast.train.presets import moved_to
from moco_fast.train.record import METRICS_FILE, Recorder
from moco_fast.train.schedule import learning_rate

KNN_MEASUREMENTS = 4  # during a run whose config leaves the choice


class NonFiniteLossError(RuntimeError):
    """The loss or the weights became NaN or infinite; the last checkpoint is from before."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    interrupted: signal.Signals | None
    accuracy: dict[str, float]
    """kNN accuracy of "raw pixels", "random init" and "trained"; empty if not measurable."""


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool = False,
    console: Any = None,
) -> Outcome:
    """Pretrain MoCo and leave a run folder.

    The folder gets ``checkpoint.pth`` (the official layout), ``config.json``, ``metrics.jsonl``,
    ``tensorboard/``, ``curves.png`` and ``neighbours.png``.

    Args:
        config: the recipe.
        out: run folder.
        resume: continue from the checkpoint in ``out``; losses are then those of an unbroken run, bit for bit
            (on a CPU with the same number of threads).
        console: a rich Console; default: standard output.

    Raises:
        FileExistsError: ``out`` is not empty and ``resume`` is False.
        NonFiniteLossError: the loss or the weights are not finite any more.
    """
    console = console or extra("rich.console").Console()
    saved = checkpoints.read(out) if resume else None
    if saved is None and out.exists() and any(out.iterdir()):
        hint = f"resume it (--resume {out})" if (out / checkpoints.FILE_NAME).exists() else "empty it"
        raise FileExistsError(f"out {str(out)!r} is not empty: {hint}, or choose another --out")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)

    # data
    size = config.augment.image_size
    dataset = load_dataset(config.data, canvas=round(size * config.canvas), log=console.print)
    if (config.data, dataset.name) == ("fashion-mnist", "digits"):  # the fallback, which was announced
        config = moved_to(config, "digits")
        size = config.augment.image_size
    if saved is None:
        config = fit_to_dataset(config, dataset, console.print)
    channels = input_channels(config, dataset)
    mean, std = channel_statistics(dataset, channels)
    loader = BatchLoader(dataset.train, config.batch_size, config.seed, config.workers, log=console.print)
    views = TwoCrops(config.augment, mean, std)
    randomness = torch.Generator(device).manual_seed(config.seed)

    # model
    model = build_model(config, channels).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay
    )

    # kNN accuracy of pixels and of the untrained encoder: what the training has to beat
    probe = KnnProbe(
        dataset, image_size=size, mean=mean, std=std, device=device,
        k=config.knn_k, bank=config.knn_bank, workers=config.workers,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    accuracy: dict[str, float] = {}
    step = 0
    if saved is not None:
        extras = saved["moco_fast"]
        checkpoints.load_model(model, saved)
        optimizer.load_state_dict(saved["optimizer"])
        for group in optimizer.param_groups:  # the config may have been overridden, and is what gets recorded
            group.update(momentum=config.sgd_momentum, weight_decay=config.weight_decay)
        randomness.set_state(extras["views"])
        checkpoints.set_random_state(extras["random"])
        step, accuracy = extras["step"], dict(extras["accuracy"])
    elif reason := probe.measurable():
        console.print(f"No kNN accuracy: {reason}.")
    else:
        accuracy = {"raw pixels": probe.accuracy(None), "random init": probe.accuracy(model)}

    steps_per_epoch = len(loader)
    total = config.epochs * steps_per_epoch
    if step < total:
        accuracy.pop("trained", None)  # of fewer epochs, where a finished run is prolonged
    chance = math.log(config.queue_size + 1)
    knn_every = config.knn_every or max(1, total // KNN_MEASUREMENTS)
    (out / "config.json").write_text(
        json.dumps(config.to_dict() | {"dataset": dataset.note}, indent=2) + "\n"
    )
    console.print(
        f"{dataset.name}: {len(dataset.train):,} images ({dataset.note}). {config.arch} on {device}, "
        f"{total - step:,} steps of {config.batch_size}. Run folder: {out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip

    def save() -> None:
        try:
            checkpoints.check_finite(model)
        except ValueError as error:
            raise NonFiniteLossError(_explain(step, f"weights: {error}", out)) from error
        # "epoch" counts finished epochs, as in official files.
        state = {
            "epoch": step // steps_per_epoch,
            "arch": config.arch,
            "state_dict": checkpoints.model_state(model),
            "optimizer": optimizer.state_dict(),
            "moco_fast": {
                "version": __version__,
                "step": step,
                "config": config.to_dict(),
                "channels": channels,
                "mean": list(mean),
                "std": list(std),
                "accuracy": accuracy,
                "views": randomness.get_state(),
                "random": checkpoints.random_state(),
            },
        }
        checkpoints.write_atomic(out / checkpoints.FILE_NAME, state)

    recorder = Recorder(out, step)
    pending: list[Tensor] = []  # metrics of steps since the last record, still on the device
    if step == 0 and accuracy:
        recorder.write(0, knn_raw_pixels=accuracy["raw pixels"], knn_random_init=accuracy["random init"])
    began, waited = time.monotonic(), 0.0

    def record() -> None:
        """Fetch the metrics of the steps since the last record: the only wait for the device."""
        nonlocal began, waited
        if not pending:
            return
        rows = torch.stack(pending).cpu()
        first = step - len(pending) + 1
        pending.clear()
        finite = torch.isfinite(rows[:, 0])
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise NonFiniteLossError(_explain(first + bad, f"loss: {rows[bad, 0].item()}", out))
        now = time.monotonic()
        means = rows.mean(0).tolist()
        values = {
            "epoch": step / steps_per_epoch,
            **dict(zip(("loss", "pos_sim", "neg_sim", "acc1"), means, strict=True)),
            "chance_loss": chance,
            "lr": optimizer.param_groups[0]["lr"],
            "images_per_s": len(rows) * config.batch_size / (now - began),
            "data_wait": (loader.wait_seconds - waited) / (now - began),
            "queue_fill": min(1.0, step * config.batch_size / config.queue_size),
        }
        recorder.write(step, **values)
        display.metrics(step, values)
        began, waited = now, loader.wait_seconds

    with StopRequest() as stop, Display(console, total, step, chance) as display:
        try:
            model.train()
            while step < total and not stop.signal:
                epoch, start = divmod(step, steps_per_epoch)
                for batch in loader.batches(epoch, start):
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(config, step, steps_per_epoch)
                    images = batch.images.to(device, non_blocking=True).expand(-1, channels, -1, -1)
                    aspect = None if batch.aspect is None else batch.aspect.to(device)
                    im_q, im_k = views(images, randomness, aspect)
                    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                        loss, stats = model.loss(im_q, im_k, return_stats=True)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    step += 1

                    hits = (stats.rank == 0).float().mean()
                    pending.append(torch.stack([loss.detach(), stats.pos.mean(), stats.neg.mean(), hits]))
                    display.advance(step)
                    if step % config.log_every == 0 or step == total:
                        record()
                    if step % knn_every == 0 and accuracy and step < total:
                        record()
                        knn = probe.accuracy(model, config.knn_queries)
                        recorder.write(step, knn=knn)
                        display.say(
                            f"step {step}: kNN accuracy {knn:.1%} (raw pixels {accuracy['raw pixels']:.1%})"
                        )
                        began = time.monotonic()  # measuring is not training
                    if stop.signal:
                        break
                    if step % config.checkpoint_every == 0 or step == total:
                        record()
                        save()
            if stop.signal:
                record()
                save()
            elif accuracy and "trained" not in accuracy:  # else a finished run was resumed
                accuracy["trained"] = probe.accuracy(model)
                recorder.write(step, knn=accuracy["trained"])
                save()
        finally:
            recorder.close()

    if stop.signal:
        console.print(
            f"{stop.signal.name}: saved step {step}. Continue with: moco-fast pretrain --resume {out}"
        )
    else:
        probe.gallery(model, out / "neighbours.png")
    if step > 0:
        plot_curves(out / METRICS_FILE, out / "curves.png")
    return Outcome(out, step, stop.signal, accuracy)


def _explain(step: int, what: str, out: Path) -> str:
    if (out / checkpoints.FILE_NAME).exists():
        rest = f"The last good checkpoint stays in {out}: resume it with a lower --lr."
    else:
        rest = "No checkpoint had been written yet."
    return (
        f"not finite at step {step} ({what}). Likely causes: lr too high, no warm-up, temperature too low, "
        f"or broken images. {rest}"
    )
