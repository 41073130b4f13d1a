"""Pretraining, from images to a checkpoint: config, data, model, step, record, save."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco_fast.data.augment import TwoCrops, random_view
from moco_fast.data.datasets import load_dataset
from moco_fast.data.images import Dataset
from moco_fast.data.loader import BatchLoader
from moco_fast.distributed import check_agreement, largest, rank, to_rank_0, world_size
from moco_fast.evaluate.features import need_labels
from moco_fast.evaluate.probe import KnnProbe
from moco_fast.extras import new_console
from moco_fast.models.memory_bank import MemoryBank
from moco_fast.models.method import Method
from moco_fast.models.moco import MoCo
from moco_fast.norm import sees_neighbours
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
from moco_fast.train.collapse import CollapseAlarm, EmbeddingWatch, grace
from moco_fast.train.config import PretrainConfig
from moco_fast.train.display import Display, opening
from moco_fast.train.interrupt import StopRequest
from moco_fast.train.meter import Meter
from moco_fast.train.methods import METHODS, Facts, Views
from moco_fast.train.presets import moved_to
from moco_fast.train.processes import first_on_machine, joined, on_rank_0
from moco_fast.train.record import Recorder, draw_curves
from moco_fast.train.run import FolderLock, Resume, open_run
from moco_fast.train.schedule import learning_rate

NEEDED = {"step", "accuracy", "views", "random", "shuffle", "queues"}  # of a checkpoint to resume
KNN_MEASUREMENTS = 4  # during a run whose config leaves the choice


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
    resume: Resume = False,
    console: Any = None,
    measured: bool = False,
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
            (on a CPU with the same number of threads and processes). "auto": if there is one, of a run with
            this config, else begin. "restart": if this launch of torchrun has begun in ``out``, else False.
        console: a rich Console; default: standard output. Only rank 0 writes to it.
        measured: refuse images on which no accuracy can be measured, before anything is trained.

    Raises:
        FileExistsError: ``out`` is not empty and ``resume`` is False, or it is another run's.
        CheckpointError: a checkpoint that cannot be used, or not with this config.
        NonFiniteLossError: the loss or the weights are not finite any more.
        Disagreement: the processes were given different arguments or hold different queues.
        PeerFailedError: another process died or failed.
    """
    with joined(config.device), FolderLock() as lock:
        return _pretrain(config, out, resume, console or new_console(), measured, lock)


