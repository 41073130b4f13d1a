"""What the benchmarks stand on: wrong results are never timed, time and memory are measured rightly."""

import sys
from types import SimpleNamespace

import pytest
import torch

import moco_fast

pytest.importorskip("torchvision")
pytest.importorskip("rich")

from rich.progress import Progress

from bench import (
    bench_ema_update,
    bench_enqueue,
    bench_fused_step,
    bench_info_nce,
    collect,
    info_nce_peers,
    measure,
    memory,
    ops,
    report,
    roofline,
)
from bench.case import OFFICIAL, OURS, Absent, Case, Peer, WrongResult, relative, serving
from bench.findings import Findings, notes

CPU = torch.device("cpu")
REFERENCE = f"{OURS} reference"


def test_wrong_results_are_refused(monkeypatch):
    right = moco_fast.info_nce
    (case,) = bench_info_nce.cases(True, CPU)
    assert max(case.check(REFERENCE).values()) < 1e-5
    for wrong in (lambda *a, **o: right(*a, **o) * 1.001, lambda *a, **o: right(*a, **o) * float("nan")):
        monkeypatch.setattr(moco_fast, "info_nce", wrong)
        with pytest.raises(WrongResult, match=r"its result is wrong: loss, random .* against float64"):
            case.check(REFERENCE)

    (case,) = bench_ema_update.cases(True, CPU)
    monkeypatch.setattr(moco_fast, "ema_update_", lambda targets, sources, m: None)
    with pytest.raises(WrongResult, match="its result is wrong: targets"):
        case.check(REFERENCE)

    (case,) = bench_enqueue.cases(True, CPU)
    monkeypatch.setattr(moco_fast, "enqueue_", lambda queue, ptr, keys: queue.zero_())
    with pytest.raises(WrongResult, match="its result is wrong: rows"):
        case.check(REFERENCE)

    case = bench_fused_step.case("squeezenet1_1", "SGD", CPU)
    with pytest.raises(WrongResult, match="its result is wrong: parameters"):
        case.check(f"{REFERENCE} after fused SGD")


@pytest.mark.parametrize("name", bench_fused_step.OPTIMIZERS)
def test_fused_steps_agree_with_float64(name):
    case = bench_fused_step.case("squeezenet1_1", name, CPU)
    assert all(max(case.check(peer).values()) < 1e-6 for peer in case.peers)


def test_others_that_fail_or_are_wrong_are_absent():
    def fails():
        raise ImportError("No module named 'elsewhere'\nand more")

    peers = {"broken": Peer(lambda: None, fails), "wrong": Peer(lambda: None, lambda: {"loss": 0.5})}
    peers[OFFICIAL] = Peer(lambda: None, lambda: {"loss": 0.0})
    result = collect.measure_case(Case("op", "size", peers, 1.0, 1.0), CPU, {}, 1e-6)
    assert [peer["name"] for peer in result["peers"]] == [OFFICIAL]
    assert result["absent"]["broken"] == "ImportError: No module named 'elsewhere'"
    assert result["absent"]["wrong"].startswith("its result is wrong: loss 5.0e-01 against float64")
    with pytest.raises(Absent):
        Case("op", "size", peers, 1.0, 1.0).check("wrong")


def fake_case(label, ours, official=None):
    """A case of two peers, each right or raising an error."""

    def peer(error):
        def errors():
            if isinstance(error, Exception):
                raise error
            return {"rows": error or 0.0}

        return Peer(lambda: None, errors)

    peers = {f"{OURS} triton": peer(ours), OFFICIAL: peer(official)}
    return Case("take_rows", label, peers, 1.0, 1.0)


@pytest.fixture
def fake_cases(monkeypatch):
    """Cases in place of those of two ops, and nothing slow around them."""

    def cases(quick, device):
        yield fake_case("crashing", RuntimeError("an illegal memory access\nand more"))
        yield fake_case("wrong", 0.5)
        yield fake_case("without official", None, MemoryError("too large"))
        yield fake_case("right", None)
        raise ValueError("cannot be made")

    monkeypatch.setitem(ops.OPS, "take_rows", SimpleNamespace(cases=cases))
    right = Case("enqueue_", "right", fake_case("", None).peers, 1.0, 1.0)
    monkeypatch.setitem(ops.OPS, "enqueue_", SimpleNamespace(cases=lambda quick, device: [right]))
    monkeypatch.setattr(memory, "by_op", lambda *arguments: [])
    monkeypatch.setattr(collect, "roofline", lambda *arguments: roofline.Roofline(1.0, {"fp32": 1.0}))


FAILED = {
    "crashing": f"{OURS} triton: RuntimeError: an illegal memory access",
    "wrong": f"{OURS} triton: its result is wrong: rows 5.0e-01 against float64, expected at most 1e-04",
    "without official": f"{OFFICIAL}: MemoryError: too large",
    "the case after right": "ValueError: cannot be made",
}


