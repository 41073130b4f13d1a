"""A whole training step of MoCo: ``python -m bench.step``.

The figure is the MoCo tax: the time of a step over that of the bare encoders
in the same run (forward q, backward q, forward k, a plain optimizer step; no
loss, EMA, queue). Ours with the fused loss, ours as a drop-in with logits and
cross-entropy, and the official semantics in eager PyTorch take turns; their
first losses, from one seed, must agree. Images are random and on the device:
the data loader is not part of this.

Extra memory is what a step needs at its peak beyond weights and optimizer
state. How the breakdown is taken stands in ``bench/stages.py``; its shuffle is
zero on one device without ``bn_splits``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn import functional as F

import moco_fast
from bench import cuda, device, measure, memory, report, stages, step_plot
from bench.case import OURS, WrongResult, reason
from bench.eager_moco import EagerMoCo
from moco_fast.models.backbones import SMALL_RESNET, backbone

BARE, FUSED, DROP_IN, EAGER = "bare encoders", f"{OURS} .loss", f"{OURS} logits", "official semantics"
FUSED_STEP = f"{OURS} .loss, EMA in SGD"
WAYS = [BARE, FUSED, FUSED_STEP, DROP_IN, EAGER]
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
BREAKDOWN_STEPS = 5
GPU_STEPS = 3  # between two events: the host runs ahead, as in training


@dataclass(frozen=True)
class Config:
    """One size of the whole step."""

    arch: str  # of torchvision, or the small ResNet of smoke runs
    batch: int
    pixels: int
    slots: int = 65536
    bf16: bool = False  # autocast, with channels_last

    def __str__(self) -> str:
        kind = "bf16 autocast, channels_last" if self.bf16 else "fp32"
        return f"{self.arch}, N={self.batch}, {self.pixels} px, K={self.slots}, {kind}"

    @property
    def name(self) -> str:
        """What ``--configs`` calls it."""
        return f"{self.arch}-{self.batch}{'-bf16' if self.bf16 else ''}"


GPU_CONFIGS = [
    Config(arch, batch, 224, bf16=bf16)
    for arch in ("resnet18", "resnet50")
    for batch in (32, 256)
    for bf16 in (False, True)
]
CPU_CONFIGS = [Config("resnet18", 16, 64)]
QUICK_CONFIGS = [Config(SMALL_RESNET, 4, 16, slots=64)]
SECONDS, QUICK_SECONDS = 12.0, 1e-3  # of timing per config


class Step:
    """A model with its optimizer and two views; a call is one training step."""

    def __init__(self, name: str, config: Config, where: torch.device) -> None:
        torch.manual_seed(0)  # one initial state and one batch for all
        make = moco_fast.MoCo if name.startswith(OURS) else EagerMoCo
        layout = torch.channels_last if config.bf16 else torch.contiguous_format
        model = make(backbone(config.arch, width=8), 128, config.slots, 0.999, 0.2, mlp=True)
        self.name, self.config, self.where = name, config, where
        self.model = model.to(where).to(memory_format=layout)
        if name == FUSED_STEP:
            ema = model.move_ema_into_step()
            self.optimizer = moco_fast.SGD(model.parameters(), **SGD, ema=ema, m=model.m)
        else:
            trained = model.encoder_q if name == BARE else model  # as in the official script: all of it
            self.optimizer = torch.optim.SGD(trained.parameters(), **SGD)
        shape = (config.batch, 3, config.pixels, config.pixels)
        self.views = [torch.randn(shape).to(where).to(memory_format=layout) for _ in range(2)]
        self.gradient = 1e-3 * torch.randn(config.batch, 128, device=where)  # to the bare queries

    def __call__(self, mark: Callable[[str], object] = lambda stage: None) -> torch.Tensor:
        self.optimizer.zero_grad()
        autocast = torch.autocast(self.where.type, torch.bfloat16) if self.config.bf16 else nullcontext()
        with autocast:
            if self.name == BARE:
                output = self.model.encoder_q(self.views[0])
                with torch.no_grad():
                    self.model.encoder_k(self.views[1])
            elif self.name in (FUSED, FUSED_STEP):
                output = self.model.loss(*self.views)
            else:
                output = F.cross_entropy(*self.model(*self.views))
        mark("loss")
        output.backward(self.gradient.to(output.dtype) if self.name == BARE else None)
        mark("encoders")
        self.optimizer.step()
        mark("optimizer")
        return output.detach()

    def timer(self) -> measure.Timer:
        """Seconds per step."""

        def on_cpu() -> float:
            begin = time.perf_counter()
            self()
            return time.perf_counter() - begin

        def on_gpu() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.where)
            start.record()
            for _ in range(GPU_STEPS):
                self()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / GPU_STEPS

        return on_gpu if self.where.type == "cuda" else on_cpu

    def breakdown(self) -> dict[str, float]:
        """Median milliseconds by stage."""
        clock = stages.Clock(self.where)
        found = []
        with stages.watch(self.model, clock):
            for _ in range(BREAKDOWN_STEPS):
                clock.start()
                self(clock.mark)
                found.append(clock.seconds())
        return {stage: statistics.median(one[stage] for one in found) * 1e3 for stage in stages.STAGES}


def measure_config(config: Config, where: torch.device, seconds: float) -> dict:
    """Time all ways of one size, and take each apart.

    A way that fails, or whose first loss is not the official one to rounding, is listed under "failed".
    What all are compared with has to run.
    """
    steps, failed = {name: Step(name, config, where) for name in (BARE, EAGER)}, {}
    steps[BARE]()
    official = float(steps[EAGER]())
    for name in WAYS:
        if name in steps:
            continue
        try:
            step = Step(name, config, where)
            loss = float(step())
            if not abs(loss / official - 1) < (3e-2 if config.bf16 else 1e-3):
                raise WrongResult(f"its loss is {loss}, that of {EAGER} {official}")
            steps[name] = step
        except Exception as error:  # of a compiler, a launch, a driver: any type
            failed[name] = reason(error)
    steps = {name: steps[name] for name in WAYS if name in steps}

    times = measure.interleave({name: step.timer() for name, step in steps.items()}, seconds)
    spread = {name: measure.percentiles(values) for name, values in times.items()}
    ways = []
    for name, step in steps.items():
        middle = spread[name]["p50_ms"]
        busy = stages.busy_seconds(step, where)
        ways.append(
            {
                "name": name,
                **spread[name],
                "tax": middle / spread[BARE]["p50_ms"],
                "images_per_s": config.batch / middle * 1e3,
                "extra_memory_mb": peak_extra(step, where) / 1e6,
                "stages_ms": {} if name == BARE else step.breakdown(),
                "host_gaps_ms": None if busy is None else max(middle - busy * 1e3, 0.0),
            }
        )
    return {
        "config": vars(config),
        "label": str(config),
        "rounds": len(times[BARE]),
        "ways": ways,
        "failed": [f"{config}: {name}: {why}" for name, why in failed.items()],
    }


def peak_extra(step: Step, where: torch.device) -> int:
    step.optimizer.zero_grad()  # so that gradients count for every way alike
    return cuda.peak_extra(step, where) if where.type == "cuda" else memory.peak_extra(step)


def table(result: dict) -> Table:
    """One row per way."""
    shown = Table(title=result["label"], title_justify="left", box=box.SIMPLE_HEAD)
    columns = ["", "p20 / p50 / p80", "tax", "images/s", "extra MB", *stages.STAGES, "host gaps"]
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left", no_wrap=i < 2)
    for way in result["ways"]:
        gaps = way["host_gaps_ms"]
        parts = [report.digits(way["stages_ms"][s]) if way["stages_ms"] else "" for s in stages.STAGES]
        shown.add_row(
            way["name"],
            report.duration(way["p20_ms"], way["p50_ms"], way["p80_ms"]),
            f"{way['tax']:.3f}",
            report.digits(way["images_per_s"]),
            f"{way['extra_memory_mb']:.0f}",
            *parts,
            "" if gaps is None else report.digits(gaps),
            style="bold green" if way["name"].startswith(OURS) else None,
        )
    return shown


def markdown(figures: dict) -> str:
    """What belongs between the markers of a document: a table per config."""
    device = figures["device"]
    parts = [f"{device['processor']}; {report.versions(device)}; stages in ms."]
    for result in figures["configs"]:
        parts += [f"{result['label']}:", report.markdown_table(table(result))]
    return "\n\n".join(parts)


def chosen(names: list[str] | None, quick: bool, where: torch.device) -> list[Config]:
    """The configs of a device, or those of these names.

    Raises:
        ValueError: it has none of that name.
    """
    configs = QUICK_CONFIGS if quick else GPU_CONFIGS if where.type == "cuda" else CPU_CONFIGS
    known = {config.name: config for config in configs}
    if unknown := set(names or ()) - known.keys():
        raise ValueError(f"no config {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write the JSON and the picture; the JSON after every config."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to measure")
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="only these, as resnet50-256-bf16")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="where to replace the tables between markers"
    )
    report.add_options(parser)
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = 180  # of a log, where nothing limits a table
    torch.backends.cudnn.benchmark = True  # fixed shapes, as in training
    try:
        where = device.pick(options.device)
        configs = chosen(options.configs, options.quick, where)
        if options.readme:  # before minutes of measuring, not after
            report.check_section(options.readme, "step")
        about = device.describe(measure.use_threads(), where)
        base = report.folder(options) / f"{about['name']}-step"
        figures = {"device": about, "quick": options.quick, "configs": [], "failed": []}
        with Progress(console=console) as progress:
            task = progress.add_task("", total=len(configs))
            for config in configs:
                progress.update(task, description=str(config))
                try:
                    result = measure_config(config, where, QUICK_SECONDS if options.quick else SECONDS)
                    figures["failed"] += result.pop("failed")
                    figures["configs"].append(result)
                except Exception as error:  # of a compiler, a launch, a driver: any type
                    figures["failed"].append(f"{config}: {reason(error)}")
                report.write_json(base.with_suffix(".json"), figures)
                progress.advance(task)
    except (OSError, ValueError) as error:
        raise SystemExit(f"python -m bench.step: {error}") from error

    console.print(f"{about['processor']}; torch {about['torch']}; stages in ms", highlight=False)
    for result in figures["configs"]:
        console.print(table(result))
    if figures["configs"]:
        step_plot.plot(base.with_suffix(".png"), figures)
    console.print(f"wrote {base}.json")
    if options.readme:
        report.write_section(options.readme, markdown(figures), "step")
        console.print(f"updated {options.readme}")
    if figures["failed"]:
        raise SystemExit("\n".join(["python -m bench.step: failed:", *figures["failed"]]))


if __name__ == "__main__":
    main()
