"""Studies: run, resumed, summarised and drawn."""

import contextlib
import io
import math
import os
import signal
from dataclasses import fields, replace

import pytest
import ranks
import torch.distributed as dist
from images import write_image
from PIL import Image
from rich.console import Console

from moco_fast.data.augment import AugmentConfig
from moco_fast.study import figure, plans, sweep
from moco_fast.study.results import Row, baselines, read_rows, summarise, write_rows
from moco_fast.train.config import PretrainConfig
from moco_fast.train.methods import METHODS
from moco_fast.train.presets import PRESETS
from moco_fast.train.processes import joined

pytest.importorskip("tyro", reason="tyro is not installed: there is no command line")

import moco_fast.commands.study as study_command
from bench import studies
from moco_fast.cli import main
from moco_fast.commands import run as command

TINY = PretrainConfig(
    data="digits", epochs=1, batch_size=256, width=8, dim=16, queue_size=512, log_every=1, knn_every=10**9,
    knn_bank=200, augment=AugmentConfig(image_size=8), threads=1, warmup_epochs=0.0,
)  # fmt: skip
POINTS = [plans.Point("MoCo", m, replace(TINY, momentum=m)) for m in (0.0, 0.9)]
STUDY = plans.Study("How slow?", "here", "momentum m", lambda: POINTS, lambda: POINTS)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, sweep.run_sweep(POINTS, range(2), out, QUIET)


def test_rows_of_every_point_and_seed(swept):
    out, result = swept
    assert result.interrupted == 0 and read_rows(out) != []
    assert [(row.x, row.seed) for row in result.rows] == [(0.0, 0), (0.9, 0), (0.0, 1), (0.9, 1)]
    for row in result.rows:
        assert (
            0 < row.knn <= 1 and 0 < row.linear <= 1 and row.loss > 0 and not row.collapsed and not row.note
        )
        assert (out / row.folder / "checkpoint.pth").exists()
    assert {row.linear_random_init for row in result.rows if row.seed == 0} != {math.nan}
    assert set(read_rows(out)) == set(result.rows)


def test_what_is_done_is_not_done_again(swept, monkeypatch):
    out, result = swept
    monkeypatch.setattr(sweep, "pretrain", None)
    assert sweep.run_sweep(POINTS, range(2), out, QUIET) == result


def test_other_settings_in_the_same_folder_are_refused(swept):
    out, _ = swept
    points = [replace(POINTS[0], config=replace(POINTS[0].config, lr=0.5))]
    with pytest.raises(ValueError, match=r"has other settings, lr was 0.06 and is 0.5: choose another --out"):
        sweep.run_sweep(points, [0], out, QUIET)


def test_a_stopped_sweep_goes_on(tmp_path, monkeypatch):
    begun = []
    whole = sweep.pretrain

    def stopping(config, folder, **options):
        begun.append(folder.name)
        if len(begun) == 2:
            outcome = whole(config, folder, **options)
            return replace(outcome, interrupted=signal.SIGTERM)
        return whole(config, folder, **options)

    monkeypatch.setattr(sweep, "pretrain", stopping)
    stopped = sweep.run_sweep(POINTS, [0], tmp_path, QUIET)
    assert stopped.interrupted == signal.SIGTERM and len(stopped.rows) == 1
    monkeypatch.setattr(sweep, "pretrain", whole)
    assert len(sweep.run_sweep(POINTS, [0], tmp_path, QUIET).rows) == 2


def row(series, seed, knn, **changes):
    values = {
        "x": None, "knn_random_init": 0.5, "knn_raw_pixels": 0.6, "linear": knn, "linear_random_init": 0.5,
        "linear_raw_pixels": 0.6, "loss": 1.0, "spread": 1.0, "rank": 9.0, "collapsed": False, "note": "",
        "seconds": 1.0, "folder": "",
    }  # fmt: skip
    return Row(series=series, seed=seed, knn=knn, **(values | changes))


