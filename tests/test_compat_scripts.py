"""Scripts with the calls of the official ones, on moco_fast and on plain PyTorch with official semantics."""

import json
import sys
from pathlib import Path

import pytest
import ranks
import torch

SCRIPTS = Path(__file__).parent / "scripts"
OURS = "moco_fast.compat.builder"


def rank_script(rank, script, builder, arguments, out):
    """Run a script in the place of a rank, and return what it measured."""
    import torch.distributed as dist

    from moco_fast.compat import launcher

    world = dist.get_world_size()
    dist.destroy_process_group()  # the script makes its own
    launcher.ANSWERED |= {"moco.builder": builder, "vits": "small_vits"}
    sys.path.insert(0, "")  # the launcher puts the script's folder here
    url = f"file://{out}/rendezvous"
    arguments = [*arguments, "--dist-url", url, "--world-size", str(world), "--rank", str(rank), "--out", out]
    launcher.main([f"--device=cpu:{world}", str(SCRIPTS / script), "--gpu", str(rank), *arguments])
    return json.loads(Path(out, f"rank{rank}.json").read_text())


def run(script, builder, *arguments, folder, world=1):
    out = folder / f"{builder}-{len(list(folder.iterdir()))}"
    out.mkdir()
    arguments = [str(argument) for argument in arguments]
    history = ranks.run(world, rank_script, script, builder, arguments, str(out), folder=folder)
    return torch.tensor(history), out


def both(script, *arguments, folder, world=1):
    """History and folder of each, (rank, step, value)."""
    return [run(script, builder, *arguments, folder=folder, world=world) for builder in ("oracle", OURS)]


@pytest.mark.parametrize(
    ("world", "arguments"),
    [(1, []), (2, ["--mlp", "--aug-plus", "--cos", "--moco-t", 0.2, "--find-unused-parameters"])],
    ids=["v1 on one", "v2 on two"],
)
def test_pretraining(tmp_path, world, arguments):
    """The same losses and accuracies; a checkpoint of either goes on with either; its encoder is read."""
    (want, eager), (got, ours) = both("pretrain.py", *arguments, folder=tmp_path, world=world)
    assert want.shape == (world, 20, 3)
    equal(got, want)
    assert 0 < want[..., 2].mean() < 100
    if world == 1:
        for folder, builder in ((eager, OURS), (ours, "oracle")):
            checkpoint = folder / "checkpoint_0002.pth.tar"
            rest, _ = run("pretrain.py", builder, "--resume", checkpoint, folder=tmp_path)
            equal(rest, want[:, 12:])
    pretrained = ours / "checkpoint_0004.pth.tar"
    history, _ = run("linear.py", OURS, "--pretrained", pretrained, "--lr", 0.5, folder=tmp_path)
    assert history[0, -1, 0] < history[0, 0, 0]


def equal(got, want):
    torch.testing.assert_close(got[..., 0], want[..., 0], rtol=1e-5, atol=0)
    assert torch.equal(got[..., 1:], want[..., 1:])


@pytest.mark.parametrize(
    ("world", "arguments"),
    [
        (
            1,
            [
                "--arch",
                "vit_tiny",
                "--optimizer",
                "adamw",
                "--lr",
                0.02,
                "--moco-t",
                0.2,
                "--stop-grad-conv1",
            ],
        ),
        (2, ["--moco-m-cos"]),
    ],
    ids=["ViT on one", "ResNet on two"],
)
def test_pretraining_v3(tmp_path, world, arguments):
    (want, _), (got, ours) = both("pretrain_v3.py", *arguments, folder=tmp_path, world=world)
    assert want.shape == (world, 20, 1)
    equal(got, want)
    if world == 2:
        pretrained = ours / "checkpoint_0004.pth.tar"
        options = ["--encoder", "base_encoder", "--pretrained", pretrained, "--lr", 0.5]
        history, _ = run("linear.py", OURS, *options, folder=tmp_path)
        assert history[0, -1, 0] < history[0, 0, 0]
