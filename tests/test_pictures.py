"""Pictures: what is drawn, from what, and that files appear whole."""

import json
import math

import pytest
import torch

from moco_fast.evaluate.pictures import plot_curves, plot_neighbours
from moco_fast.evaluate.pictures.figure import GREEN, RED

matplotlib = pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


def full_record(step: int) -> dict:
    return {
        "step": step, "epoch": step / 10, "loss": 9.0 - step / 100, "chance_loss": math.log(16385),
        "lr": 0.03, "pos_sim": 0.8, "neg_sim": 0.1, "acc1": 0.2, "images_per_s": 900.0, "data_wait": 0.01,
    }  # fmt: skip


def write_lines(path, records, tail=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def test_curves_of_a_full_run(tmp_path, figures):
    records = [full_record(s) for s in range(200)]
    records[0] |= {"knn": 0.74, "knn_raw_pixels": 0.82, "knn_random_init": 0.74}
    records[150]["knn"] = 0.87
    path = write_lines(tmp_path / "metrics.jsonl", records, tail='{"step": 200, "lo')
    backend = matplotlib.get_backend()
    plot_curves(path, tmp_path / "deep" / "curves.png")
    (figure,) = figures
    assert titles(figure) == [
        "Contrastive loss", "Cosine similarity", "kNN accuracy, %", "Images per second and learning rate",
    ]  # fmt: skip
    loss, _, knn = figure.axes[:3]
    chance = [line for line in loss.lines if list(line.get_ydata()) == [math.log(16385)] * 2]
    assert len(chance) == 1 and chance[0].get_linestyle() == "--"
    assert max(loss.lines[0].get_xdata()) == 199  # the half-written line is left out
    assert {"raw pixels 82.0", "untrained encoder 74.0", "87.0"} <= {text.get_text() for text in knn.texts}
    assert list(knn.lines[0].get_xdata()) == [0, 150] and list(knn.lines[0].get_ydata()) == [74.0, 87.0]
    with Image.open(tmp_path / "deep" / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 600
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["curves.png"]
    assert matplotlib.get_backend() == backend


def test_running_mean_is_centred(tmp_path, figures):
    write_lines(tmp_path / "m.jsonl", [{"step": s, "loss": float(s)} for s in range(250)])
    plot_curves(tmp_path / "m.jsonl", tmp_path / "c.png")
    faint, mean = figures[0].axes[0].lines
    assert len(faint.get_xdata()) == 250 and len(mean.get_xdata()) == 246
    assert torch.allclose(torch.tensor(mean.get_ydata()), torch.tensor(mean.get_xdata()).double())


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([{"step": 0, "loss": 1.0}], ["Contrastive loss"]),
        ([{"step": 0, "neg_sim": 0.5}, {"step": 1, "neg_sim": 0.4}], ["Cosine similarity"]),
        ([{"step": 5, "knn": 0.5}], ["kNN accuracy, %"]),
        ([{"step": 0, "train_loss": 2.0}, {"step": 1, "test_loss": 1.0}], ["Cross-entropy"]),
        ([{"step": 0, "test_acc1": 0.5, "test_acc5": 0.9}], ["Test accuracy, %"]),
        ([{"step": 0, "lr": 0.0}, {"step": 1, "lr": 0.0}], ["Learning rate"]),
        ([{"step": 0, "images_per_s": 3.0, "loss": None}], ["Images per second"]),
        ([{"step": 0, "loss": 1.0}, {"step": 1, "loss": math.nan}, {"knn": 0.5}], ["Contrastive loss"]),
    ],
)
def test_draws_only_what_is_there(records, expected, tmp_path, figures):
    plot_curves(write_lines(tmp_path / "m.jsonl", records), tmp_path / "c.png")
    assert titles(figures[0]) == expected


def test_records_that_cannot_be_drawn(tmp_path):
    for records in ([], [{"epoch": 1}], [{"loss": 1.0}]):
        with pytest.raises(ValueError, match="holds nothing to draw"):
            plot_curves(write_lines(tmp_path / "m.jsonl", records), tmp_path / "c.png")
    (tmp_path / "m.jsonl").write_text('{"step": 0, "lo\n{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        plot_curves(tmp_path / "m.jsonl", tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def frame_colours(figure):
    return [a.spines["left"].get_edgecolor() if a.spines["left"].get_visible() else None for a in figure.axes]


@pytest.mark.parametrize("channels", [1, 3])
def test_gallery_frames(channels, tmp_path, figures):
    queries = torch.randint(256, (2, channels, 9, 9), dtype=torch.uint8)
    neighbours = torch.randint(256, (2, 3, channels, 9, 9), dtype=torch.uint8)
    arguments = (torch.tensor([0, 1]), torch.tensor([[0, 1, 0], [1, 1, 0]]), ("cat", "dog"))
    plot_neighbours(queries, neighbours, *arguments, tmp_path / "g.png", torch.full((2, 3), 0.5))
    to_rgba = matplotlib.colors.to_rgba
    green, red = to_rgba(GREEN), to_rgba(RED)
    assert frame_colours(figures[0]) == [None, green, red, green, None, green, green, red]
    shown = figures[0].axes[1].images[0].get_array()
    expected = neighbours[0, 0, 0] if channels == 1 else neighbours[0, 0].permute(1, 2, 0)
    assert torch.equal(torch.from_numpy(shown.data), expected)
    assert {"cat", "dog"} <= {text.get_text() for text in figures[0].texts}
    assert figures[0].axes[1].get_xlabel() == "0.50" and figures[0].axes[0].get_xlabel() == ""
    plot_neighbours(queries, neighbours, None, None, (), tmp_path / "g.png")
    assert set(frame_colours(figures[1])) == {None}
    assert [p.name for p in tmp_path.iterdir()] == ["g.png"]


def test_gallery_shapes(tmp_path):
    queries, neighbours = torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 3, 4, 4)
    with pytest.raises(ValueError, match="queries must be"):
        plot_neighbours(queries, neighbours, None, None, (), tmp_path / "g.png")


def test_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "c.png"
    write_lines(tmp_path / "m.jsonl", [{"step": 0, "loss": 1.0}])
    plot_curves(tmp_path / "m.jsonl", path)
    old = path.read_bytes()

    def half_written(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half_written)
    with pytest.raises(OSError, match="disk full"):
        plot_curves(tmp_path / "m.jsonl", path)
    assert path.read_bytes() == old and sorted(p.name for p in tmp_path.iterdir()) == ["c.png", "m.jsonl"]