def _pretrain(
    config: PretrainConfig, out: Path, resume: Resume, console: Any, measured: bool, lock: FolderLock
) -> Outcome:
    everywhere = console
    if rank() > 0:
        console = new_console(quiet=True)
    run = open_run(config, out, resume)
    config, saved = run.config, run.saved
    if saved is None:
        config.check_milestones()
    elif missing := NEEDED - saved["moco_fast"].keys():
        raise checkpoints.CheckpointError(f"the checkpoint in {out} lacks {', '.join(sorted(missing))}")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    check_processes(config, device)

    # data
    size = config.augment.image_size
    dataset = first_on_machine(
        lambda: load_dataset(config.data, canvas=round(size * config.canvas), log=console.print)
    )
    if measured:
        need_labels(dataset)
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
    steps_per_epoch = len(loader)
    run.check_epochs(config, steps_per_epoch)
    data = {"images": counts, "classes": dataset.class_names, "mean": mean, "std": std}
    run.tell_changes(config, data, console.print)
    total = config.epochs * steps_per_epoch
    # As autocast would round them, but before they travel, and as the encoders read them.
    as_read = torch.bfloat16 if config.bf16 else torch.float32, torch.channels_last
    two_crops = TwoCrops(config.augment, mean, std, config.augment_second, *as_read)
    randomness = torch.Generator().manual_seed(config.seed)

    # model
    row = METHODS[config.method]
    labels = dataset.train.labels if row.needs_labels else None
    model = _model(config, channels, dataset, device, console)
    watch = EmbeddingWatch(model.encoder)
    torch.manual_seed(config.seed + rank())  # dropout and the like differ between processes
    optimizer = build_optimizer(model, config)

    rows = config.batch_size // world_size() // config.accumulation
    alarm = CollapseAlarm(grace(total, steps_per_epoch, rows), by_rank=not row.needs_labels)
    accuracy: dict[str, float] = {}
    step = 0
    if saved is not None:
        step = run.restore(model, optimizer, randomness)
        accuracy = dict(saved["moco_fast"]["accuracy"])
        alarm.set_state(saved["moco_fast"].get("collapse", alarm.state()))
        if isinstance(model, MoCo):
            _restore_queue(model, saved["moco_fast"], config)
        if isinstance(model, MemoryBank) and (negatives := saved["moco_fast"].get("negatives")) is not None:
            model.generator.set_state(negatives)
    run.describe(config, lock, dataset=dataset.note)

    # kNN accuracy of pixels and of the untrained encoder: what the training has to beat
    probe = KnnProbe(
        dataset, image_size=size, mean=mean, std=std, device=device,
        k=config.knn_k, bank=config.knn_bank, workers=config.workers,
    )  # fmt: skip
    if saved is None:
        if reason := probe.measurable():
            console.print(f"No kNN accuracy: {reason}.")
        else:
            accuracy = on_rank_0(
                lambda: {"raw pixels": probe.accuracy(None), "random init": probe.accuracy(model)}
            )
    replica = replicated(model, config, device)

    if step < total:
        accuracy.pop("trained", None)  # of fewer epochs, where a finished run is prolonged
    chance = row.chance(config) if row.chance else None
    knn_every = config.knn_every or max(1, total // KNN_MEASUREMENTS)
    what = f"{config.method} with {config.arch}"
    console.print(
        opening(dataset, len(dataset.train), what, device, total - step, config.batch_size, out),
        highlight=False, soft_wrap=True,
    )  # fmt: skip

    def save() -> None:
        facts = {
            "config": config.to_dict(),
            "channels": channels,
            "mean": list(mean),
            "std": list(std),
            "images": list(counts),
            "classes": list(dataset.class_names),
            "accuracy": accuracy,
            "collapse": alarm.state(),
            "shuffle": model.shuffle.state() if isinstance(model, MoCo) else None,
            "negatives": model.generator.state() if isinstance(model, MemoryBank) else None,
            "queues": _queues(model, config),
        }
        run.save(
            model, optimizer, randomness, arch=config.arch, step=step, steps_per_epoch=steps_per_epoch,
            facts=facts,
        )  # fmt: skip

    recorder = Recorder(out if rank() == 0 else None, step, console.print)
    last_knn = recorder.last("knn")
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
            keys //= world_size() if config.queue_sync == "local" else 1
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
                    if accuracy and step > last_knn and step % knn_every == 0:
                        knn, last_knn = on_rank_0(lambda: probe.accuracy(model, config.knn_queries)), step
                        recorder.write(step, knn=knn)
                        display.say(
                            f"step {step}: kNN accuracy {knn:.1%} (raw pixels {accuracy['raw pixels']:.1%})"
                        )
                        meter.restart()  # measuring is not training
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(config, step, steps_per_epoch)
                    images = read.images.to(device, non_blocking=True).expand(-1, channels, -1, -1)
                    drawn = randomness, read.aspect, (rank(), world_size())
                    views: tuple[Tensor, ...]
                    if row.views == 1:
                        views = (random_view(images, config.augment, mean, std, *drawn, *as_read),)
                    else:
                        views = two_crops(images, *drawn)
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
                    if isinstance(model, MoCo) and step % config.verify_every == 0:
                        model.verify_queue()
                    stopped = largest(stop.signal or 0)[0]
                    if stopped:
                        break
                    # Also before measuring, for which whoever ends a run may not wait.
                    if step % config.checkpoint_every == 0 or step % knn_every == 0 or step == total:
                        record()
                        save()
            if stopped:
                record()
                save()
            elif accuracy and "trained" not in accuracy:  # else a finished run was resumed
                accuracy["trained"] = on_rank_0(lambda: probe.accuracy(model))
                if step > last_knn:
                    recorder.write(step, knn=accuracy["trained"])
                save()
        finally:
            recorder.close()

    ended_by = signal.Signals(stopped) if stopped else None
    if ended_by:
        console.print(f"{ended_by.name}: saved step {step}. Continue with: moco-fast pretrain --resume {out}")
    if step > 0:
        on_rank_0(lambda: draw_curves(out, console.print))
    if not ended_by:
        on_rank_0(lambda: probe.gallery(model, out / "neighbours.png"))
    return Outcome(out, step, ended_by, alarm.told, accuracy)


def _model(
    config: PretrainConfig, channels: int, dataset: Dataset, device: torch.device, console: Any
) -> Method:
    """The model on its device, with batch norm as the recipe and the processes want it."""
    row = METHODS[config.method]
    facts = Facts(len(dataset.train), len(dataset.class_names) if dataset.train.labels is not None else 0)
    model = build_model(config, channels, facts).to(device).to(memory_format=torch.channels_last)
    if config.sync_bn and world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world_size() > 1 and row.undivided and sees_neighbours(model.encoder):
        console.print(
            f"Batch norm takes statistics per process, and {config.method} shuffles no images: views that "
            "share them can be told by them. --sync-bn takes statistics over all processes.",
            soft_wrap=True,
        )
    return model


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


def _queues(model: nn.Module, config: PretrainConfig) -> list[dict[str, Tensor]]:
    """One queue of every process, on rank 0; none where they are the same."""
    if not isinstance(model, MoCo) or config.queue_sync != "local":
        return []
    state = model.state_dict()
    return to_rank_0({name: state[name].cpu() for name in state if name.startswith("queue")})


def _restore_queue(model: MoCo, extras: dict[str, Any], config: PretrainConfig) -> None:
    """Give every process its own queue back, and the shuffle its state."""
    if extras["shuffle"] is not None:
        model.shuffle.set_state(extras["shuffle"])
    if extras["queues"] and config.queue_sync == "local":
        model.load_state_dict(model.state_dict() | extras["queues"][rank() % len(extras["queues"])])
    model.verify_queue()
