"""Tuning of tile tables, with a kernel file that needs no GPU: what is tried, what is written, what stays."""

import ast
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moco_fast.kernels

pytest.importorskip("rich")
pytest.importorskip("triton")

from rich.console import Console

from bench import isolated, measure, tiles, tune

CPU = torch.device("cpu")
KERNEL = '''"""A kernel file."""

# (BLOCK, warps) by class of rows.
# Not measured on a GPU yet: chosen with care.
TILES = {
    ("few", 32): (64, 4),
    ("split few", 128): (32, 8),
    ("many", 128): (128, 8),
    5: (1,),
}  # the end
AFTER = 1

CANDIDATES = {
    ("few", 32): [(64, 4), (16, 2), (0, 0)],
    ("split few", 128): [(32, 8), (8, 8)],
    ("many", 128): [(0, 0), (128, 8)],
    5: [(1,), (30,)],
}


def tune_case(key):
    def make(value):
        if value == (0, 0):
            raise RuntimeError("out of resource: shared memory\\nand more")
        return lambda: value[0] * 1e-4  # what a timer of it says: see the fixture

    return make
'''
IN_ORDER = [("fake_op", key) for key in (("many", 128), 5, ("few", 32), ("split few", 128))]


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """The file as moco_fast.kernels.fake_op."""
    path = tmp_path / "fake_op.py"
    path.write_text(KERNEL)
    monkeypatch.setattr(moco_fast.kernels, "__path__", [*moco_fast.kernels.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    monkeypatch.setattr(measure, "timers", lambda run, where: ({measure.COLD: run}, None))
    yield path
    sys.modules.pop("moco_fast.kernels.fake_op", None)


def fine(candidates):
    """Stands for the compilation in other processes."""
    return [None] * len(candidates)


def run(todo, compile_them=fine, **options):
    tune.tune(todo, CPU, Console(width=150), compile_them, seconds=1e-3, **options)


def written(path):
    """The literal of a kernel file."""
    node = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Assign))
    return ast.literal_eval(node.value)


def test_the_fastest_goes_into_the_file(kernel, capsys):
    run(tune.classes(["fake_op"], ["few,32", "many,128"]))
    text = kernel.read_text()
    names = dict(line.split(" = ", 1) for line in text.splitlines() if line.startswith(("AFTER", "CANDID")))
    assert names["AFTER"] == "1" and text.startswith('"""A kernel file."""\n') and "def tune_case" in text
    # The faster one won; what could not run, and what was not asked for, stays.
    assert written(kernel) == {
        ("few", 32): (16, 2),
        ("split few", 128): (32, 8),
        ("many", 128): (128, 8),
        5: (1,),
    }
    comment = text.split("TILES")[0].splitlines()[2:]
    assert comment[0] == "# (BLOCK, warps) by class of rows."
    assert comment[1].startswith("# Measured with bench/tune.py for 2 of 4 classes: ")
    assert "torch" in " ".join(comment[1:]) and "Not measured" not in text
    printed = capsys.readouterr().out
    assert "2. of 2" in printed and "(16, 2)" in printed
    assert "skipped few,32: (0, 0): RuntimeError: out of resource: shared memory" in printed
    assert "and more" not in printed


def test_headline_classes_come_first(kernel):
    assert tune.classes(["fake_op"], []) == IN_ORDER
    assert tune.classes(["fake_op"], ["split few,128", "5"]) == [IN_ORDER[1], IN_ORDER[3]]
    ours = tune.classes(tiles.tunable(), [])
    assert ours[:2] == [("info_nce", ("few", 128)), ("info_nce", ("many", 128))]
    with pytest.raises(ValueError, match="no class many,32 in fake_op; there are few,32; split few,128"):
        tune.classes(["fake_op"], ["5", "many,32"])


def test_what_did_not_compile_elsewhere_is_not_run_here(kernel, tmp_path):
    """Where it may well end the process."""
    asked = []

    def some(candidates):
        asked.append(candidates)
        return ["its process ended" if value == (16, 2) else None for _, _, value in candidates]

    out = tmp_path / "tune.json"
    run(IN_ORDER, some, size=4, out=out)
    assert [len(batch) for batch in asked] == [4, 5]  # whole classes, of 4 candidates or more together
    entry = next(entry for entry in tiles.load(out)["classes"] if entry["class"] == ("few", 32))
    assert {"tiles": (16, 2), "reason": "its process ended"} in entry["skipped"]
    assert [timed["tiles"] for timed in entry["timed"]] == [(64, 4)]
    assert written(kernel)["few", 32] == (64, 4)


