"""How a GPU is timed: the order of what is enqueued, without one; times, memory and results, with one."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("torchvision")
pytest.importorskip("rich")

from bench import collect, cuda, measure, report
from bench.case import OFFICIAL, OURS, Case, Peer


class FakeGPU:
    """What bench.cuda asks of torch.cuda, written down in order."""

    def __init__(self, monkeypatch, capturable=True):
        self.calls, self.debug, self.capturable = [], 0, capturable
        self.late = []  # whether the GPU has begun before all was enqueued, last call first
        self.spins = []
        log = self.calls.append

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log("event")

            def query(event):
                return bool(self.late) and self.late.pop()

            def synchronize(event):
                log("wait")

            def elapsed_time(self, end):
                return 2.0

        class Graph:
            def replay(self):
                log("replay")

        @contextmanager
        def block(name, *_):
            log(f"{name} begins")
            yield
            log(f"{name} ends")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": lambda graph: block("capture"),
            "stream": lambda side: block("side stream"),
            "Stream": lambda device: stream,
            "current_stream": lambda device=None: stream,
            "set_stream": lambda back: log("stream is back"),
            "synchronize": lambda device=None: log("synchronize"),
            "_sleep": lambda cycles: (log("spin"), self.spins.append(cycles)),
            "get_sync_debug_mode": lambda: self.debug,
            "set_sync_debug_mode": self.set_debug,
            "memory_allocated": lambda device: 100,
            "max_memory_allocated": lambda device: 350,
            "reset_peak_memory_stats": lambda device: log("reset"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(cuda, "flush_l2", lambda device: log("flush"))

    def set_debug(self, mode):
        self.debug = mode

    def run(self):
        self.calls.append("run")
        if self.debug == "error" and not self.capturable:
            raise RuntimeError("called a synchronizing CUDA operation\nand more")


GPU = torch.device("cuda", 0)
LAUNCHED = ["synchronize", "event", "run", "event", "wait"]


def test_what_every_mode_enqueues(monkeypatch):
    """The order on the stream, without a GPU: what is inside the events, and what comes before them."""
    gpu = FakeGPU(monkeypatch)
    modes, why = cuda.timers(gpu.run, GPU)
    assert why is None and gpu.debug == 0
    capture = gpu.calls.index("capture begins")
    assert gpu.calls[:capture] == ["side stream begins", *["run"] * 4, "side stream ends", "synchronize"]
    rest = ["run", "capture ends", "stream is back", "replay", "synchronize"]
    assert gpu.calls[capture + 1 :] == rest
    seen = {}
    for mode, timer in modes.items():
        gpu.calls.clear()
        assert timer() == 2e-3
        seen[mode] = list(gpu.calls)
    replayed = ["spin", "event", "replay", "event", "wait"]
    assert seen == {
        cuda.COLD: ["flush", *LAUNCHED],
        cuda.WARM: ["run", *LAUNCHED],
        cuda.GRAPH_COLD: ["synchronize", "flush", *replayed],
        cuda.GRAPH_WARM: ["synchronize", "replay", *replayed],
    }


def test_what_waits_for_the_device_is_never_captured(monkeypatch):
    gpu = FakeGPU(monkeypatch, capturable=False)
    modes, why = cuda.timers(gpu.run, GPU)
    assert list(modes) == [cuda.COLD, cuda.WARM] and why == "called a synchronizing CUDA operation"
    assert "capture begins" not in gpu.calls and gpu.debug == 0


def test_a_gpu_case_has_all_modes_in_its_report(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    right = Peer(gpu.run, lambda: {"loss": 0.0})
    result = collect.measure_case(Case("op", "size", {OFFICIAL: right}, 4e9, 1e6), GPU, {}, 1e-6)
    (peer,) = result["peers"]
    assert list(peer["modes"]) == [cuda.COLD, cuda.WARM, cuda.GRAPH_COLD, cuda.GRAPH_WARM]
    assert peer["kernel_ms"] == peer["p50_ms"] == 2 and peer["extra_memory_mb"] == 250 / 1e6
    about = {"processor": "GPU", "moco_fast": "0", "commit": None, "torch": "2", "python": "3", "date": ""}
    peer |= {"gb_per_s": 0.5, "tflop_per_s": 2.0, "roofline_share": 0.5}
    roof = {"copy_gb_per_s": 4e3, "tflop_per_s": {"fp32": 0.5, "fp16": 700.0}}
    text = report.markdown({"device": about, "roofline": roof, "cases": [result], "notes": []})
    assert "| warm | graph, cold | graph, warm |" in text and "500 GFLOP/s fp32, 700 TFLOP/s fp16" in text


def test_a_graph_that_takes_long_to_enqueue_is_waited_for(monkeypatch):
    """Else its figure would hold the launch of what the GPU had to wait for."""
    gpu = FakeGPU(monkeypatch)
    timer = cuda.device_clock(gpu.run, GPU)
    gpu.late = [False, True, True]
    assert timer() == 2e-3
    assert gpu.spins == [cuda.SPIN_CYCLES * factor for factor in (1, 4, 16)]
    timer()  # it knows now
    assert gpu.spins[3:] == [16 * cuda.SPIN_CYCLES]
    gpu.late = [True] * 99  # by more than it waits
    assert timer() == 2e-3 and len(gpu.late) > 90


def test_the_flush_leaves_nothing_to_be_written_back(monkeypatch):
    """First twice the L2 is rewritten, then as much of another buffer is read."""

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append((op.overloadpacket.__name__, args[0].data_ptr(), args[0].nbytes))
            return op(*args, **(kwargs or {}))

    size = SimpleNamespace(L2_cache_size=4096)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: size)
    cuda._flush_buffers.cache_clear()
    seen = []
    cuda.flush_l2(torch.device("cpu"))
    with Watched():
        cuda.flush_l2(torch.device("cpu"))
    cuda._flush_buffers.cache_clear()
    (write, written, size_written), (read, is_read, size_read) = seen
    assert (write, read) == ("add_", "sum") and written != is_read and size_written == size_read == 8192


def test_what_an_empty_graph_takes(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    assert cuda.empty_graph(GPU) == 2e-3
    begin, end = gpu.calls.index("capture begins"), gpu.calls.index("capture ends")
    assert gpu.calls[begin + 1 : end] == ["spin"] and "run" not in gpu.calls
    timed = ["synchronize", "flush", "spin", "event", "replay", "event", "wait"]
    assert gpu.calls[end + 4 :] == timed * cuda.EMPTY_GRAPHS


@pytest.mark.gpu
def test_gpu_empty_graph():
    assert 0 < cuda.empty_graph(torch.device("cuda", 0)) < 1e-4


@pytest.mark.gpu
def test_gpu_modes():
    """All four modes of a call that a graph can hold; of one that waits, two and the reason."""
    device = torch.device("cuda", 0)
    x = torch.randn(2**20, device=device)
    modes, why = measure.timers(lambda: x * 2, device)
    assert why is None and list(modes) == [cuda.COLD, cuda.WARM, cuda.GRAPH_COLD, cuda.GRAPH_WARM]
    assert all(0 < timer() < 1 for timer in modes.values())
    modes, why = measure.timers(lambda: x.sum().item(), device)
    assert list(modes) == [cuda.COLD, cuda.WARM] and "synchroniz" in why
    assert torch.cuda.get_sync_debug_mode() == 0
    graph = cuda.capture(lambda: x.add_(1), device)
    before = x.clone()
    graph.replay()
    assert torch.equal(x, before + 1)


@pytest.mark.gpu
def test_gpu_memory_sees_a_temporary():
    device = torch.device("cuda", 0)
    assert 64e6 <= cuda.peak_extra(lambda: torch.ones(2**24, device=device).sum(), device) < 80e6


@pytest.mark.gpu
@pytest.mark.parametrize(
    "op",
    ["info_nce", "nt_xent", "contrast", "dino", "ema_update_", "fused step", "enqueue_", "split_batch_norm"],
)
def test_gpu_cases_are_right(op):
    """Every peer of ours, and the official formula, against float64."""
    from bench.ops import OPS

    for case in OPS[op].cases(True, torch.device("cuda", 0)):
        for name in case.peers:
            if name.startswith(OURS) or name == OFFICIAL:
                case.check(name)


def test_tf32_is_put_back():
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(ZeroDivisionError), cuda.tf32():
        assert torch.backends.cuda.matmul.allow_tf32
        _ = 1 / 0
    assert torch.backends.cuda.matmul.allow_tf32 == before
    assert cuda.in_tf32(lambda x: (x, torch.backends.cuda.matmul.allow_tf32))(3) == (3, True)
