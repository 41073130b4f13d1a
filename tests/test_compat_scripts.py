"""Scripts with the calls of the official ones, on moco_fast and on plain PyTorch with official semantics."""

import json
from pathlib import Path

import pytest
import ranks
import torch
from largest import Largest

SCRIPTS = Path(__file__).parent / "scripts"
OURS = "moco_fast.compat.builder"


def rank_script(rank, script, builder, arguments, out):
    """Run a script in the place of a rank, and return what it measured."""
    import torch.distributed as dist

    from moco_fast.compat import launcher

    world = dist.get_world_size()
    dist.destroy_process_group()  # the script makes its own
    launcher.ANSWERED |= {"moco.builder": builder, "vits": "small_vits"}
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


V2 = ["--mlp", "--aug-plus", "--cos", "--moco-t", 0.2, "--find-unused-parameters"]


@pytest.mark.parametrize("arguments", [[], V2], ids=["v1", "v2"])
@pytest.mark.parametrize("world", [1, 2])
def test_pretraining(tmp_path, world, arguments):
    """The same losses and accuracies; a checkpoint of either goes on with either."""
    (want, eager), (got, ours) = both("pretrain.py", *arguments, folder=tmp_path, world=world)
    assert want.shape == (world, 20, 3)
    equal(got, want)
    assert 0 < want[..., 2].mean() < 100
    if world == 1 and arguments is V2:
        for folder, builder in ((eager, OURS), (ours, "oracle")):
            options = [*arguments, "--resume", folder / "checkpoint_0002.pth.tar"]
            rest, _ = run("pretrain.py", builder, *options, folder=tmp_path)
            equal(rest, want[:, 12:])
    if world == 2 and arguments is V2:
        linear_classifier_learns("encoder_q", ours, tmp_path)


def equal(got, want):
    torch.testing.assert_close(got[..., 0], want[..., 0], rtol=1e-5, atol=0)
    assert torch.equal(got[..., 1:], want[..., 1:])


def linear_classifier_learns(encoder, pretrained, folder):
    options = ["--encoder", encoder, "--pretrained", pretrained / "checkpoint_0004.pth.tar", "--lr", 0.5]
    history, _ = run("linear.py", OURS, *options, folder=folder)
    assert history[0, -1, 0] < history[0, 0, 0]


# A learning rate at which a rounding error stays one: at ten times this it is 5e-2 after 20 steps.
VIT = ["--arch", "vit_tiny", "--optimizer", "adamw", "--lr", 0.002, "--moco-t", 0.2, "--stop-grad-conv1"]


@pytest.mark.parametrize(
    ("world", "arguments"),
    [(1, []), (2, ["--moco-m-cos"]), (1, VIT)],
    ids=["ResNet on one", "ResNet on two", "ViT on one"],
)
def test_pretraining_v3(tmp_path, world, arguments):
    (want, _), (got, ours) = both("pretrain_v3.py", *arguments, folder=tmp_path, world=world)
    assert want.shape == (world, 20, 1)
    equal(got, want)
    if world == 2:
        linear_classifier_learns("base_encoder", ours, tmp_path)


def rank_largest(rank, builder, out):
    options = ["--epochs", "1", "--moco-dim", "8", "--moco-k", "4096"]
    with Largest() as largest:
        rank_script(rank, "pretrain.py", builder, options, out)
    return largest.elements


def test_no_logits_in_memory_of_a_script(tmp_path):
    logits = 16 * (1 + 4096)
    for builder in ("oracle", OURS):
        (tmp_path / builder).mkdir()
        (found,) = ranks.run(1, rank_largest, builder, str(tmp_path / builder), folder=tmp_path)
        assert found < logits if builder == OURS else found == logits
