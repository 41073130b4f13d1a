"""The orchestration of the GPU check, with its stages replaced: limits, failures, table, exit code."""

import json
import os
import subprocess
import sys
import time

import pytest

from bench import gpu_check
from bench.gpu_check import Row, Stage

PEER = {"ours": True, "name": "moco_fast triton, high", "kernel_ms": 0.0123}
REPORT = {
    "cases": [
        {
            "op": "info_nce",
            "label": "N=256, K=65536, C=128",
            "peers": [PEER, PEER | {"name": "theirs", "ours": False, "kernel_ms": 0.001}],
        },
        {"op": "info_nce", "label": "N=32, K=65536, C=128", "peers": [PEER]},
        {
            "op": "fused step",
            "label": "SGD + EMA, resnet50 with MLP",
            "peers": [PEER | {"name": "moco_fast reference after fused SGD"}],
        },
    ]
}


def python(program):
    return [sys.executable, "-c", program]


def test_stages_go_on_after_failures(tmp_path, monkeypatch, capsys):
    write = f"open({str(tmp_path / 'gpu.json')!r}, 'w').write({json.dumps(REPORT)!r})"
    stages = [
        Stage("good", python("print('first'); print('12 passed')"), 60),
        Stage("bad", python("print('why it failed'); raise SystemExit(3)"), 60),
        # Its child would hold the log open, and go on, unless the whole session ends.
        Stage("slow", ["sh", "-c", "sleep 60 & sleep 60"], 1.0),
        Stage("tool", python(""), 60, tool="no-such-sanitizer"),
        Stage("benchmark", python(write), 60),
    ]
    old = tmp_path / "a.json"
    old.write_text('{"cases": "of an earlier run"}')
    os.utime(old, (0, 0))
    monkeypatch.setattr(gpu_check, "gpu", lambda: "Some GPU")
    monkeypatch.setattr(gpu_check, "stages", lambda out: stages)
    begin = time.monotonic()
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert time.monotonic() - begin < 50
    written = json.loads((tmp_path / "gpu-check.json").read_text())
    assert written["gpu"] == "Some GPU"
    rows = {row["check"]: row for row in written["rows"]}
    results = {name: rows[name]["result"] for name in ("good", "bad", "slow", "tool", "benchmark")}
    assert results == {
        "good": "passed",
        "bad": "failed",
        "slow": "out of time",
        "tool": "absent",
        "benchmark": "passed",
    }
    assert rows["good"]["figure"] == "12 passed" and rows["tool"]["figure"].startswith("no-such-sanitizer")
    assert rows["info_nce N=256"]["result"] == "met"
    assert rows["info_nce N=256"]["figure"] == "12.3 us, moco_fast triton, high"
    assert rows["info_nce N=32"]["result"] == "missed" and rows["info_nce N=32"]["aim"] == "8 us"
    for name in ("info_nce N=1024", "fused step SGD + EMA", "nt_xent 2N=8192"):  # the reference is no kernel
        assert rows[name]["result"] == "not measured"
    printed = capsys.readouterr().out
    assert "why it failed" in printed and "check " in printed and "aim" in printed
    log = (tmp_path / "gpu-check.log").read_text()
    assert "===== good" in log and "why it failed" in log


def test_all_well(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "gpu", lambda: "Some GPU")
    monkeypatch.setattr(gpu_check, "stages", lambda out: [Stage("good", python(""), 60)])
    assert gpu_check.main(["--out", str(tmp_path)]) == 0  # an aim that was not measured is no failure


def test_the_whole_has_a_limit(tmp_path):
    row = gpu_check.run(Stage("late", python(""), 60), 0.5, tmp_path / "log")
    assert row.result == "out of time" and row.bad and not (tmp_path / "log").exists()
    row = gpu_check.run(Stage("cut", python("import time; time.sleep(60)"), 60), 1.0, tmp_path / "log")
    assert row.result == "out of time" and row.seconds < 30
    assert gpu_check.LIMIT < 480


def test_without_a_gpu():
    """As a plain script, from anywhere, in one line."""
    if gpu_check.gpu():
        pytest.skip("there is one here")
    done = subprocess.run(
        [sys.executable, gpu_check.__file__], cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and "no GPU" in done.stdout


def test_stages(tmp_path):
    stages = gpu_check.stages(tmp_path)
    assert [s.name for s in stages] == ["build", "tests", "memcheck", "racecheck", "benchmark"]
    assert stages[2].command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    assert str(tmp_path) in stages[-1].command
    for stage in stages:  # modules by name, so that the checkout is what is imported
        assert stage.command[0] == sys.executable or stage.tool
    assert Row("a", "missed").bad is False and Row("a", "failed").bad


@pytest.mark.gpu
def test_gpu_kernels_at_small_shapes(capsys):
    from bench import sanitize

    sanitize.main()
    assert "calls of GPU kernels" in capsys.readouterr().out
