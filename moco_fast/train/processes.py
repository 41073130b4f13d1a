"""The processes of a run: joined as torchrun started them, and left with word of who failed.

Without torchrun's variables there is one process, and nothing here does anything.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moco_fast import distributed
from moco_fast.train.heartbeat import STORE_GONE, Heartbeat, died, silent
from moco_fast.train.meeting import Meeting, meet

T = TypeVar("T")

NOTICE_SECONDS = 5.0  # for every rank to say that it is still there after a failure
_ENDED = "ended/"
_LOST = "lost touch with the others"
_store: Any = None
_meeting: Meeting | None = None  # of this process, the first one


class PeerFailedError(RuntimeError):
    """Another process of the run died or failed; says which."""


def started_by_torchrun() -> bool:
    """Whether the environment names the processes of a run."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def restarted() -> bool:
    """Whether torchrun or SLURM has started this run again; once processes have joined, the same on all."""
    counts = (os.environ.get(name) or "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return _meeting.again if _meeting else any(int(count) > 0 for count in counts)


def one_process(command: str) -> None:
    """Raise ValueError if torchrun has started several of what runs in one."""
    if started_by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
        raise ValueError(f"{command} runs in one process: start it without torchrun")


def may_restart() -> bool:
    """Whether torchrun may do so."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def launch() -> str | None:
    """torchrun's name of this run, the same after a restart; "none" for all that it was given none for."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Be one of the processes that torchrun started, on a device of the given name.

    NCCL's group if that is a GPU, else gloo's. No effect if a group exists already. Nothing can call
    back a process from waiting for a machine that fell silent: it is ended, with word of who is gone.
    After an error on GPUs NCCL's group stays, and Python ends with exit status 1 without taking it down.

    Raises:
        ValueError: a device that several processes cannot share, or that this one cannot tell as its own.
        TimeoutError: not all processes came within :data:`moco_fast.train.meeting.PATIENCE`.
        PeerFailedError: another process died or failed meanwhile.
    """
    global _store, _meeting
    if dist.is_initialized() or not started_by_torchrun():
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu and ":" in device:
        raise ValueError(f"device must be auto, cpu or cuda for several processes, got {device!r}")
    if on_gpu and local_rank() >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(
            f"device {device!r} has no GPU for local rank {local_rank()}: this machine has {found}; "
            f"use --nproc-per-node {found} or --device cpu"
        )
    if on_gpu and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise ValueError("LOCAL_RANK must be set, as torchrun does: it tells which GPU is this process's")
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=distributed.PATIENCE)))
    meeting = meet(dist.PrefixStore("moco_fast/meeting", store), rank, size, restarted())
    _meeting = _meeting or meeting
    _store = dist.PrefixStore(f"moco_fast/{meeting.name}", store)
    heartbeat = Heartbeat(_store, rank, size, lambda who: _leave(who, rank, size))
    heartbeat.start()
    try:
        if on_gpu:
            torch.cuda.set_device(local_rank())
            atexit.register(_end_at_once)
        # NCCL keeps its own patience, for GPUs: what takes a rank long, others await over gloo.
        backend, patience = ("nccl", None) if on_gpu else ("gloo", distributed.PATIENCE)
        with distributed.reachable_interface():
            dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=patience)
        distributed.largest(0)  # nobody leaves, be it for an error, while others still connect
        yield
        distributed.largest(0)  # nobody leaves before all have come here
    except Exception as error:
        # torchrun ends the others as soon as it misses one: not before they have found out which.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        why = _LOST if _is_loss_of_contact(error) else f"{type(error).__name__}: {error}"
        _say(_ENDED + str(rank), why)
        if dist.is_initialized() and not on_gpu:
            # Closes connections: whoever waits for this rank learns of it at once. NCCL's group would wait
            # for the others here, who wait for this rank: they learn of it when the process ends.
            dist.destroy_process_group()
        if why is _LOST and (culprits := _culprits(size)):
            raise PeerFailedError(f"{culprits}; this was rank {rank} of {size}") from error
        raise
    else:
        heartbeat.stop()  # rank 0 may take the store along
        dist.destroy_process_group()
        gc.collect()  # models that hold the group: threads it has when Python ends may abort the process
        atexit.unregister(_end_at_once)
    finally:
        heartbeat.stop()
        _store = None


def _end_at_once() -> None:
    """End this process without NCCL's own end, which waits for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def on_rank_0(compute: Callable[[], T]) -> T:
    """Call on rank 0 alone and hand its result, or the exception it raised, to all."""
    if distributed.world_size() == 1:
        return compute()
    result, problem = None, None
    if distributed.rank() == 0:
        try:
            result = compute()
        except Exception as error:
            problem = error
    result, problem = distributed.from_rank_0((result, problem))
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]  # what rank 0 computed


def first_on_machine(compute: Callable[[], T]) -> T:
    """Call on the first process of every machine, then on the others: what downloads, say, does so once."""
    result, problem = None, None
    for turn in (True, False):
        if (local_rank() == 0) == turn and problem is None:
            try:
                result = compute()
            except Exception as error:
                problem = error
        distributed.check_agreement({}, problem)
    return result  # type: ignore[return-value]  # not None: one of the turns was this process's


def _is_loss_of_contact(error: Exception) -> bool:
    if isinstance(error, (distributed.Disagreement, PeerFailedError)) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection"))


def _say(key: str, what: str) -> None:
    with suppress(RuntimeError, OSError):  # the store may have gone with the machine that held it
        _store.set(key, what)


def _leave(who: str, rank: int, size: int) -> None:
    """End this process, whose main thread waits for others that are gone."""
    try:
        print(f"moco-fast: {who}; this was rank {rank} of {size}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def _culprits(size: int) -> str:
    """Who failed: ranks that do not say that they are there, or whose error was their own."""
    deadline = time.monotonic() + NOTICE_SECONDS
    said: dict[int, str] = {}
    try:
        if gone := silent(_store):  # those who found it out have left
            return gone
        while len(said) < size and time.monotonic() < deadline:
            for rank in set(range(size)) - said.keys():
                if _store.check([_ENDED + str(rank)]):
                    said[rank] = _store.get(_ENDED + str(rank)).decode()
            time.sleep(0.1)
    except (RuntimeError, OSError):
        return STORE_GONE
    unheard = sorted(set(range(size)) - said.keys())
    own = {rank: why for rank, why in sorted(said.items()) if why != _LOST}
    if own:
        return "; ".join(f"rank {rank} failed ({why})" for rank, why in own.items())
    if unheard:
        return died(unheard)
    return ""
