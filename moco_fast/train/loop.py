"""Pretraining, from images to a checkpoint: config, data, model, step, record, save."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco_fast.data.augment import TwoCrops, random_view
from moco_fast.data.datasets import load_dataset
from moco_fast.data.loader import BatchLoader
from moco_fast.distributed import check_agreement, from_all, largest, rank, world_size
from moco_fast.evaluate.pictures import plot_curves
from moco_fast.evaluate.probe import KnnProbe
from moco_fast.extras import extra
from moco_fast.models.memory_bank import MemoryBank
from moco_fast.models.moco import MoCo
from moco_fast.norm import average_statistics_, sees_neighbours
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.build import (
    build_model,
    build_optimizer,
    channel_statistics,
    check_processes,
    choose_device,
    fit_to_dataset,
    input_channels,
    replicated,
)
from moco_fast.train.collapse import CollapseAlarm, EmbeddingWatch
from moco_fast.train.config import PretrainConfig
from moco_fast.train.display import Display, opening
from moco_fast.train.interrupt import StopRequest
from moco_fast.train.meter import Meter, check_weights
from moco_fast.train.methods import METHODS, Facts, Views
from moco_fast.train.presets import moved_to
from moco_fast.train.processes import first_on_machine, joined, on_rank_0
from moco_fast.train.record import METRICS_FILE, Recorder
from moco_fast.train.schedule import learning_rate

KNN_MEASUREMENTS = 4  # during a run whose config leaves the choice
# Options that decide which weights a model has.
SHAPING = ("arch", "width", "dim", "queue_size", "mlp_dim", "pred_dim", "prototypes")


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    interrupted: signal.Signals | None
    collapsed: bool
    """Whether the embeddings had collapsed when it ended."""
    accuracy: dict[str, float]
    """kNN accuracy of "raw pixels", "random init" and "trained"; empty if not measurable."""


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool | Literal["auto"] = False,
    console: Any = None,
) -> Outcome:
    """Pretrain a method and leave a run folder.

    Every process that torchrun started calls this with the same arguments; ``config.batch_size`` is shared
    out among them.

    The folder gets ``checkpoint.pth`` (the official layout), ``config.json``, ``metrics.jsonl``,
    ``tensorboard/``, ``curves.png`` and ``neighbours.png``.

    Args:
        config: the recipe.
        out: run folder.
        resume: continue from the checkpoint in ``out``; losses are then those of an unbroken run, bit for bit
            (on a CPU with the same number of threads and processes). "auto": if there is one, else begin.
        console: a rich Console; default: standard output. Only rank 0 writes to it.

    Raises:
        FileExistsError: ``out`` is not empty and ``resume`` is False.
        NonFiniteLossError: the loss or the weights are not finite any more.
        Disagreement: the processes were given different arguments or hold different queues.
        PeerFailedError: another process died or failed.
    """
    with joined(config.device):
        return _pretrain(config, out, resume, console or extra("rich.console").Console())


def _pretrain(config: PretrainConfig, out: Path, resume: bool | str, console: Any) -> Outcome:
    everywhere = console
    if rank() > 0:
        console = extra("rich.console").Console(quiet=True)
    check_agreement({"the config": config.to_dict(), "out": str(out), "resume": resume})
    if not resume:
        on_rank_0(lambda: refuse_to_overwrite(out))
    saved = None
    if resume is True or (resume and on_rank_0((out / checkpoints.FILE_NAME).exists)):
        saved = checkpoints.read(out)
        if missing := {"shuffle", "random", "queues"} - saved["moco_fast"].keys():
            raise checkpoints.CheckpointError(f"{out} is of another version: it lacks {sorted(missing)}")
        if resume is True:
            check_same_method(saved["moco_fast"]["config"].get("method"), config.method, out)
        if resume == "auto":  # with what the run made of its arguments
            config = PretrainConfig.from_dict(saved["moco_fast"]["config"])
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    check_processes(config, device)

    # data
    size = config.augment.image_size
    dataset = first_on_machine(
        lambda: load_dataset(config.data, canvas=round(size * config.canvas), log=console.print)
    )
    if (config.data, dataset.name) == ("fashion-mnist", "digits"):  # the fallback, which was announced
        config = moved_to(config, "digits")
        size = config.augment.image_size
    if saved is None:
        config = fit_to_dataset(config, dataset, console.print)
    channels = input_channels(config, dataset)
    mean, std = channel_statistics(dataset, channels)
    counts = len(dataset.train), len(dataset.test or ())
    check_agreement({"the dataset": (dataset.name, *counts, dataset.class_names, channels, mean, std)})
    loader = BatchLoader(
        dataset.train, config.batch_size // world_size(), config.seed, config.workers, rank=rank(),
        world_size=world_size(), pin_memory=device.type == "cuda", log=everywhere.print,
    )  # fmt: skip
    two_crops = TwoCrops(config.augment, mean, std, config.augment_second)
    randomness = torch.Generator(device).manual_seed(config.seed)

    # model
    row = METHODS[config.method]
    labels = dataset.train.labels if row.needs_labels else None
    facts = Facts(len(dataset.train), len(dataset.class_names) if dataset.train.labels is not None else 0)
    model = build_model(config, channels, facts).to(device).to(memory_format=torch.channels_last)
    watch = EmbeddingWatch(model.encoder)
    if config.sync_bn and world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world_size() > 1 and row.undivided and sees_neighbours(model.encoder):
        console.print(
            f"Batch norm takes statistics per process, and {config.method} shuffles no images: views that "
            "share them can be told by them. --sync-bn True takes statistics over all processes.",
            soft_wrap=True,
        )
    torch.manual_seed(config.seed + rank())  # dropout and the like differ between processes
    optimizer = build_optimizer(model, config)

    # kNN accuracy of pixels and of the untrained encoder: what the training has to beat
    probe = KnnProbe(
        dataset, image_size=size, mean=mean, std=std, device=device,
        k=config.knn_k, bank=config.knn_bank, workers=config.workers,
    )  # fmt: skip
    on_rank_0(lambda: out.mkdir(parents=True, exist_ok=True))
    accuracy: dict[str, float] = {}
    step = 0
    if saved is not None:
        extras = saved["moco_fast"]
        _load_model(model, saved, config)
        optimizer.load_state_dict(saved["optimizer"])
        for group in optimizer.param_groups:  # the config may have been overridden, and is what gets recorded
            group.update(weight_decay=config.weight_decay)
            if "momentum" in group:
                group["momentum"] = config.sgd_momentum
        randomness.set_state(extras["views"])
        if isinstance(model, MoCo) and extras["shuffle"] is not None:
            model.shuffle.set_state(extras["shuffle"])
        if isinstance(model, MemoryBank) and extras.get("negatives") is not None:  # of older versions' runs
            model.generator.set_state(extras["negatives"])
        checkpoints.set_random_state(extras["random"][rank() % len(extras["random"])])
        if extras["queues"] and config.queue_sync == "local":
            model.load_state_dict(model.state_dict() | extras["queues"][rank() % len(extras["queues"])])
        step, accuracy = extras["step"], dict(extras["accuracy"])
        if isinstance(model, MoCo):
            model.verify_queue()
    elif reason := probe.measurable():
        console.print(f"No kNN accuracy: {reason}.")
    else:
        accuracy = on_rank_0(
            lambda: {"raw pixels": probe.accuracy(None), "random init": probe.accuracy(model)}
        )
    replica = replicated(model, config, device)

    steps_per_epoch = len(loader)
    total = config.epochs * steps_per_epoch
    if step < total:
        accuracy.pop("trained", None)  # of fewer epochs, where a finished run is prolonged
    chance = row.chance(config) if row.chance else None
    knn_every = config.knn_every or max(1, total // KNN_MEASUREMENTS)
    description = json.dumps(config.to_dict() | {"dataset": dataset.note}, indent=2) + "\n"
    on_rank_0(lambda: (out / "config.json").write_text(description))
    what = f"{config.method} with {config.arch}"
    console.print(
        opening(dataset, len(dataset.train), what, device, total - step, config.batch_size, out),
        highlight=False, soft_wrap=True,
    )  # fmt: skip

    def save() -> None:
        check_weights(model, step, out)
        average_statistics_(model)
        random = from_all(checkpoints.random_state())
        # One queue of every process, unless they are the same.
        queues, shuffle = [], None
        if isinstance(model, MoCo):
            shuffle = model.shuffle.state()
            if config.queue_sync == "local":
                state = model.state_dict()
                queues = from_all({name: state[name].cpu() for name in state if name.startswith("queue")})
        facts = {
            "config": config.to_dict(),
            "channels": channels,
            "mean": list(mean),
            "std": list(std),
            "accuracy": accuracy,
            "shuffle": shuffle,
            "negatives": model.generator.state() if isinstance(model, MemoryBank) else None,
            "queues": queues,
        }
        state = checkpoints.run_state(
            model, optimizer, arch=config.arch, step=step, steps_per_epoch=steps_per_epoch, views=randomness,
            random=random, facts=facts,
        )  # fmt: skip
        on_rank_0(lambda: checkpoints.write_atomic(out / checkpoints.FILE_NAME, state))

    recorder = Recorder(out if rank() == 0 else None, step)
    alarm = CollapseAlarm(grace=min(total // 10, steps_per_epoch), by_rank=not row.needs_labels)
    keys_per_image = row.keys_per_image(config)
    if step == 0 and accuracy:
        recorder.write(0, knn_raw_pixels=accuracy["raw pixels"], knn_random_init=accuracy["random init"])
    meter = Meter(loader, config.batch_size, out)

    def record() -> None:
        """Write down and show the metrics of the steps since the last record."""
        values = meter.fetch(step)
        if not values:
            return
        values |= {"epoch": step / steps_per_epoch, "lr": optimizer.param_groups[0]["lr"]}
        if chance is not None:
            values["chance_loss"] = chance
        if keys_per_image and config.queue_size:
            keys = step * config.batch_size * keys_per_image
            values["queue_fill"] = min(1.0, keys / config.queue_size)
        recorder.write(step, **values)
        display.metrics(step, values)
        if warning := alarm.look(step, values["spread"], values["rank"]):
            display.say(warning)

    stopped = 0  # the signal that ends the run on every process, at the same step
    with StopRequest() as stop, Display(console, total, step, chance) as display:
        try:
            model.train()
            while step < total and not stopped:
                epoch, start = divmod(step, steps_per_epoch)
                for read in loader.batches(epoch, start):
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(config, step, steps_per_epoch)
                    images = read.images.to(device, non_blocking=True).expand(-1, channels, -1, -1)
                    aspect = None if read.aspect is None else read.aspect.to(device, non_blocking=True)
                    part = rank(), world_size()
                    views: tuple[Tensor, ...]
                    if row.views == 1:
                        views = (random_view(images, config.augment, mean, std, randomness, aspect, part),)
                    else:
                        views = two_crops(images, randomness, aspect, part)
                    if config.bf16:  # as autocast would round them, but before they travel
                        views = tuple(view.bfloat16() for view in views)
                    optimizer.zero_grad()
                    batch = Views(
                        views[0], views[1] if len(views) > 1 else None,
                        read.indices.to(device, non_blocking=True),
                        None if labels is None else labels[read.indices].to(device, non_blocking=True),
                    )  # fmt: skip
                    metrics = _forward_backward(replica, batch, config, step / total, device)
                    meter.add(metrics | watch.stats())
                    optimizer.step()
                    step += 1
                    display.advance(step)
                    if step % config.log_every == 0 or step == total:
                        record()
                    if step % knn_every == 0 and accuracy and step < total:
                        record()
                        average_statistics_(model)
                        knn = on_rank_0(lambda: probe.accuracy(model, config.knn_queries))
                        recorder.write(step, knn=knn)
                        display.say(
                            f"step {step}: kNN accuracy {knn:.1%} (raw pixels {accuracy['raw pixels']:.1%})"
                        )
                        meter.restart()  # measuring is not training
                    if isinstance(model, MoCo) and step % config.verify_every == 0:
                        model.verify_queue()
                    stopped = largest(stop.signal or 0)[0]
                    if stopped:
                        break
                    if step % config.checkpoint_every == 0 or step == total:
                        record()
                        save()
            if stopped:
                record()
                save()
            elif accuracy and "trained" not in accuracy:  # else a finished run was resumed
                accuracy["trained"] = on_rank_0(lambda: probe.accuracy(model))
                recorder.write(step, knn=accuracy["trained"])
                save()
        finally:
            recorder.close()

    ended_by = signal.Signals(stopped) if stopped else None
    if ended_by:
        console.print(f"{ended_by.name}: saved step {step}. Continue with: moco-fast pretrain --resume {out}")
    else:
        on_rank_0(lambda: probe.gallery(model, out / "neighbours.png"))
    if step > 0:
        on_rank_0(lambda: plot_curves(out / METRICS_FILE, out / "curves.png"))
    return Outcome(out, step, ended_by, alarm.told, accuracy)


def _forward_backward(
    model: nn.Module, views: Views, config: PretrainConfig, progress: float, device: torch.device
) -> dict[str, Tensor]:
    """Add up the gradients of a batch, part by part; returns the means of loss and stats."""
    row = METHODS[config.method]
    found = []
    cut = [[None] * config.accumulation if x is None else x.chunk(config.accumulation) for x in views]
    parts = [Views(*part) for part in zip(*cut, strict=True)]
    ddp = model if isinstance(model, DistributedDataParallel) else None
    for i, part in enumerate(parts):
        # Gradients are averaged over processes once, with the last part.
        with ddp.no_sync() if ddp and i + 1 < len(parts) else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                loss, stats = row.step(model, part, config, progress)
            (loss / len(parts)).backward()
        found.append({"loss": loss.detach()} | stats)
    return {name: torch.stack([part[name] for part in found]).mean(0) for name in found[0]}


def check_same_method(trained: str | None, method: str, where: object) -> None:
    """Raise CheckpointError if a run shall go on with another method."""
    if trained != method:
        raise checkpoints.CheckpointError(
            f"method must be that of the checkpoint in {where}, {trained!r}, got {method!r}"
        )


def _load_model(model: nn.Module, saved: dict[str, Any], config: PretrainConfig) -> None:
    """Load the weights of a checkpoint; where they do not fit, say which of its run's options differ."""
    try:
        checkpoints.load_model(model, saved)
    except checkpoints.CheckpointError as error:
        trained, now = saved["moco_fast"]["config"], config.to_dict()
        differing = [
            f"{name}={now[name]!r}, was {trained[name]!r}"
            for name in SHAPING
            if now[name] != trained.get(name, now[name])
        ]
        if not differing:
            raise
        raise checkpoints.CheckpointError(
            f"{'; '.join(differing)}: a run goes on with the model that it has trained, leave this "
            f"option out or start a new run ({error})"
        ) from error


def refuse_to_overwrite(out: Path) -> None:
    """Raise FileExistsError unless a run folder is empty or not there."""
    if out.exists() and any(out.iterdir()):
        hint = f"resume it (--resume {out})" if (out / checkpoints.FILE_NAME).exists() else "empty it"
        raise FileExistsError(f"out {str(out)!r} is not empty: {hint}, or choose another --out")