def test_verdicts():
    rows = [
        *(row("good", seed, 0.7 + 0.01 * seed) for seed in range(3)),
        *(row("noisy", seed, 0.5 + 0.05 * (seed - 0.8)) for seed in range(3)),
        *(row("fallen", seed, 0.4, collapsed=True, spread=0.01) for seed in range(3)),
        row("burst", 0, math.nan, note="diverged: not finite at step 3", knn_random_init=math.nan),
        row("few", 0, math.nan),
    ]
    found = {line.series: line for line in summarise(rows)}
    assert found["good"].verdict == "yes" and str(found["good"].knn) == "71.0 ± 1.0"
    assert found["noisy"].verdict == "no: not better than untrained by more than the spread"
    assert found["fallen"].verdict == "no: 3 of 3 collapsed (spread 0.01, rank 9.0)"
    assert found["burst"].verdict == "no: diverged: not finite at step 3" and str(found["burst"].knn) == "-"
    assert found["few"].verdict == "not measured"
    assert baselines(rows, "knn")["random init"].mean == 50.0


def test_rows_survive_the_file(tmp_path):
    rows = [row("a, b", 0, math.nan, note='said "no"'), row("c", 1, 0.25, x=0.999)]
    write_rows(tmp_path, rows)
    assert str(read_rows(tmp_path)) == str(rows)
    (tmp_path / "results.csv").write_text("series,x\na,1\n")
    with pytest.raises(ValueError, match="not a result of this version"):
        read_rows(tmp_path)


def test_figures(swept, tmp_path):
    out, result = swept
    figure.plot_study(STUDY, result.rows, out, tmp_path / "axis.png")
    beside = replace(STUDY, axis=None)
    rows = [replace(r, series=f"m = {r.x}", x=None) for r in result.rows]
    figure.plot_study(beside, rows, out, tmp_path / "beside.png")
    for name in ("axis.png", "beside.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 10
    table = figure.markdown(STUDY, result.rows)
    assert table.count("\n") == 2 + 2 + 2 and "| MoCo | 0.9 |" in table


@pytest.mark.parametrize("name", plans.STUDIES)
def test_plans(name):
    study = plans.STUDIES[name]
    for points in (study.small(), study.full()):
        keys = [(point.series, point.x) for point in points]
        assert len(set(keys)) == len(keys) >= 3
        assert len({sweep._name(point, 0) for point in points}) == len(points)
        assert all((point.x is not None) == (study.axis is not None) for point in points)
    assert all(point.config.data == "fashion-mnist" for point in study.small())


def test_all_methods_are_compared():
    assert {point.config.method for point in plans.STUDIES["methods"].small()} == set(METHODS)


def differing(a, b):
    return {f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)}