def test_a_failure_of_ours_does_not_end_the_rest(fake_cases):
    saved = []
    found = Findings({"type": "cpu", "load": 0.0, "cpus": 2}, quick=True)
    with Progress(disable=True) as progress:
        report = collect.collect(
            found, CPU, progress, ("take_rows", "enqueue_"), seconds=1e-6, save=lambda r: saved.append(str(r))
        )
    assert {one["label"]: one["why"] for one in report["failed"]} == FAILED
    names = {(case["op"], case["label"]): [p["name"] for p in case["peers"]] for case in report["cases"]}
    assert names.pop(("take_rows", "crashing")) == names.pop(("take_rows", "wrong")) == [OFFICIAL]
    assert list(names) == [("enqueue_", "right"), ("take_rows", "right")]
    assert all(len(peers) == 2 for peers in names.values())
    text = " ".join(report["notes"])
    assert all(f"FAILED: take_rows, {label}: {why}." in text for label, why in FAILED.items())
    # Before the first case, after each, and at the end; only that one is complete.
    assert "'crashing'" not in saved[0] and "'crashing'" in saved[2] and "'wrong'" not in saved[2]
    assert [("cases are missing" in text) for text in saved] == [True] * (len(saved) - 1) + [False]


def test_checking_times_nothing_and_tells_the_same(fake_cases, monkeypatch):
    monkeypatch.setattr(measure, "interleave", lambda *arguments: pytest.fail("timed"))
    with Progress(disable=True) as progress:
        failed = collect.check(True, CPU, progress, ("take_rows",), own=True)
    assert {one["label"]: one["why"] for one in failed} == FAILED


def test_own_peers_build_nothing_else(monkeypatch):
    """No compiled peer is made, let alone called, for a run of ours and the official formula."""
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: pytest.fail("compiled"))
    monkeypatch.setitem(sys.modules, "lightly", None)
    for op in ops.OPS:
        (case, *_) = ops.cases(op, True, CPU, own=True)
        assert all(name.startswith(OURS) or name == OFFICIAL for name in (*case.peers, *case.absent))
        assert OFFICIAL in case.peers and len(case.peers) > 1
    (case, *_) = ops.cases("info_nce", True, CPU, own=False)
    assert {info_nce_peers.COMPILED, info_nce_peers.LIGHTLY, info_nce_peers.BLOCKED} <= set(case.peers)


def test_serving_names_what_cannot_serve():
    q = torch.randn(2, 4, dtype=torch.float64)
    names, absent = serving("info_nce", (q, q, q))
    assert "reference" in names and "native" not in names and absent[f"{OURS} native"]
    assert not any("cannot serve" in why for why in absent.values())


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(
    "compose",
    [
        lambda: info_nce_peers.attention(attend),
        lambda: info_nce_peers.from_lse(lambda q, queue: torch.logsumexp(q @ queue.t(), dim=1)),
        lambda: info_nce_peers.with_cross_entropy(torch.nn.functional.cross_entropy),
        lambda: info_nce_peers.blocked,
    ],
    ids=["attention", "log-sum-exp", "cross-entropy", "blocked"],
)
def test_compositions_of_other_libraries_compute_the_op(compose, clustered):
    """Only their kernels need a GPU: with plain PyTorch in their place the loss and gradient are exact."""
    x = bench_info_nce.make(16, 300, 32, 0.1, clustered, CPU)
    (loss, dq), (want_loss, want_dq) = compose()(x), bench_info_nce.exact(x)
    # 16-bit keys and values in attention: 2^-11, over T.
    assert relative(loss.detach(), want_loss) < 5e-4 and relative(dq, want_dq) < 5e-3


def attend(q, queue, scale):
    logits = scale * q.float() @ queue.float().transpose(-1, -2)
    return logits.softmax(-1) @ queue.float(), torch.logsumexp(logits, -1)


def test_rounds_are_interleaved():
    calls = []
    timers = {name: lambda name=name: calls.append(name) or 0.5 for name in "abc"}
    times = measure.interleave(timers, seconds=1e-6)
    assert all(values == [0.5] * measure.LEAST_ROUNDS for values in times.values())
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(r) == list("abc") for r in rounds) and set(rounds) == {"abc", "bca", "cab"}


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="needs Linux's /proc/self/clear_refs")
def test_memory_sees_a_temporary():
    assert 60e6 < memory.peak_extra(lambda: torch.ones(2**24).sum()) < 80e6
    assert memory.peak_extra(lambda: None) < 2e6


def test_roofline_share():
    one, two = roofline.Roofline(5.0, {"fp32": 100.0}), roofline.Roofline(10.0, {"fp32": 90.0})
    roof = one.raised_by(two)
    assert roof.share(flops=50, nbytes=1, product="fp32", seconds=1) == 0.5
    assert roof.share(flops=0, nbytes=8, product="fp32", seconds=1) == 0.8


def test_durations_have_a_unit():
    assert report.duration(14.12, 16.6, 119.4) == "14.1 / 16.6 / 119 ms"
    assert report.duration(0.01234, 0.5) == "12.3 / 500 us"


def test_notes_name_what_is_missing():
    peer = {"name": OFFICIAL, "no_graph": "it waits"}
    results = [
        {"op": "info_nce", "label": "N=32", "absent": {"torch.compile": "no compiler"}, "peers": [peer]}
    ]
    found = Findings({"type": "cuda", "load": 3.0, "cpus": 2}, quick=False, results=results)
    found.empty_graph_us = 1.96
    text = " ".join(notes(found, finished=True))
    assert "replayed from a CUDA graph" in text and "busy when the run began (load 3.0" in text
    assert "Not measured: torch.compile (no compiler), for info_nce." in text and "Smoke run" not in text
    assert f"Not in a CUDA graph, info_nce: {OFFICIAL} (it waits)." in text
    assert "one kernel that does nothing takes 2.0 us" in text and "cases are missing" not in text
    assert notes(found, finished=False)[-1].endswith("cases are missing.")
