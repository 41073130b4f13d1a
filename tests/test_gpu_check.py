"""The orchestration of the GPU check, with its stages replaced: limits, failures, table, exit code."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench import __main__, each, gpu_check, ops, sanitize, step
from bench.gpu_check import Row, Stage
from moco_fast import native, reference

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
    out = tmp_path / "out"
    peek = f"import json; print(len(json.load(open({str(out / 'gpu-check.json')!r}))['rows']))"

    def stages(out, figures):
        write = f"open({str(figures / 'gpu.json')!r}, 'w').write({json.dumps(REPORT)!r})"
        half = f"open({str(figures / '.gpu.json.1.tmp')!r}, 'w').write('half')"
        return [
            # Its child would hold the log open, and go on, unless the whole session ends.
            Stage("slow", ["sh", "-c", "sleep 60 & sleep 60"], 1.0),
            Stage("good", python("print('first'); print('12 passed')"), 60),
            Stage("bad", python("print('why it failed'); raise SystemExit(3)"), 60),
            Stage("tool", python(""), 60, tool="no-such-sanitizer"),
            Stage("optional", python(""), 60, least=1e6),
            Stage("report", python(peek), 60),
            Stage("benchmark", python(f"{write}; {half}; raise SystemExit(1)"), 60),
        ]

    monkeypatch.setattr(gpu_check, "gpu", lambda: "Some GPU")
    monkeypatch.setattr(gpu_check, "stages", stages)
    begin = time.monotonic()
    assert gpu_check.main(["--out", str(out)]) == 1
    assert time.monotonic() - begin < 50
    assert {path.name for path in out.iterdir()} == {"gpu-check.json", "gpu-check.log", "gpu.json"}
    written = json.loads((out / "gpu-check.json").read_text())
    assert written["gpu"] == "Some GPU"
    rows = {row["check"]: row for row in written["rows"]}
    assert {name: rows[name]["result"] for name in list(rows)[:7]} == {
        "slow": "out of time",
        "good": "passed",
        "bad": "failed",
        "tool": "absent",
        "optional": "left out",
        "report": "passed",
        "benchmark": "failed",
    }
    # Written after every stage: five of them, and the aims.
    assert rows["report"]["figure"] == str(5 + len(gpu_check.AIMS))
    assert rows["good"]["figure"] == "12 passed" and rows["tool"]["figure"].startswith("no-such-sanitizer")
    assert rows["info_nce N=256"]["result"] == "met"
    assert rows["info_nce N=256"]["figure"] == "12.3 us, moco_fast triton, high"
    assert rows["info_nce N=32"]["result"] == "missed" and rows["info_nce N=32"]["aim"] == "8 us"
    for name in ("info_nce N=1024", "fused step SGD + EMA", "nt_xent 2N=8192"):  # the reference is no kernel
        assert rows[name]["result"] == "not measured"
    printed = capsys.readouterr().out
    assert "why it failed" in printed and "check " in printed and "aim" in printed
    log = (out / "gpu-check.log").read_text()
    assert "===== good" in log and "why it failed" in log


def test_all_well(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "gpu", lambda: "Some GPU")
    good = [Stage("good", python(""), 60), Stage("optional", python(""), 0, least=1e6)]
    monkeypatch.setattr(gpu_check, "stages", lambda out, figures: good)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0  # an aim that was not measured is no failure


def test_the_whole_has_a_limit(tmp_path):
    row = gpu_check.run(Stage("late", python(""), 60), 0.5, tmp_path / "log")
    assert row.result == "out of time" and row.bad and not (tmp_path / "log").exists()
    row = gpu_check.run(Stage("cut", python("import time; time.sleep(60)"), 60), 1.0, tmp_path / "log")
    assert row.result == "out of time" and row.seconds < 30


def test_what_a_stage_leaves_is_for_the_next(tmp_path, monkeypatch):
    limits = []

    def run(stage, limit, log):
        limits.append(limit)
        return Row(stage.name, "passed")

    stages = [Stage("quick", (), 100), Stage("long", (), 50)]
    monkeypatch.setattr(gpu_check, "gpu", lambda: "Some GPU")
    monkeypatch.setattr(gpu_check, "stages", lambda out, figures: stages)
    monkeypatch.setattr(gpu_check, "run", run)
    gpu_check.main(["--out", str(tmp_path)])
    assert 90 < limits[0] <= 100 and 140 < limits[1] <= 150


def test_only_some_stages_in_all_the_time(tmp_path, monkeypatch):
    limits = {}

    def run(stage, limit, log):
        limits[stage.name] = round(limit / gpu_check.LIMIT, 2)
        return Row(stage.name, "passed")

    stages = [Stage(name, (), seconds) for name, seconds in (("build", 10), ("time a", 10), ("tests", 30))]
    monkeypatch.setattr(gpu_check, "gpu", lambda: "Some GPU")
    monkeypatch.setattr(gpu_check, "stages", lambda out, figures: stages)
    monkeypatch.setattr(gpu_check, "run", run)
    gpu_check.main(["--out", str(tmp_path), "--only", "tests"])
    assert limits == {"build": 0.25, "tests": 1.0}


BROKEN_GPU = """
import os, pytest, torch

