"""Run a function on several processes that form a gloo group, and collect what it returns."""

import multiprocessing
import os
import pickle
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

SECONDS = 120  # after which a test has hung

# Forked from a server that has imported torch and started no thread: a rank is there at once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch.distributed", "moco_fast.compat.builder", "moco_fast.optim", "torchvision.transforms"]
)


class RankFailed(AssertionError):
    """A rank raised; holds all ranks' tracebacks."""


def run(world, function, *arguments, folder, seconds=SECONDS):
    """``[function(rank, *arguments) for every rank]``, each in its process; picklable functions only."""
    folder = folder / f"{function.__name__}-{world}-{time.monotonic_ns()}"
    folder.mkdir()
    processes = [
        _context.Process(target=_rank, args=(rank, world, str(folder), function, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    files = {rank: folder / str(rank) for rank in range(world)}
    results = {rank: pickle.loads(file.read_bytes()) for rank, file in files.items() if file.exists()}
    if failed := [f"rank {rank}: {error}" for rank, (_, error) in results.items() if error]:
        raise RankFailed("\n".join(failed))  # also what others hang for
    assert not hung, f"ranks {hung} of {world} had not ended after {seconds} s"
    for rank, process in enumerate(processes):
        assert rank in results, f"rank {rank} ended with exit code {process.exitcode}"
    return [value for value, _ in results.values()]


def gloo_threads():
    """Names of this process's threads that gloo has started."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            names.append(Path(task, "comm").read_text().strip())
    return [name for name in names if "gloo" in name]


def assert_no_gloo_threads():
    """Linux may show one that has been joined a little longer."""
    deadline = time.monotonic() + 10
    while gloo_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gloo_threads() == []


def _rank(rank, world, folder, function, arguments):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"  # no rank leaves a group that another is still connecting to
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    try:
        result = function(rank, *arguments), None
    except Exception:
        result = None, traceback.format_exc()
    with open(f"{folder}/{rank}.part", "wb") as file:
        pickle.dump(result, file)
    os.rename(f"{folder}/{rank}.part", f"{folder}/{rank}")
    if result[1] is None and dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)  # without waiting for others: one that failed has left them in a collective