def test_a_class_that_cannot_be_made_is_skipped(kernel, monkeypatch, tmp_path):
    def out_of_memory(key):
        raise torch.OutOfMemoryError("of this GPU")

    monkeypatch.setattr(tiles.kernel("fake_op"), "tune_case", out_of_memory)
    run(IN_ORDER[:1], out=tmp_path / "tune.json")
    (entry,) = tiles.load(tmp_path / "tune.json")["classes"]
    assert not entry["timed"] and len(entry["skipped"]) == 2
    assert entry["skipped"][1]["reason"] == "OutOfMemoryError: of this GPU"
    assert kernel.read_text() == KERNEL


def test_every_class_is_saved_when_it_is_done(kernel, tmp_path, monkeypatch):
    """A run that is ended keeps what it found, and the next goes on from there."""
    out, really = tmp_path / "new" / "tune.json", tune.measure_class

    def ended(one, *rest):
        if one == IN_ORDER[2]:
            raise KeyboardInterrupt
        return really(one, *rest)

    monkeypatch.setattr(tune, "measure_class", ended)
    with pytest.raises(KeyboardInterrupt):
        run(IN_ORDER, out=out)
    saved = json.loads(out.read_text())
    assert [(entry["op"], entry["class"]) for entry in tiles.load(out)["classes"]] == IN_ORDER[:2]
    assert saved["classes"][0]["timed"][0].keys() == {"tiles", "p20_ms", "p50_ms", "p80_ms"}
    assert saved["classes"][0]["skipped"][0]["reason"].startswith("RuntimeError: out of resource")
    assert {"processor", "torch", "triton", "date"} <= saved["device"].keys()
    assert kernel.read_text() == KERNEL

    measured = []
    monkeypatch.setattr(tune, "measure_class", lambda one, *rest: measured.append(one) or really(one, *rest))
    run(IN_ORDER, out=out)
    assert measured == IN_ORDER[2:] and len(tiles.load(out)["classes"]) == 4
    assert written(kernel)["few", 32] == (16, 2) and written(kernel)["split few", 128] == (8, 8)

    saved["device"]["torch"] = "1.0"
    out.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"tune.json was measured on .* torch 1.0, .*another file"):
        run(IN_ORDER, out=out)


def test_no_class_is_begun_after_the_budget(kernel, tmp_path, monkeypatch, capsys):
    clock = [0]
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(candidates):
        clock[0] += 3
        return fine(candidates)

    out = tmp_path / "tune.json"
    run(IN_ORDER, slow, size=1, budget=5, out=out)
    assert [(entry["op"], entry["class"]) for entry in tiles.load(out)["classes"]] == IN_ORDER[:1]
    printed = capsys.readouterr().out
    assert "3 of 4 classes were not measured" in printed and "- fake_op few,32" in printed
    begun = []
    run(IN_ORDER, lambda candidates: map(begun.append, candidates), size=99, budget=0)
    assert len(begun) == 1  # no more is compiled, either
    assert "for 1 of 4 classes" in kernel.read_text()  # of the first run


def saved(path, best, op="fake_op", key=5, torch_version="2.9", date="2026-01-02T03:04:05"):
    """A report in which the tiles ``best`` of a class are the fastest."""
    others = [value for value in ((1,), (30,)) if value != best]
    timed = [{"tiles": value, "p50_ms": 2.0 - (value == best)} for value in (*others, best)]
    about = {"processor": "H200", "torch": torch_version, "triton": "3.6", "date": date}
    entry = {"op": op, "class": key, "timed": timed, "skipped": []}
    path.write_text(json.dumps({"device": about, "classes": [entry]}))
    return path


def test_reports_are_applied_without_a_gpu(kernel, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first = saved(tmp_path / "a.json", (1,))
    second = saved(tmp_path / "b.json", (30,), date="2026-01-03T03:04:05")
    tune.main(["--apply", str(first), str(second)])
    assert written(kernel)[5] == (30,) and written(kernel)["few", 32] == (64, 4)
    text = kernel.read_text()
    assert "Measured with bench/tune.py for 1 of 4 classes: H200, torch 2.9, triton 3.6, 2026-01-03." in text
    assert f"wrote {kernel}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "other"}, "no kernel file 'other' that can be tuned; there are "),
        ({"key": ["many", 7]}, 'fake_op has no class ("many", 7); it has ("few", 32), '),
        ({"best": (7,)}, "(7,) is not a candidate of fake_op 5"),
        ({"torch_version": "2.8"}, "not measured alike: H200, torch 2.9, triton 3.6; H200, torch 2.8"),
        ({"text": "{"}, "b.json: Expecting"),
        ({"text": "{}"}, "b.json is not a report of bench.tune: KeyError: 'device'"),
        ({"text": "[1]"}, "b.json is not a report of bench.tune: TypeError"),
        ({"text": None}, "No such file"),
    ],
    ids=["op", "class", "tiles", "versions", "json", "empty", "list", "missing"],
)
def test_what_is_not_known_is_not_applied(kernel, tmp_path, change, message):
    first, second = saved(tmp_path / "a.json", (30,)), tmp_path / "b.json"
    if "text" not in change:
        saved(second, **{"best": (1,), **change})
    elif change["text"] is not None:
        second.write_text(change["text"])
    with pytest.raises(SystemExit) as refused:
        tune.main(["--apply", str(first), str(second)])
    assert message in str(refused.value)
    assert kernel.read_text() == KERNEL  # of several files, all or none