def test_the_full_comparison_is_by_the_papers():
    """One budget of images for all; of the symmetric MoCo v2 nothing else differs; heads of the papers."""
    study = plans.STUDIES["methods"]
    full = {point.series: point.config for point in study.full()}
    assert list(full) == [point.series for point in study.small()]
    assert {(c.epochs, c.data, c.arch, c.lr_batch_size) for c in full.values()} == {
        (100, "imagenet", "resnet50", 256)
    }
    assert differing(full["moco-v2"], full["moco-v2, symmetric"]) == {"symmetric"}
    assert differing(full["moco-v2"], PRESETS["moco-v2"].config) == {"epochs", "knn_every"}
    assert differing(full["moco-v3"], PRESETS["moco-v3"].config) == {"knn_every"}
    assert differing(full["moco-v1"], PRESETS["moco-v1"].config) == {"epochs", "milestones", "knn_every"}
    assert full["moco-v1"].milestones == (60, 80)
    assert all(c.schedule == "cosine" or c.milestones == (60, 80) for c in full.values())
    assert [(c.dim, c.temperature) for c in (full["simclr"], full["dino"])] == [(128, 0.1), (256, 0.1)]
    simsiam, dino, simclr = full["simsiam"], full["dino"], full["simclr"]
    assert (simsiam.dim, simsiam.pred_dim, simsiam.batch_size, simsiam.lr) == (2048, 512, 512, 0.05)
    assert (dino.mlp_dim, dino.prototypes, dino.teacher_temperature, dino.momentum) == (
        2048,
        65536,
        0.04,
        0.996,
    )
    assert (simclr.batch_size, simclr.optimizer, simclr.lr, simclr.weight_decay) == (4096, "lars", 0.3, 1e-6)
    assert simclr.augment_second is None and simclr.augment.jitter == (0.8, 0.8, 0.8, 0.2)
    assert full["sup-moco"].temperature == 0.1 and full["memory-bank, nce"].queue_size == 4096


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(plans.STUDIES, "momentum", STUDY)
    out = tmp_path / "out"
    assert command(["study", "momentum", "--out", str(out)]) == 0
    assert {"results.csv", "table.md", "figure.png"} <= {path.name for path in out.iterdir()}
    assert "How slow?" in capsys.readouterr().out
    (tmp_path / "doc.md").write_text("before\n<!-- studies:begin -->\n<!-- studies:end -->\nafter\n")
    (tmp_path / "images").mkdir()
    out.rename(out := tmp_path / "momentum-small")
    studies.write(tmp_path, "small", tmp_path / "doc.md")
    text = (tmp_path / "doc.md").read_text()
    assert text.startswith("before") and "## How slow?" in text and "2 runs," in text
    assert (tmp_path / "images" / "study-momentum.png").exists()
    assert command(["study", "momentum", "--out", str(out), "--seeds", "0"]) == 1
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err


def test_images_without_labels_are_refused_before_a_run(tmp_path):
    for i in range(3):
        write_image(tmp_path / "flat" / f"{i}.png")
    points = [replace(POINTS[0], config=replace(TINY, data=str(tmp_path / "flat")))]
    with pytest.raises(ValueError, match="cannot be measured: the images have no class labels"):
        sweep.run_sweep(points, [0], tmp_path / "out", QUIET)
    assert not list((tmp_path / "out").rglob("metrics.jsonl"))


def test_another_number_of_epochs_scales_the_schedule():
    config = PRESETS["moco-v1"].config.with_epochs(100)
    assert (config.epochs, config.milestones) == (100, (60, 80))
    config = PRESETS["moco-v3"].config.with_epochs(50)
    assert (config.epochs, config.warmup_epochs, config.milestones) == (50, 5, (120, 160))


def rank_of_a_study(rank, port, out):
    """As torchrun starts it: no process group yet. What it wrote and said."""
    dist.destroy_process_group()
    names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
    names |= {"TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    written = []

    def sweep_of_two_processes(points, seeds, folder, console):
        with joined("cpu"):
            assert dist.get_world_size() == 2
        return sweep.Sweep([], 0)

    study_command.run_sweep = sweep_of_two_processes
    study_command.write_text = lambda path, text: written.append(path.name)
    study_command.plot_study = lambda *args: written.append("figure")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert study_command.Study("momentum", out=out, device="cpu").run() == 0
    assert not dist.is_initialized()
    return written, said.getvalue()


def test_rank_0_alone_speaks_and_writes(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    (written, said), other = ranks.run(2, rank_of_a_study, store.port, tmp_path / "out", folder=tmp_path)
    assert written == ["table.md", "figure"] and "table.md and figure.png are in" in said
    assert other == ([], "")


def test_study_remembers_where_its_images_are(tmp_path, monkeypatch):
    from moco_fast.commands import study
    from moco_fast.study.sweep import Sweep

    seen = []

    def swept(points, seeds, out, console):
        seen.extend(point.config.data for point in points)
        return Sweep([], signal.SIGTERM)

    monkeypatch.setattr(study, "run_sweep", swept)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert main(["study", "momentum", "--data", "photos"]) == 128 + signal.SIGTERM
    assert set(seen) == {str(tmp_path / "photos")}
