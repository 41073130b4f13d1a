"""The benchmark suite: one command end to end, wrong results refused, the README's table replaced."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moco_fast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ belongs to the checkout and is not installed

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench import (  # noqa: E402
    __main__,
    bench_ema_update,
    bench_enqueue,
    bench_info_nce,
    collect,
    measure,
    memory,
    report,
)
from bench.case import OFFICIAL, OURS, WrongResult  # noqa: E402

README = f"# Title\n\n{report.BEGIN}\nold figures\n{report.END}\nafter\n"
REFERENCE = f"{OURS} reference"


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """One run of the command, on one thread so that a busy machine does not stall it."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "README.md").write_text(README)
    where = ["--out", folder / "out", "--readme", folder / "README.md"]
    command = [sys.executable, "-m", "bench", "--quick", *where]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("MOCO_FAST_BACKEND", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_json_holds_every_figure(quick_run):
    folder, _ = quick_run
    (path,) = (folder / "out").glob("*.json")
    figures = json.loads(path.read_text())
    assert figures["quick"] and figures["device"]["name"] == path.stem
    assert {"cpu", "isa", "threads", "load", "python", "torch", "moco_fast", "commit", "date"} <= set(
        figures["device"]
    )
    assert figures["roofline"]["copy_gb_per_s"] > 0 and figures["roofline"]["tflop_per_s"]["fp32"] > 0
    assert {case["op"] for case in figures["cases"]} == {"info_nce", "ema_update_", "enqueue_"}
    for case in figures["cases"]:
        assert case["rounds"] >= measure.LEAST_ROUNDS
        names = [peer["name"] for peer in case["peers"]]
        assert OFFICIAL in names and REFERENCE in names
        assert case["peers"][0]["times_fastest"] == 1
        for peer in case["peers"]:
            assert 0 < peer["p20_ms"] <= peer["p50_ms"] <= peer["p80_ms"]
            assert peer["roofline_share"] > 0 and peer["speedup_over_official"] > 0
            assert all(0 <= error < 1e-1 for error in peer["errors"].values())
            assert peer["extra_memory_mb"] is not None or not memory.CLEAR_REFS.exists()


def test_table_and_picture(quick_run):
    folder, printed = quick_run
    (picture,) = (folder / "out").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = (folder / "README.md").read_text()
    assert text.startswith(f"# Title\n\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n")
    assert "old figures" not in text
    assert "loss error (random / clustered)" in text
    for part in (OFFICIAL, REFERENCE, "the times mean nothing"):
        assert part in text and part in printed


@pytest.mark.parametrize("text", ["# no markers\n", f"{report.END}\n{report.BEGIN}\n", README + report.BEGIN])
def test_readme_without_markers_is_refused_before_measuring(tmp_path, monkeypatch, text):
    monkeypatch.setattr(__main__, "collect", lambda *_: pytest.fail("measured first"))
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"readme must hold <!-- bench:begin --> and.*README.md does not"):
        __main__.main(["--quick", "--out", str(tmp_path), "--readme", str(path)])
    assert path.read_text() == text


def test_wrong_results_are_refused(monkeypatch):
    monkeypatch.setattr(bench_info_nce, "compiled", lambda x: (None, "left out of this test"))
    right = moco_fast.info_nce
    (case,) = bench_info_nce.cases(quick=True)
    assert max(case.check(REFERENCE).values()) < 1e-5
    for wrong in (lambda *a, **o: right(*a, **o) * 1.001, lambda *a, **o: right(*a, **o) * float("nan")):
        monkeypatch.setattr(moco_fast, "info_nce", wrong)
        with pytest.raises(WrongResult, match=f"info_nce, N=8.*{REFERENCE} is wrong and was not timed: loss"):
            case.check(REFERENCE)

    (case,) = bench_ema_update.cases(quick=True)
    monkeypatch.setattr(moco_fast, "ema_update_", lambda targets, sources, m: None)
    with pytest.raises(WrongResult, match="ema_update_"):
        case.check(REFERENCE)

    (case,) = bench_enqueue.cases(quick=True)
    monkeypatch.setattr(moco_fast, "enqueue_", lambda queue, ptr, keys: queue.zero_())
    with pytest.raises(WrongResult, match="enqueue_"):
        case.check(REFERENCE)


def test_rounds_are_interleaved():
    calls = []
    times = measure.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, seconds=1e-6)
    assert all(len(values) == measure.LEAST_ROUNDS for values in times.values())
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(r) == list("abc") for r in rounds) and set(rounds) == {"abc", "bca", "cab"}


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="needs Linux's /proc/self/clear_refs")
def test_memory_sees_a_temporary():
    assert 60e6 < memory.peak_extra(lambda: torch.ones(2**24).sum()) < 80e6
    assert memory.peak_extra(lambda: None) < 2e6


def test_roofline_share():
    roof = measure.Roofline(5.0, {"fp32": 100.0}).raised_by(measure.Roofline(10.0, {"fp32": 90.0}))
    assert roof.share(flops=50, nbytes=1, product="fp32", seconds=1) == 0.5
    assert roof.share(flops=0, nbytes=8, product="fp32", seconds=1) == 0.8


def test_notes_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    results = [{"op": "info_nce", "absent": {"torch.compile": "no compiler"}}]
    text = " ".join(collect.notes({"load": 3.0, "cpus": 2}, results, quick=False))
    assert "GPU kernels are not part of this version" in text and "busy when the run began (load 3.0" in text
    assert "Not measured for info_nce: torch.compile (no compiler)" in text and "Smoke run" not in text


def test_suites_are_collected_with_their_own_configuration():
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "bench_info_nce.py::test_info_nce[N256-moco_fast native]" in done.stdout, done.stdout + done.stderr
