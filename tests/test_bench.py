"""The benchmark command, end to end: its JSON, tables, picture, the README's table, the sweep."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import moco_fast  # noqa: E402
from bench import __main__, info_nce_peers, memory, report, sweep  # noqa: E402
from bench.case import OFFICIAL, OURS  # noqa: E402
from bench.findings import Findings  # noqa: E402
from bench.measure import LEAST_ROUNDS  # noqa: E402
from bench.ops import OPS  # noqa: E402
from bench.plot import plot  # noqa: E402
from moco_fast import native  # noqa: E402

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README = f"# Title\n\n{BEGIN}\nold figures\n{END}\nafter\n"
REFERENCE = f"{OURS} reference"


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """One run of the command, on one thread so that a busy machine does not stall it."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "README.md").write_text(README)
    where = ["--out", folder / "out", "--readme", folder / "README.md"]
    command = [sys.executable, "-m", "bench", "--quick", "--device", "cpu", *where]
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
    assert figures["device"]["type"] == "cpu"
    assert {case["op"] for case in figures["cases"]} == set(OPS)
    for case in figures["cases"]:
        assert case["rounds"] >= LEAST_ROUNDS
        names = [peer["name"] for peer in case["peers"]]
        assert OFFICIAL in names and any(name.startswith(REFERENCE) for name in names)
        assert case["peers"][0]["times_fastest"] == 1
        for peer in case["peers"]:
            assert 0 < peer["p20_ms"] <= peer["p50_ms"] <= peer["p80_ms"]
            assert list(peer["modes"]) == ["cold"] and peer["modes"]["cold"]["p50_ms"] == peer["p50_ms"]
            assert peer["roofline_share"] > 0 and peer["speedup_over_official"] > 0 and peer["gb_per_s"] > 0
            assert all(0 <= error < 1e-1 for error in peer["errors"].values())
            assert peer["extra_memory_mb"] is not None or not memory.CLEAR_REFS.exists()


def test_table_and_picture(quick_run):
    folder, printed = quick_run
    (picture,) = (folder / "out").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = (folder / "README.md").read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "old figures" not in text
    assert "loss error (random / clustered)" in text
    summary, _, rest = text.partition("<details>\n<summary>")
    lines = [line for line in summary.splitlines() if line.startswith("| `info_nce`, N=8")]
    # What rounds to bf16 has a line of its own.
    assert ["bf16" in line for line in lines] == [False, True][: 1 + native.has_bf16_units()]
    assert rest.count("</details>") == 1
    for part in (OFFICIAL, REFERENCE, "the times mean nothing"):
        assert part in text and part in printed


@pytest.mark.parametrize("text", ["# no markers\n", f"{END}\n{BEGIN}\n", README + BEGIN])
def test_readme_without_markers_is_refused_before_measuring(tmp_path, monkeypatch, text):
    monkeypatch.setattr(__main__, "collect", lambda *_: pytest.fail("measured first"))
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"readme must hold <!-- bench:begin --> and.*README.md does not"):
        __main__.main(["--quick", "--out", str(tmp_path), "--readme", str(path)])
    assert path.read_text() == text


def test_ops_one_after_the_other_in_one_report(tmp_path, monkeypatch):
    """A crash costs one peer and the exit code; what other runs measured stays, and fails no later one."""
    monkeypatch.setattr(memory, "by_op", lambda *arguments: [])
    monkeypatch.setattr(moco_fast, "take_rows", lambda *arguments: 1 / 0)
    run = ["--quick", "--device", "cpu", "--own", "--seconds", "1e-6", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=rf"take_rows, N=8.*{REFERENCE}: ZeroDivisionError: division"):
        __main__.main([*run, "--ops", "take_rows"])
    (path,) = tmp_path.glob("*.json")
    assert [len(case["peers"]) for case in json.loads(path.read_text())["cases"]] == [1]
    __main__.main([*run, "--add", "--ops", "enqueue_"])
    figures = json.loads(path.read_text())
    assert [case["op"] for case in figures["cases"]] == ["enqueue_", "take_rows"]
    assert len(figures["cases"][0]["peers"]) > 1
    assert any(
        note.startswith(f"FAILED: take_rows, N=8, 3x9x9 uint8: {REFERENCE}") for note in figures["notes"]
    )
    assert path.with_suffix(".png").exists()
    __main__.main([*run, "--ops", "enqueue_"])
    assert [case["op"] for case in json.loads(path.read_text())["cases"]] == ["enqueue_"]


