"""What exchanges between ranks cost in a step, beside the official scheme: ``python -m bench.cost_model``.

Bytes are counted from the shapes; ``tests/test_distributed_bytes.py`` holds them against a run. Times are
those of the alpha-beta model, a message of n bytes takes alpha + n / bandwidth, with the usual algorithms:

    all_gather  ring       (W - 1) alpha + (W - 1) n / bandwidth      n: what a rank contributes
    all_to_all  pairwise   (W - 1) alpha + (W - 1) / W n / bandwidth  n: what a rank holds
    broadcast   pipelined  ceil(log2 W) alpha + n / bandwidth

Source: Chan et al. 2007, "Collective communication: theory, practice, and experience", sections 4 and 5.

alpha and bandwidth of the links below are their vendors' figures, so times are lower bounds. Under torchrun
the script measures those of the group at hand instead, and how far the model is off:

    torchrun --nproc-per-node 4 -m bench.cost_model
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from bench import report

WORLDS = (2, 4, 8, 16, 64, 256, 1024)
IMAGE = 3 * 224 * 224  # values
QUEUE_BYTES = 65536 * 128 * 4


@dataclass(frozen=True)
class Link:
    """What connects a rank to the others."""

    name: str
    alpha: float  # seconds per message
    bandwidth: float  # bytes per second and direction, of one rank
    most: int = WORLDS[-1]  # ranks it can connect


LINKS = (
    Link("NVLink 4", 2e-6, 450e9, most=8),
    Link("InfiniBand NDR, a port per GPU", 2e-6, 50e9),
    Link("100 Gb Ethernet for 8 GPUs", 20e-6, 12.5e9 / 8),
)


@dataclass(frozen=True)
class Collective:
    """One collective of a step."""

    kind: str
    bytes: float  # n of the formulas

    def received(self, world: int) -> float:
        """Bytes that arrive at a rank."""
        shares = {"all_gather": world - 1, "all_to_all": (world - 1) / world, "broadcast": 1}
        return self.bytes * shares[self.kind]

    def seconds(self, world: int, link: Link) -> float:
        """By the alpha-beta model."""
        hops = math.ceil(math.log2(world)) if self.kind == "broadcast" else world - 1
        return hops * link.alpha + self.received(world) / link.bandwidth


def official(world: int, images: int, features: int) -> list[Collective]:
    """Images, keys for un-shuffling, keys for the queue, the order, and the queue in DDP's broadcast."""
    keys = images * features * 4
    return [
        Collective("all_gather", images * IMAGE * 4),
        Collective("all_gather", keys),
        Collective("all_gather", keys),
        Collective("broadcast", world * images * 8),
        Collective("broadcast", QUEUE_BYTES),
    ]


def ours(world: int, images: int, features: int, image_bytes: int) -> list[Collective]:
    """Images, keys, and the words by which ranks agree (16 bytes in log2 W rounds, as a broadcast)."""
    return [
        Collective("all_to_all", images * IMAGE * image_bytes),
        Collective("all_gather", images * features * 4),
        Collective("broadcast", 16 * math.ceil(math.log2(world))),
    ]


def schemes(world: int, images: int, features: int) -> dict[str, list[Collective]]:
    """By name."""
    return {
        "official, fp32": official(world, images, features),
        "moco_fast, fp32": ours(world, images, features, 4),
        "moco_fast, bf16": ours(world, images, features, 2),
        "moco_fast, uint8": ours(world, images, features, 1),
    }


def rows(images: int, features: int, links: tuple[Link, ...]) -> list[list[str]]:
    """The table's: W, scheme, MB, ms by link."""
    found = []
    for world in WORLDS:
        for name, collectives in schemes(world, images, features).items():
            megabytes = sum(c.received(world) for c in collectives) / 1e6
            seconds = [sum(c.seconds(world, link) for c in collectives) for link in links]
            reached = [world <= link.most for link in links]
            times = [report.digits(1e3 * t) if ok else "-" for t, ok in zip(seconds, reached, strict=True)]
            found.append([str(world), name, report.digits(megabytes), *times])
    return found


def measured_link(device: torch.device) -> tuple[Link, list[list[str]]]:
    """alpha and bandwidth of this group, by a small and a large all_to_all; and how far the model is off."""
    world, small, large = dist.get_world_size(), 64, 4 << 20

    def median(run: Callable[[], object], rounds: int = 30) -> float:
        times = []
        for _ in range(rounds):
            dist.barrier()
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        slowest = torch.tensor([statistics.median(times[5:])], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    def run(kind: str, size: int) -> Callable[[], object]:
        own, all_ = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (size, size * world))
        return {
            "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(own), own),
            "all_gather": lambda: dist.all_gather_into_tensor(all_, own),
            "broadcast": lambda: dist.broadcast(own, 0),
        }[kind]

    small, large = (size // world * world for size in (small, large))
    latency = median(run("all_to_all", small)) / (world - 1)
    rest = median(run("all_to_all", large)) - (world - 1) * latency
    name = f"measured: {dist.get_backend()}, {world} ranks"
    link = Link(name, latency, (world - 1) / world * large / max(rest, 1e-9))
    checks = []
    for kind in ("all_to_all", "all_gather", "broadcast"):
        for size in (small, large):
            found, model = median(run(kind, size)), Collective(kind, size).seconds(world, link)
            shown = [report.digits(1e3 * seconds) for seconds in (found, model)]
            checks.append([kind, f"{size:,}", *shown, f"{found / model:.2f}"])
    return link, checks


def table(columns: list[str], lines: list[list[str]]) -> Table:
    """Numbers to the right."""
    shown = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 1 else "right")
    for line in lines:
        shown.add_row(*line)
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Print the table; under torchrun measure first; with --doc write it into a document."""
    parser = argparse.ArgumentParser(prog="python -m bench.cost_model", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=32, help="images per rank (default: 32)")
    parser.add_argument("--features", type=int, default=128, help="features of a key (default: 128)")
    parser.add_argument("--doc", type=Path, help="document whose table between the cost markers is replaced")
    options = parser.parse_args(arguments)
    links, checks, console = LINKS, [], Console()
    if not console.is_terminal:
        console.width = 160
    speaks = True
    if "RANK" in os.environ:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        link, checks = measured_link(device)
        links, speaks = (*LINKS, link), dist.get_rank() == 0
        dist.destroy_process_group()
    if not speaks:
        return
    columns = ["W", "scheme", "MB per rank", *(f"ms, {link.name}" for link in links)]
    lines = rows(options.images, options.features, links)
    console.print(table(columns, lines))
    if checks:
        console.print(table(["collective", "bytes", "measured ms", "model ms", "ratio"], checks))
    if options.doc:
        report.write_section(options.doc, f"\n{report.markdown_table(table(columns, lines))}\n", "cost")


if __name__ == "__main__":
    main()