def test_breaks(monkeypatch):
    torch.cuda.is_initialized = lambda: True
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.synchronize = synchronize
    assert 0, "the first fault"

@pytest.mark.parametrize("i", range(3))
def test_goes_on(i):
    assert not torch.cuda.is_initialized()
"""


def test_a_broken_gpu_fails_no_other_test(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_broken.py").write_text(BROKEN_GPU)
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu_tests", "-p", "no:cacheprovider", "-n", "1"]
    done = subprocess.run(
        [*command, "--rootdir", tmp_path, tmp_path], cwd=gpu_check.ROOT, capture_output=True, text=True
    )
    assert "1 failed, 3 passed" in done.stdout, done.stdout
    assert "test_breaks" in done.stdout and "crashed" in done.stdout


CUT = """
import pathlib, time
def test_good(): pass
def test_bad(): assert 0
def test_long():
    pathlib.Path(__file__).with_name("begun").touch()
    time.sleep(99)
"""


def test_a_test_run_that_is_cut_names_what_failed(tmp_path, capsys, monkeypatch):
    class Started(subprocess.Popen):
        def wait(self, timeout=None):
            """The time of the stage is over once the last test has begun, however long that takes."""
            if (tmp_path / "begun").exists():
                return super().wait(timeout)
            while not (tmp_path / "begun").exists() and self.poll() is None:
                time.sleep(0.02)
            return super().wait(0)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Started)
    tests = tmp_path / "test_cut.py"
    tests.write_text(CUT)
    (command,) = (s.command for s in gpu_check.stages(tmp_path, tmp_path) if s.name == "tests")
    flags = command[command.index("gpu") + 1 :]
    flags = flags[: flags.index("-n")] if "-n" in flags else flags  # of one process here
    cut = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tests)]
    row = gpu_check.run(Stage("tests", [*cut, *flags], 60, grace=60.0), 60.0, tmp_path / "log")
    assert row.result == "out of time"
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "test_bad" in printed and "1 failed, 1 passed" in printed
    assert "test_cut.py::test_bad FAILED" in (tmp_path / "log").read_text()


def test_tools_are_found_beside_nvcc(tmp_path, monkeypatch):
    tool = tmp_path / "some-sanitizer"
    tool.write_text("#!/bin/sh\necho found $EXTRA\n")
    tool.chmod(0o755)
    stage = Stage("memcheck", ["some-sanitizer"], 60, "some-sanitizer", {"EXTRA": "and set"})
    assert gpu_check.run(stage, 60, tmp_path / "log").result == "absent"
    monkeypatch.setattr(gpu_check, "CUDA_BIN", str(tmp_path))
    assert gpu_check.run(stage, 60, tmp_path / "log").figure == "found and set"


def test_as_a_script_it_hides_bench_from_torch(monkeypatch):
    """Torch looks for a package cuda, which bench/cuda.py is not."""
    folder = str(Path(gpu_check.__file__).parent)
    monkeypatch.setattr(sys, "path", [folder, *sys.path])
    runpy.run_path(gpu_check.__file__)
    assert folder not in sys.path


def test_the_cuda_part_has_to_be_there(tmp_path, monkeypatch):
    (stage,) = (s for s in gpu_check.stages(tmp_path, tmp_path) if s.name == "CUDA part")
    program = stage.command[-1]
    compiled = SimpleNamespace(has_cuda=True, cuda_devices=lambda: [("Some GPU", "9.0")])
    monkeypatch.setattr(native.compiled, "_C", compiled)
    exec(program, {})
    monkeypatch.setattr(native.compiled, "_import_error", "not built", raising=False)
    for broken in (None, SimpleNamespace(has_cuda=False), SimpleNamespace(has_cuda=True, cuda_devices=list)):
        monkeypatch.setattr(native.compiled, "_C", broken)
        with pytest.raises(AssertionError):
            exec(program, {})


def test_without_a_gpu():
    """As a plain script, from anywhere, in one line."""
    if gpu_check.gpu():
        pytest.skip("there is one here")
    done = subprocess.run(
        [sys.executable, gpu_check.__file__], cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and "no GPU" in done.stdout


def test_stages(tmp_path):
    stages = gpu_check.stages(tmp_path / "out", tmp_path / "figures")
    by_name = {stage.name: stage for stage in stages}
    assert sum(stage.seconds for stage in stages) <= gpu_check.LIMIT < 480 - stages[-1].grace
    timed = [f"time {op}" for op in ops.OPS]
    names = ["build", "CUDA part", "results", *timed, "tests", "small shapes", "memcheck", "racecheck"]
    assert sorted(by_name) == sorted([*names, "training step"])
    assert [*by_name][-5:] == ["tests", "small shapes", "memcheck", "racecheck", "training step"]
    assert {op for op, _ in gpu_check.AIMS} <= set(ops.OPS)
    assert ":4096:8" in by_name["tests"].environment.values()
    memcheck = by_name["memcheck"]
    assert memcheck.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert "compute-sanitizer --tool memcheck --report-api-errors no" in " ".join(memcheck.command)
    assert "--report-api-errors" not in by_name["racecheck"].command
    for stage in stages:  # modules by name, so that the checkout is what is imported
        assert stage.command[0] == sys.executable
    assert Row("a", "missed").bad is False and Row("a", "left out").bad is False and Row("a", "failed").bad


def test_the_benchmark_takes_its_options(tmp_path, monkeypatch):
    """What the stages say on the command line is what the commands understand."""
    for stage in gpu_check.stages(tmp_path, tmp_path):
        words = list(stage.command)
        if "--own" in words:
            words += ["dino"] if words[-1] == "--ops" else []
            options = __main__.options_of(words[words.index("bench") + 1 :])
            assert options.own and options.device == "cuda" and len(options.ops) == 1
            assert options.check or (options.add and options.out == tmp_path and options.seconds < 3)
        if "bench.step" in words:
            name = words[words.index("--configs") + 1]
            assert step.chosen([name], False, torch.device("cuda", 0))


def test_a_process_per_op(monkeypatch, capsys):
    program = "import sys; print('this is', sys.argv[1]); sys.exit(sys.argv[1] == 'dino')"
    assert each.run_each(3, python(program)) == ["dino"]
    printed = capsys.readouterr().out
    for op in ops.OPS:
        assert f"----- {op}: exit code {int(op == 'dino')}\nthis is {op}\n" in printed


def test_processes_that_are_cut_show_what_they_printed(tmp_path):
    long = (
        "import sys, time; print('begun', sys.argv[1], flush=True); time.sleep(99 * (sys.argv[1] == 'dino'))"
    )
    command = [sys.executable, "-m", "bench.each", "9", *python(long)]
    assert gpu_check.run(Stage("results", command, 60), 20.0, tmp_path / "log").result == "out of time"
    log = (tmp_path / "log").read_text()
    assert all(f"begun {op}\n" in log for op in ops.OPS) and "----- take_rows: exit code 0" in log


def test_small_shapes_are_good_arguments(monkeypatch, capsys):
    """On a CPU by the reference: of every op, optimizers, masters, unaligned views and a second launch."""
    assert set(sanitize.CALLS) == set(ops.OPS)
    steps, lists = [], []
    for name in ("sgd_", "ema_update_"):
        monkeypatch.setattr(
            reference, name, seen(getattr(reference, name), steps if name == "sgd_" else lists)
        )
    monkeypatch.setattr(sanitize, "kernels", lambda op, device: ["reference"])
    sanitize.main(["--device", "cpu"])
    assert capsys.readouterr().out.count("called ") == len(ops.OPS)
    assert any(arguments[-1].trust > 0 for arguments in steps)  # LARS
    assert all(len(arguments[0]) > 833 for arguments in lists)  # which a launch takes at most
    assert any(len(arguments) > 3 and arguments[3] for arguments in lists)  # masters
    assert any(tensor.data_ptr() % 16 for tensor in lists[0][1])
    monkeypatch.setattr(sanitize, "kernels", lambda op, device: [])
    with pytest.raises(SystemExit, match="no kernels of dino"):
        sanitize.main(["--device", "cpu", "--ops", "dino"])


def test_gpu_tests_are_collected_without_the_command_line_and_peers():
    """With what the check says it needs, whatever their files test besides."""
    program = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('tyro', 'lightly'))\n"  # None: cannot be imported
        "import pytest\n"
        "raise SystemExit(pytest.main(['tests', '-mgpu', '--collect-only', '-q', '-pno:cacheprovider',"
        " '-pno:benchmark']))"
    )
    done = subprocess.run(python(program), cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]


def seen(function, calls):
    def run(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("op", sanitize.CALLS)
def test_gpu_kernels_at_small_shapes(op):
    sanitize.main(["--ops", op])