def test_checking_alone(monkeypatch):
    monkeypatch.setattr(moco_fast, "take_rows", lambda *arguments: 1 / 0)
    run = ["--quick", "--device", "cpu", "--own", "--check", "--ops"]
    __main__.main([*run, "enqueue_"])
    with pytest.raises(SystemExit, match="take_rows, N=8, 3x9x9 uint8: moco_fast"):
        __main__.main([*run, "take_rows"])


def test_a_run_without_any_result_has_a_report(tmp_path):
    figures = Findings({"name": "d", "type": "cpu", "processor": "p", "load": 0, "cpus": 1}, True).report(
        True
    )
    figures["device"] |= {"moco_fast": "0", "commit": None, "torch": "2", "python": "3", "date": ""}
    plot(tmp_path / "none.png", figures)
    assert "p; copy 0.0 GB/s" in report.markdown(figures)


def test_a_write_that_is_killed_leaves_the_figures_before_it(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    report.write_json(path, {"cases": [1]})
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report.write_json(path, {"cases": [1, 2]})
    assert json.loads(path.read_text()) == {"cases": [1]} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("option", [["--own"], ["--ops", "dino"], ["--sweep"]])
def test_the_readme_takes_whole_runs_only(tmp_path, option):
    with pytest.raises(SystemExit):
        __main__.main(["--quick", "--readme", str(tmp_path / "README.md"), *option])


def test_smoke_runs_leave_measured_results_alone():
    assert report.folder(Namespace(out=None, quick=True)) != report.RESULTS
    assert report.folder(Namespace(out=None, quick=False)) == report.RESULTS


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="device 'cuda' was asked for, but torch finds no GPU"):
        __main__.main(["--device", "cuda"])


def test_sweep(tmp_path, monkeypatch):
    """Every axis and peer in one picture; a peer that is wrong at a point is missing there, and named."""
    right = info_nce_peers.blocked

    def wrong_when_hot(x):
        loss, dq = right(x)
        return (loss, dq) if x.temperature < 0.5 else (loss * 2, dq)

    monkeypatch.setattr(info_nce_peers, "blocked", wrong_when_hot)
    monkeypatch.setattr(info_nce_peers, "compiled", lambda: right)  # compiling takes longer than the rest
    monkeypatch.setattr(sweep, "QUICK_AXES", {"N": [4, 8], "K": [64], "C": [16], "T": [0.07, 1.0]})
    __main__.main(["--sweep", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*-sweep.json")
    figures = json.loads(path.read_text())
    assert [point["value"] for point in figures["axes"]["N"]] == [4, 8]
    for points in figures["axes"].values():
        for point in points:
            assert {OFFICIAL, REFERENCE} <= set(point["p50_ms"]) and min(point["p50_ms"].values()) > 0
            assert (info_nce_peers.BLOCKED in point["p50_ms"]) == (point["value"] != 1.0)
    (note,) = [note for note in figures["notes"] if f"{info_nce_peers.BLOCKED} (" in note]
    assert note.startswith(
        "Not measured at N=8, K=64, C=16, T=1: blocked torch.mm (its result is wrong: loss"
    )
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_suites_are_collected_with_their_own_configuration():
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "bench_info_nce.py::test_info_nce[N256-moco_fast native]" in done.stdout, done.stdout + done.stderr
