"""A training step over several processes, ours beside the official scheme: ``python -m bench.ranks``.

Processes of one machine form a gloo group and train a small ResNet under DistributedDataParallel: the
official scheme (all images and keys gathered everywhere, the order and the queue broadcast), ours, and ours
with its all_gather peer. Bytes are those of tensors that arrive at a rank, counted by a process group that
wraps gloo; gradients, which are the same for all, are left out. Times take turns, and are those of the
slowest rank.

With ``--gbit 1`` each process is on a machine of its own behind a cable of 1 Gb/s (``bench.machines``), and
what a step saves is held against what its bytes alone should take there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import moco_fast
from bench import counting_group, device, machines, measure, ranks_plot, report
from bench.eager_moco import EagerDistributedMoCo
from moco_fast import distributed
from moco_fast.models.backbones import SMALL_RESNET, backbone

OFFICIAL, GATHERED, OURS = "official scheme", "moco_fast, all_gather", "moco_fast"
WAYS = [OFFICIAL, GATHERED, OURS]
KINDS = ("all_to_all", "all_gather", "broadcast")
WORLDS, QUICK_WORLDS = (2, 4, 8), (2,)
# Of each rank. The queue is the paper's; the encoder is small, for all ranks share one machine.
BATCH, CHANNELS, PIXELS, DIM, SLOTS = 32, 3, 32, 128, 65536
COUNTED_STEPS, ROUNDS, QUICK_ROUNDS = 3, 15, 1


class Step:
    """A model under DistributedDataParallel with its optimizer and views; a call is one training step."""

    def __init__(self, name: str, slots: int) -> None:
        torch.manual_seed(0)
        make = EagerDistributedMoCo if name == OFFICIAL else moco_fast.MoCo
        model = make(backbone(SMALL_RESNET, width=8, in_channels=CHANNELS), DIM, slots, 0.999, 0.2, mlp=True)
        self.name, self.model = name, DistributedDataParallel(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
        torch.manual_seed(distributed.rank())
        self.views = [torch.randn(BATCH, CHANNELS, PIXELS, PIXELS) for _ in range(2)]

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        if self.name == OFFICIAL:
            loss = F.cross_entropy(*self.model(*self.views))
        else:
            with distributed.use_scheme("all_gather" if self.name == GATHERED else "all_to_all"):
                loss = self.model(*self.views, return_loss=True)
        loss.backward()
        self.optimizer.step()


def _rank(rank: int, world: int, folder: str, rounds: int, slots: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    if names:
        machines.move_to(names[rank])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    counting_group.register()
    dist.init_process_group(
        "counting", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    group = dist.group.WORLD
    assert isinstance(group, counting_group.CountingGroup)
    steps = {name: Step(name, slots) for name in WAYS}
    received: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        step()  # what is agreed upon once is not counted
        group.received.clear()
        for _ in range(COUNTED_STEPS):
            step()
        received[name] = {kind: group.received[kind] / COUNTED_STEPS for kind in KINDS}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, step in steps.items():
            dist.barrier()
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    Path(folder, str(rank)).write_text(json.dumps({"received": received, "times": times}))
    dist.destroy_process_group()


def measure_world(
    world: int, rounds: int = ROUNDS, slots: int = SLOTS, gbit: float | None = None
) -> list[dict]:
    """Bytes per rank and step, and milliseconds per step, of every way on ``world`` processes."""
    apart = machines.machines(world, gbit) if gbit else nullcontext([])
    with tempfile.TemporaryDirectory() as folder, apart as made:
        names = [machine.name for machine in made]
        mp.spawn(_rank, (world, folder, rounds, slots, names), nprocs=world)
        found = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world)]
    ways = []
    for name in WAYS:
        received = {kind: statistics.mean(one["received"][name][kind] for one in found) for kind in KINDS}
        slowest = [max(times) for times in zip(*(one["times"][name] for one in found), strict=True)]
        ways.append({"name": name, "received": received, **measure.percentiles(slowest)})
    return ways


def least_ms(world: int, way: dict, gbit: float) -> float:
    """What the bytes of a step take at this speed, as in ``bench.cost_model`` without latency."""
    # Rank 0 sends what is broadcast and receives none of it: the mean over ranks is less than what one gets.
    shares = {"all_to_all": 1, "all_gather": 1, "broadcast": world / (world - 1)}
    return sum(way["received"][kind] * share for kind, share in shares.items()) * 8e-6 / gbit


def table(results: dict[int, list[dict]], gbit: float | None = None) -> Table:
    """One row per number of processes and way."""
    shown = Table(box=box.SIMPLE_HEAD)
    columns = [
        "W",
        "",
        *(f"{kind}, KB" for kind in KINDS),
        "of official",
        "p20 / p50 / p80 of a step",
        "vs official",
        *(("saved", "by bytes alone") if gbit else ()),
    ]
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 1 else "right", no_wrap=True)
    for world, ways in results.items():
        official = ways[WAYS.index(OFFICIAL)]
        for way in ways:
            saved = []
            if gbit:
                measured = official["p50_ms"] - way["p50_ms"]
                expected = least_ms(world, official, gbit) - least_ms(world, way, gbit)
                saved = [f"{report.digits(ms)} ms" for ms in (measured, expected)]
            shown.add_row(
                str(world),
                way["name"],
                *(report.digits(way["received"][kind] / 1e3) for kind in KINDS),
                f"{sum(way['received'].values()) / sum(official['received'].values()):.2%}",
                report.duration(way["p20_ms"], way["p50_ms"], way["p80_ms"]),
                f"{official['p50_ms'] / way['p50_ms']:.2f}x",
                *saved,
                style="bold green" if way["name"] == OURS else None,
            )
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=__doc__.split("\n")[0])
    report.add_options(parser)
    parser.add_argument("--doc", type=Path, help="document whose table is replaced")
    parser.add_argument("--gbit", type=float, help="Gb/s of the cables between machines; needs root")
    options = parser.parse_args(arguments)
    gbit, section = options.gbit, "cables" if options.gbit else "ranks"
    if options.doc:
        report.check_section(options.doc, section)
    if gbit and (reason := machines.unavailable()):
        parser.error(f"--gbit needs machines: {reason}")
    console = Console()
    if not console.is_terminal:
        console.width = 180  # of a log, where nothing limits a table
    about = device.describe(1, torch.device("cpu"))
    worlds, rounds = (QUICK_WORLDS, QUICK_ROUNDS) if options.quick else (WORLDS, ROUNDS)
    place = f"on a machine of its own behind a cable of {gbit:g} Gb/s" if gbit else "on the same machine"
    slots = 256 if options.quick else SLOTS
    results = {
        world: measure_world(world, rounds, slots, gbit)
        for world in track(worlds, "processes", console=console, disable=not console.is_terminal)
    }
    note = (
        f"{about['processor']}, {os.cpu_count()} cores in all; torch {about['torch']}; {about['date'][:10]}. "
        f"Each process is {place} and has {BATCH} images {CHANNELS}x{PIXELS}x{PIXELS} in fp32, K={slots}, "
        f"C={DIM}. KB are what arrives at a rank in a step, gradients left out; times those of the slowest "
        "rank."
    )
    console.print(note, highlight=False)
    console.print(table(results, gbit))
    if options.doc:
        report.write_section(
            options.doc, f"\n{note}\n\n{report.markdown_table(table(results, gbit))}\n", section
        )
    base = report.folder(options) / f"{about['name']}-{section}"
    figures = {
        "device": about,
        "quick": options.quick,
        "gbit": gbit,
        "worlds": {str(w): ways for w, ways in results.items()},
    }
    report.write_json(base.with_suffix(".json"), figures)
    ranks_plot.plot(base.with_suffix(".png"), figures)
    console.print(f"wrote {base}.json and {base}.png")


if __name__ == "__main__":
    main()
