"""Tile tables of the kernels: candidates of every class, and kernels that run the tiles they are given."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from conftest import interpreter_fault

from moco_fast.kernels import backend

pytest.importorskip("rich")
pytest.importorskip("triton")

from bench import tiles

KERNELS = ["augment", "dino", "ema_update", "enqueue", "info_nce", "pairs", "split_batch_norm", "take_rows"]


def test_kernels_that_can_be_tuned():
    assert tiles.tunable() == KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_every_class_has_candidates_and_the_tiles_of_now_among_them(name):
    module = importlib.import_module(f"moco_fast.kernels.{name}")
    assert module.CANDIDATES.keys() == module.TILES.keys()
    for key, now in module.TILES.items():
        candidates = module.CANDIDATES[key]
        assert now in candidates and 2 <= len(set(candidates)) == len(candidates) <= 36, key


@pytest.mark.parametrize("name", KERNELS)
def test_no_comment_says_that_what_was_measured_was_not(name, tmp_path):
    module = importlib.import_module(f"moco_fast.kernels.{name}")
    path = Path(shutil.copy(module.__file__, tmp_path))
    for about in ("H200, torch 2.9", "a" * 40 + " " + "b" * 60):
        tiles.rewrite(path, module.TILES, about)
    text = path.read_text()
    assert "ot measured" not in text and text.count("Measured with") == 1 and "H200, torch" not in text
    assert max(map(len, text.partition("\nTILES")[0].splitlines())) <= tiles.WIDTH
    before = Path(module.__file__).read_text()
    assert text.split("TILES")[1].split("}")[0] == before.split("TILES")[1].split("}")[0]


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
    for queue, given in zip(queues, (None, (32, 1)), strict=True):
        enqueue.enqueue_(queue, torch.tensor([4]), keys, tiles=given)
    assert torch.equal(queues[0], queues[1]) and queues[0].any(dim=1).sum() == 5


def classes():
    for name in KERNELS:
        for key in importlib.import_module(f"moco_fast.kernels.{name}").TILES:
            yield pytest.param(name, key, id=f"{name}-{key}")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "key"), list(classes()))
def test_the_present_tiles_run_on_the_gpu(name, key):
    module = importlib.import_module(f"moco_fast.kernels.{name}")
    module.tune_case(key)(module.TILES[key])()
    torch.cuda.synchronize()
