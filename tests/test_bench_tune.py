"""Tuning of tile tables, with a kernel file that needs no GPU: what is tried, what is written, what stays."""

import ast
import importlib
import subprocess
import sys

import pytest
import torch
from conftest import interpreter_fault

import moco_fast.kernels
from moco_fast.kernels import backend

pytest.importorskip("rich")
pytest.importorskip("triton")

from rich.console import Console

from bench import tune

CPU = torch.device("cpu")
KERNEL = '''"""A kernel file."""

import time

# (BLOCK, warps) by class of rows.
# Not measured on a GPU yet: chosen with care.
TILES = {
    ("few", 32): (64, 4),
    ("many", 32): (128, 8),
    5: (1,),
}  # the end
AFTER = 1

CANDIDATES = {("few", 32): [(64, 4), (16, 2), (0, 0)], ("many", 32): [(0, 0)]}


def tune_case(key):
    def make(value):
        if value == (0, 0):
            raise RuntimeError("out of resource: shared memory\\nand more")
        return lambda: time.sleep(value[0] * 1e-4)

    return make
'''


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """The file as moco_fast.kernels.fake_op."""
    path = tmp_path / "fake_op.py"
    path.write_text(KERNEL)
    monkeypatch.setattr(moco_fast.kernels, "__path__", [*moco_fast.kernels.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield path
    sys.modules.pop("moco_fast.kernels.fake_op", None)


def test_the_fastest_goes_into_the_file(kernel, capsys):
    tune.tune("fake_op", CPU, Console(width=150), seconds=1e-3)
    text = kernel.read_text()
    names = dict(line.split(" = ", 1) for line in text.splitlines() if line.startswith(("AFTER", "CANDID")))
    assert names["AFTER"] == "1" and text.startswith('"""A kernel file."""\n') and "def tune_case" in text
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.Assign))
    tiles = ast.literal_eval(node.value)
    # The faster one won; what could not run, and what had no candidates, stays.
    assert tiles == {("few", 32): (16, 2), ("many", 32): (128, 8), 5: (1,)}
    lines = text.splitlines()
    at = node.lineno - 1
    assert lines[at - 2] == "# (BLOCK, warps) by class of rows."
    assert lines[at - 1].startswith("# Measured with bench/tune.py: ") and "torch" in lines[at - 1]
    assert "Not measured" not in text and "# the end" not in lines[at - 1]
    printed = capsys.readouterr().out
    assert "2. of 2" in printed and "(16, 2)" in printed
    assert "skipped ('many', 32): (0, 0): RuntimeError: out of resource: shared memory" in printed
    assert "and more" not in printed


def test_tuning_twice_changes_one_line_and_keeps_the_format(kernel):
    tune.rewrite(kernel, {5: (2,)}, "first")
    once = kernel.read_text()
    tune.rewrite(kernel, {5: (2,)}, "second")
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
            "# Measured with bench/tune.py: here.\nTILES = {\n    0: (1, 2),\n    1: (1, 2),\n"
            f'    2: (1, 2),\n    3: (1, 2),\n    "{"k" * 60}": (3,),\n    4: (8, 2),\n}}\n',
        ),
    ],
    ids=["suffix", "empty", "long"],
)
def test_layout_and_comment(tmp_path, before, after):
    path = tmp_path / "op.py"
    path.write_text(before)
    tune.rewrite(path, {4: (8, 2)}, "here")
    assert path.read_text() == after


def test_what_cannot_be_tuned_is_refused(kernel, monkeypatch):
    kernel.write_text(KERNEL.replace("TILES = {", "TILES = dict() or {"))
    with pytest.raises(ValueError, match=r"has no module-level literal TILES"):
        tune.tune("fake_op", CPU, Console())
    sys.modules.pop("moco_fast.kernels.fake_op")
    kernel.write_text("TILES = {}\n")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="fake_op cannot be tuned: it has no CANDIDATES, tune_case"):
        tune.tune("fake_op", CPU, Console())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no GPU"):
        tune.main(["fake_op"])


def test_all_that_can_be_tuned_is_found(kernel):
    assert "fake_op" in tune.tunable()


KERNELS = ["dino", "ema_update", "enqueue", "info_nce", "pairs", "split_batch_norm", "take_rows"]


def test_kernels_that_can_be_tuned():
    assert tune.tunable() == KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_every_class_has_candidates_and_the_tiles_of_now_among_them(name):
    module = importlib.import_module(f"moco_fast.kernels.{name}")
    assert module.CANDIDATES.keys() == module.TILES.keys()
    for key, tiles in module.TILES.items():
        candidates = module.CANDIDATES[key]
        assert tiles in candidates and 2 <= len(set(candidates)) == len(candidates), (key, tiles)


@pytest.fixture
def interpreter():
    if reason := backend.cannot_serve("nt_xent", (torch.empty((1, 1)),)) or interpreter_fault():
        pytest.skip(reason)


@pytest.mark.parametrize("key", [("sums", 32), ("gradient", 64), ("split sums", 32), ("split gradient", 32)])
def test_pairs_runs_the_tiles_it_is_given(interpreter, key, monkeypatch):
    """The same sums from other tiles; the tables are not asked."""
    from moco_fast.kernels import pairs

    launch = pairs.tune_case(key, rows=150, device="cpu")
    wanted = launch(pairs.TILES[key])()
    monkeypatch.setattr(pairs, "tiles_for", lambda *_: pytest.fail("the tables were asked"))
    found = launch((64, 32, 4, 2, 1))()
    part = "totals" if "sums" in key[0] else "sums"
    got, want = (getattr(partial, part).sum(dim=0) for partial in (found, wanted))
    assert (got - want).norm() <= 1e-3 * want.norm() > 0  # weights are rounded to fp16


@pytest.mark.parametrize("key", [("rows", 32), ("prototypes", 32), ("split rows", 32)])
def test_dino_runs_the_tiles_it_is_given(interpreter, key, monkeypatch):
    from moco_fast.kernels import dino

    def results(found):
        if isinstance(found, torch.Tensor):
            return [found]
        return [(part.totals * part.shifts.exp2()).sum(dim=0).log2() for part in found]

    launch = dino.tune_case(key, rows=20, prototypes=100, device="cpu")
    wanted = results(launch(dino.TILES[key])())
    monkeypatch.setattr(dino, "tiles_for", lambda *_: pytest.fail("the tables were asked"))
    for got, want in zip(results(launch((64, 128, 4, 2, 1))()), wanted, strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm() > 0  # weights are rounded to fp16


def test_enqueue_runs_the_tiles_it_is_given(interpreter, monkeypatch):
    from moco_fast.kernels import enqueue

    written = []
    monkeypatch.setattr(enqueue, "enqueue_", lambda queue, ptr, keys, mirror, *, tiles: written.append(tiles))
    enqueue.tune_case("rows", slots=300, device="cpu")((256, 2))()
    assert written == [(256, 2)]
    monkeypatch.undo()
    keys = torch.randn(5, 16)
    queues = torch.zeros(2, 7, 16)
    for queue, tiles in zip(queues, (None, (32, 1)), strict=True):
        enqueue.enqueue_(queue, torch.tensor([4]), keys, tiles=tiles)
    assert torch.equal(queues[0], queues[1]) and queues[0].any(dim=1).sum() == 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_the_present_tiles_run_on_the_gpu(name):
    module = importlib.import_module(f"moco_fast.kernels.{name}")
    for key, tiles in module.TILES.items():
        module.tune_case(key)(tiles)()
    torch.cuda.synchronize()
