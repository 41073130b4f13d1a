"""How a call is timed on a GPU: four modes, and what each answers.

* ``cold``: launched as it is, from an idle GPU, with nothing of it in the L2. CUDA events before and after
  it, so the host's launches count as far as the GPU waits for them. What one call costs.
* ``warm``: the same right after the same call, which left in the L2 what fits.
* ``graph, cold`` and ``graph, warm``: the call captured in a CUDA graph and replayed. A spinning kernel
  keeps the GPU busy until the replay is enqueued: device time alone, no launches in it.

The L2 is emptied by rewriting a buffer of twice its size, and then filled with lines that nothing has to
write back: the call would pay for that. A call that waits for the device or reads from
pageable memory cannot be captured, and says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, wraps

import torch
from torch import Tensor

COLD, WARM, GRAPH_COLD, GRAPH_WARM = "cold", "warm", "graph, cold", "graph, warm"
# About 0.2 ms at 2 GHz: longer than the host needs to enqueue a graph of a few hundred kernels. Up to 40 ms
# for those of more.
SPIN_CYCLES, MOST_CYCLES = 400_000, 80_000_000
WARM_UPS = 3
EMPTY_GRAPHS = 21

Call = Callable[[], object]


def timers(run: Call, device: torch.device) -> tuple[dict[str, Callable[[], float]], str | None]:
    """Timers of a call by mode, and why a CUDA graph cannot hold it, if it cannot."""
    modes = {COLD: _launched(run, device, cold=True), WARM: _launched(run, device, cold=False)}
    try:
        graph = capture(run, device)
    except Exception as error:  # of torch, of a driver, of somebody else's library: any type
        return modes, (str(error).strip() or type(error).__name__).split("\n")[0][:160]
    modes[GRAPH_COLD] = device_clock(graph.replay, device, prepare=lambda: flush_l2(device))
    modes[GRAPH_WARM] = device_clock(graph.replay, device, prepare=graph.replay)
    return modes, None


def _launched(run: Call, device: torch.device, cold: bool) -> Callable[[], float]:
    """A timer of a call from an idle GPU: the start event passes at once, so launches count."""

    def timer() -> float:
        if cold:
            flush_l2(device)
        else:
            run()
        torch.cuda.synchronize(device)
        return _between_events(run)[0]

    return timer


def device_clock(run: Call, device: torch.device, prepare: Call = lambda: None) -> Callable[[], float]:
    """A timer of what a call takes on the device: all of it is enqueued before any of it starts.

    Args:
        run: what to time; never waits. The kernel before it spins for as long as enqueueing takes.
        device: the current CUDA device.
        prepare: enqueued before it; decides what the L2 holds.
    """

    cycles = SPIN_CYCLES

    def timer() -> float:
        nonlocal cycles
        while True:
            torch.cuda.synchronize(device)
            prepare()
            torch.cuda._sleep(cycles)  # touches no memory: the L2 stays as prepared
            seconds, begun = _between_events(run)
            if not begun or cycles >= MOST_CYCLES:
                return seconds
            cycles *= 4

    return timer


def _between_events(run: Call) -> tuple[float, bool]:
    """Seconds on the device, and whether it had begun before all was enqueued."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    begun = start.query()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, begun


def flush_l2(device: torch.device) -> None:
    """Enqueue the rewriting of twice the size of the L2, and the reading of as much."""
    rewritten, read, total = _flush_buffers(device)
    rewritten.add_(1)
    torch.sum(read, dim=0, out=total)


@cache
def _flush_buffers(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    numel = 2 * torch.cuda.get_device_properties(device).L2_cache_size // 4
    return *(torch.zeros(numel, device=device) for _ in range(2)), torch.zeros((), device=device)


def empty_graph(device: torch.device) -> float:
    """Median seconds of a graph of one kernel that does nothing: what every figure of a graph contains."""
    graph = capture(lambda: torch.cuda._sleep(0), device)
    timer = device_clock(graph.replay, device, prepare=lambda: flush_l2(device))
    return statistics.median(timer() for _ in range(EMPTY_GRAPHS))


def capture(run: Call, device: torch.device) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph; its inputs are the tensors it closes over, which must stay alive.

    Raises:
        Exception: whatever the call or CUDA raises when it cannot be captured.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # warm up where lazy initialisation is allowed, beside the default stream
        for _ in range(WARM_UPS):
            run()
        # A call that waits for the device is found here: failing in the middle of a capture would leave the
        # allocator believing that the capture goes on.
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            run()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream current
    graph.replay()
    torch.cuda.synchronize(device)
    return graph


def peak_extra(run: Call, device: torch.device) -> int:
    """Bytes that a warm call of ``run`` allocates at its peak, beyond what was allocated before it."""
    run()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def tf32():
    """Let fp32 matrix products round their operands to TF32, inside the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def in_tf32(run: Callable) -> Callable:
    """The same call, with its fp32 matrix products in TF32."""

    @wraps(run)
    def wrapped(*arguments):
        with tf32():
            return run(*arguments)

    return wrapped