def test_apply_goes_with_nothing_else(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--apply", "a.json", "--seconds", "3"])
    assert "--apply goes with nothing else" in capsys.readouterr().err


def test_calls_in_other_processes_fail_alone():
    """Also where one ends its process, as an assertion of a compiler does."""
    with isolated.Processes(2) as processes:
        errors = processes.errors(os._exit, [(3,)])
        assert list(errors) == ["its process ended"]
        assert list(processes.errors(int, [("1",), ("x",), ("2",)])) == [
            None,
            "ValueError: invalid literal for int() with base 10: 'x'",
            None,
        ]


def test_a_call_that_never_ends_is_ended(monkeypatch):
    """As a kernel that waits for itself."""
    monkeypatch.setattr(isolated, "LONGEST", 120.0)
    with isolated.Processes(1) as processes:
        assert list(processes.errors(int, [("1",)])) == [None]  # the process has started
        monkeypatch.setattr(isolated, "LONGEST", 0.5)
        assert list(processes.errors(time.sleep, [(3600,)])) == ["it had not ended after 0 s"]
        monkeypatch.setattr(isolated, "LONGEST", 120.0)
        assert list(processes.errors(int, [("1",)])) == [None]


def test_candidates_run_in_other_processes():
    """Without a GPU that fails, and says so."""
    if torch.cuda.is_available():
        pytest.skip("runs on the GPU")
    with isolated.Processes(1) as processes:
        (error,) = processes.errors(tune.run_once, [("enqueue", "rows", (128, 1))])
    assert error is not None and "its process ended" not in error


@pytest.mark.gpu
def test_a_candidate_that_ran_elsewhere_is_not_compiled_here(tmp_path):
    """Otherwise compiling in parallel is for nothing."""
    folder = Path(tune.__file__).parents[1]
    tried = "from bench import tune; tune.run_once('enqueue', 'rows', (128, 1))"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    count = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", tried], env=environment, check=True, cwd=folder)
        count.append(len(list(tmp_path.rglob("*.cubin"))))
    assert count[0] == count[1] > 0


def test_tuning_twice_changes_one_line_and_keeps_the_format(kernel):
    tiles.rewrite(kernel, {5: (2,)}, "first")
    once = kernel.read_text()
    tiles.rewrite(kernel, {5: (2,)}, "second")
    assert kernel.read_text() == once.replace("first", "second") and once.count("Measured") == 1
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--isolated", "--line-length", "110", kernel],
        capture_output=True,
        text=True,
    )
    if "No module named ruff" in checked.stderr:
        pytest.skip("ruff is not installed")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "# Elements per program; measured with bench/tune.py on an old GPU.\nTILES: dict = {4: (1, 2)}\n",
            "# Elements per program.\n# Measured with bench/tune.py: here.\nTILES: dict = {4: (8, 2)}\n",
        ),
        ("x = 1\nTILES = {}\n", "x = 1\n# Measured with bench/tune.py: here.\nTILES = {4: (8, 2)}\n"),
        (
            f'TILES = {{{", ".join(f"{i}: (1, 2)" for i in range(4))}, "{"k" * 60}": (3,)}}\n',
            "# Measured with bench/tune.py for 1 of 6 classes: here.\nTILES = {\n"
            "    0: (1, 2),\n    1: (1, 2),\n    2: (1, 2),\n    3: (1, 2),\n"
            f'    "{"k" * 60}": (3,),\n    4: (8, 2),\n}}\n',
        ),
    ],
    ids=["suffix", "empty", "long"],
)
def test_layout_and_comment(tmp_path, before, after):
    path = tmp_path / "op.py"
    path.write_text(before)
    tiles.rewrite(path, {4: (8, 2)}, "here")
    assert path.read_text() == after


def test_what_cannot_be_tuned_is_refused(kernel, monkeypatch):
    kernel.write_text(KERNEL.replace("TILES = {", "TILES = dict() or {"))
    with pytest.raises(ValueError, match=r"has no module-level literal TILES"):
        tune.classes(["fake_op"], [])
    sys.modules.pop("moco_fast.kernels.fake_op")
    kernel.write_text("TILES = {}\n")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="fake_op cannot be tuned: it has no CANDIDATES, tune_case"):
        tune.classes(["fake_op"], [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no GPU"):
        tune.main(["fake_op"])


def test_all_that_can_be_tuned_is_found(kernel):
    assert "fake_op" in tiles.tunable()
