"""What travels between ranks in a step, counted by a process group that wraps gloo."""

import pytest
from PIL import Image

from bench import cost_model, ranks


@pytest.fixture(scope="module", params=[2, 4])
def counted(request):
    world = request.param
    ways = ranks.measure_world(world, rounds=1, slots=512)
    return world, {way["name"]: way["received"] for way in ways}


def test_the_shuffle_moves_only_the_rows_a_rank_needs(counted):
    world, received = counted
    row = 4 * ranks.CHANNELS * ranks.PIXELS**2
    others = ranks.BATCH * (world - 1)
    assert received[ranks.OURS]["all_to_all"] <= 1.05 * others / world * row
    # The official scheme gathers all images, and the keys twice.
    keys = 4 * ranks.DIM * others
    assert received[ranks.OFFICIAL]["all_gather"] == others * row + 2 * keys
    assert received[ranks.GATHERED]["all_gather"] == others * row + keys


def test_one_gathering_of_keys_and_no_broadcast_of_the_queue(counted):
    world, received = counted
    assert received[ranks.OURS]["all_gather"] == 4 * ranks.DIM * ranks.BATCH * (world - 1)
    # DistributedDataParallel broadcasts the statistics of batch norm in both; the official scheme the queue
    # (and its pointer, and the order of the images) besides.
    queue = 4 * ranks.DIM * 512 + 8 + 8 * world * ranks.BATCH
    others = (world - 1) / world  # all but rank 0
    assert received[ranks.OFFICIAL]["broadcast"] - received[ranks.OURS]["broadcast"] == queue * others


def test_table_and_picture(tmp_path):
    """The command as a whole, on two processes and a small queue; and the document it writes into."""
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- ranks:begin -->\nold\n<!-- ranks:end -->\nafter\n")
    ranks.main(["--quick", "--out", str(tmp_path), "--doc", str(document)])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 2 | official scheme | 0 |" in text and "| 2 | moco_fast | " in text
    (picture,) = tmp_path.glob("*-ranks.png")
    with Image.open(picture) as image:
        assert image.size[0] > 500 and len(image.convert("L").getcolors()) > 10
    with pytest.raises(ValueError, match="must hold <!-- ranks:begin -->"):
        ranks.main(["--quick", "--out", str(tmp_path), "--doc", str(picture.with_suffix(".json"))])


def test_cost_model_counts_what_a_run_counted(counted):
    """The same bytes, but for the size of the images and of the queue."""
    world, received = counted
    pixels = 4 * ranks.CHANNELS * ranks.PIXELS**2
    for scheme, name in (("official, fp32", ranks.OFFICIAL), ("moco_fast, fp32", ranks.OURS)):
        images, *rest = cost_model.schemes(world, ranks.BATCH, ranks.DIM)[scheme]
        scaled = images.received(world) * pixels / (4 * cost_model.IMAGE)
        keys = sum(c.received(world) for c in rest if c.kind == "all_gather")
        gathered = received[name]["all_gather"] + received[name]["all_to_all"]
        assert scaled + keys == gathered
    report = cost_model.schemes(1024, 32, 128)
    assert sum(c.received(1024) for c in report["moco_fast, fp32"]) < 0.002 * sum(
        c.received(1024) for c in report["official, fp32"]
    )


def test_cost_model_writes_its_table(tmp_path, capsys):
    document = tmp_path / "document.md"
    document.write_text("<!-- cost:begin -->\n<!-- cost:end -->\n")
    cost_model.main(["--doc", str(document)])
    assert "| 1024 | moco_fast, uint8 |" in document.read_text() and "InfiniBand" in capsys.readouterr().out
