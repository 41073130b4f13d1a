"""Run a function on several processes that form a gloo group, and collect what it returns."""

import contextlib
import multiprocessing
import os
import pickle
import time
import traceback
from datetime import timedelta

SECONDS = 120  # after which a test has hung
ATTEMPTS = 3  # at making a group: on a busy machine gloo may find a connection closed before anything has run

# Forked from a server that has imported torch and started no thread: a rank is there at once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch.distributed", "moco_fast.compat.builder", "moco_fast.optim", "torchvision.transforms"]
)


class RankFailed(AssertionError):
    """A rank raised; holds all ranks' tracebacks."""


class NoGroup(AssertionError):
    """A rank ended before there was a group."""


def run(world, function, *arguments, folder, seconds=SECONDS):
    """``[function(rank, *arguments) for every rank]``, each in its process; picklable functions only."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(NoGroup):
            return _run(world, function, arguments, folder, seconds)
    return _run(world, function, arguments, folder, seconds)


def _run(world, function, arguments, folder, seconds):
    folder = folder / f"{function.__name__}-{world}-{time.monotonic_ns()}"
    folder.mkdir()
    processes = [
        _context.Process(target=_rank, args=(rank, world, str(folder), function, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    grouped = True
    while grouped and any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
        ended = [rank for rank, process in enumerate(processes) if not process.is_alive()]
        grouped = all((folder / f"joined-{rank}").exists() for rank in ended)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    if not grouped:
        raise NoGroup(f"a rank of {world} ended before there was a group")
    assert not hung, f"ranks {hung} of {world} had not ended after {seconds} s"
    results = []
    for rank in range(world):
        file = folder / str(rank)
        assert file.exists(), f"rank {rank} ended with exit code {processes[rank].exitcode}"
        results.append(pickle.loads(file.read_bytes()))
    if failed := [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error]:
        raise RankFailed("\n".join(failed))
    return [value for value, _ in results]


def _rank(rank, world, folder, function, arguments):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    open(f"{folder}/joined-{rank}", "x").close()
    try:
        result = function(rank, *arguments), None
    except Exception:
        result = None, traceback.format_exc()
    with open(f"{folder}/{rank}.part", "wb") as file:
        pickle.dump(result, file)
    os.rename(f"{folder}/{rank}.part", f"{folder}/{rank}")
    if result[1] is None:
        dist.destroy_process_group()
    os._exit(0)  # without waiting for others: one that failed has left them in a collective
