"""Files that cannot be converted: what is wrong is said in one line, and nothing is written or executed."""

import argparse
import os
import resource
import signal

import pytest
import torch
from layouts import equal, lightly, official, parts, prefixed, solo
from torchvision import models

from moco_fast.cli import main
from moco_fast.convert.run import convert
from moco_fast.models.moco import MoCo
from moco_fast.train import checkpoint
from moco_fast.train.pretrained import load_pretrained


def refused(tmp_path, content, to="official", **options):
    """The message with which a checkpoint is refused; nothing is left behind."""
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save(content, source)
    with pytest.raises(ValueError) as error:
        convert(source, out, to, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]
    message = str(error.value)
    assert "\n" not in message
    return message


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, exec], ids=["os", "builtins"])
def test_malicious_pickle_is_not_executed(tmp_path, monkeypatch, function, capsys):
    monkeypatch.chdir(tmp_path)
    argument = "was-here" if function is os.mkdir else "import os; os.mkdir('was-here')"
    torch.save(official("vit") | {"hyper_parameters": Evil(function, argument)}, "in.pth")
    for arguments in (["convert", "in.pth", "out.pth", "--to", "official"], ["knn", "in.pth"]):
        assert main(arguments) == 1
        err = capsys.readouterr().err
        assert "in.pth cannot be loaded with weights_only=True, which runs no code from the file" in err
        assert function.__name__ in err and "Traceback" not in err
        if function is os.mkdir:
            assert "No checkpoint needs that: do not load it" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_what_old_checkpoints_need(tmp_path):
    """Arguments of a training script: named, with --trust, after which the file needs none."""
    content = official("vit") | {"hyper_parameters": argparse.Namespace(lr=0.1)}
    message = refused(tmp_path, content)
    assert "it needs argparse.Namespace. If you trust whoever made it, moco-fast convert" in message
    assert "--trust loads it all the same, runs what it asks for" in message
    convert(tmp_path / "in.pth", tmp_path / "out.pth", "official", trust=True)
    assert equal(torch.load(tmp_path / "out.pth", weights_only=True), official("vit"))


def test_a_whole_model(tmp_path):
    """Pickled as it is, which runs code when it is loaded; converted under its names with --trust."""
    model = MoCo(models.resnet18, 16, 32)
    torch.save(model, tmp_path / "in.pth")
    with pytest.raises(checkpoint.CheckpointError, match="--trust loads it all the same"):
        convert(tmp_path / "in.pth", tmp_path / "out.pth", "official")
    convert(tmp_path / "in.pth", tmp_path / "out.pth", "official", trust=True)
    held = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    assert equal(held, {f"module.{name}": value for name, value in model.state_dict().items()})


def test_a_class_that_is_not_here(tmp_path, monkeypatch):
    class Gone:
        pass

    Gone.__module__, Gone.__qualname__ = "argparse", "Gone"
    monkeypatch.setattr(argparse, "Gone", Gone, raising=False)
    torch.save({"state_dict": {}, "x": Gone()}, tmp_path / "in.pth")
    monkeypatch.delattr(argparse, "Gone")
    with pytest.raises(checkpoint.CheckpointError, match=r"needs what is not installed here: .*Gone"):
        convert(tmp_path / "in.pth", tmp_path / "out.pth", "official", trust=True)


def test_truncated(tmp_path):
    for suffix, to in (("pth", "official"), ("safetensors", "safetensors")):
        torch.save(official("vit"), tmp_path / "a.pth")
        convert(tmp_path / "a.pth", tmp_path / f"b.{suffix}", to)
        data = (tmp_path / f"b.{suffix}").read_bytes()
        for length in (0, 7, 100, len(data) // 2, len(data) - 1):
            (tmp_path / "cut").write_bytes(data[:length])
            with pytest.raises(checkpoint.CheckpointError, match=r"cut is truncated|weights_only"):
                convert(tmp_path / "cut", tmp_path / "c", "official")
    assert not (tmp_path / "c").exists()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent"):
        convert(tmp_path / "absent", tmp_path / "c", "official")


def test_names_that_are_left_over_or_missing(tmp_path):
    start = official("vit")
    state = start["state_dict"]
    renamed = {name.replace("base_encoder", "net"): value for name, value in state.items()}
    message = refused(tmp_path, start | {"state_dict": renamed})
    assert "no layout that is known here: expected encoder_q.* (official v1 and v2)" in message
    assert "got 150 tensors, net.cls_token, " in message and message.endswith("and 145 more")

    renamed = {name.replace("blocks", "layers"): value for name, value in state.items()}
    message = refused(tmp_path, start | {"state_dict": renamed})
    assert "does not hold the weights of arch 'small_vit': missing blocks.0.norm1.weight" in message
    assert message.endswith("; and 91 more")

    more = {f"module.more.{i}": torch.zeros(1) for i in range(7)}
    message = refused(tmp_path, start | {"state_dict": state | more})
    want = "which knows no more.0, more.1, more.2, more.3, more.4, and 2 more: 7 left over"
    assert message.endswith(want)

    fewer = {name: value for name, value in state.items() if ".predictor." not in f".{name}"}
    message = refused(tmp_path, start | {"state_dict": fewer})
    assert "does not fill an official moco-v3: missing predictor.0.weight" in message
    fewer = {name: value for name, value in state.items() if not name.startswith("module.momentum")}
    assert "missing momentum_encoder.cls_token" in refused(tmp_path, start | {"state_dict": fewer})
    twice = state | {name.removeprefix("module."): value for name, value in state.items()}
    assert "holds tensors twice, wrapped and not" in refused(tmp_path, start | {"state_dict": twice})
    assert "must hold tensors by name" in refused(tmp_path, start | {"state_dict": [1, 2]})
    assert "lacks state_dict, and is none itself: it has epoch, arch" in refused(
        tmp_path, {"epoch": 1, "arch": "x"}
    )


def test_another_arch(tmp_path):
    message = refused(tmp_path, official("resnet18"), arch="resnet50")
    assert "not hold the weights of arch 'resnet50' (they are of resnet18): missing layer1.0.conv3" in message
    assert "arch 'resnet19' is unknown" in refused(tmp_path, official("vit"), arch="resnet19")
    found = parts("vit")
    made = {"state_dict": prefixed(backbone=found["q"], projector=found["q_head"])}
    assert "does not name its arch, and its weights are of no ResNet: give --arch" in refused(tmp_path, made)


def test_classifiers(tmp_path):
    """Of the official linear evaluation, of solo-learn's, and of supervised training."""
    for prefix, head in (("module.", "module."), ("", ""), ("backbone.", "")):
        state = models.resnet18(num_classes=10).state_dict()
        named = {(head if n.startswith("fc.") else prefix) + n: v for n, v in state.items()}
        message = refused(tmp_path, {"epoch": 1, "arch": "resnet18", "state_dict": named}, "torchvision")
        assert "holds a classifier (names such as conv1.weight" in message
        assert "give the pretrained checkpoint, with names encoder_q.* (official v1 and v2)" in message


def test_other_commands_say_how_to_convert(tmp_path):
    for made in (lightly("v2"), solo("v2")):
        torch.save(made, tmp_path / "in.pth")
        with pytest.raises(
            checkpoint.CheckpointError, match=r"names of lightly or solo-learn .*: moco-fast con"
        ):
            load_pretrained(tmp_path / "in.pth")


def test_targets_that_cannot_hold_it(tmp_path):
    vit = official("vit")
    assert "torchvision has no arch 'small_vit'" in refused(tmp_path, vit, "torchvision")
    assert "timm has no arch with the weights of 'small_vit'; expected ResNets, vit_small" in refused(
        tmp_path, vit, "timm"
    )
    assert "detectron2's backbones are torchvision's ResNets" in refused(tmp_path, vit, "detectron2")
    assert "encoder must be left out with official" in refused(tmp_path, vit, encoder="q")
    assert "to must be one of 'official', " in refused(tmp_path, vit, "caffe")
    assert "queue_size must be at least 1, got 0" in refused(tmp_path, official("v1"), queue_size=0)
    alone = {"arch": "small_vit", "state_dict": parts("vit")["q"]}
    assert "an encoder alone lacks parts of MoCo" in refused(tmp_path, alone)
    assert "has no momentum encoder" in refused(tmp_path, alone, "lightly")
    message = refused(tmp_path, alone, "safetensors", encoder="k")
    assert "a checkpoint of an encoder alone has no encoder k: give --encoder q" in message


def test_projectors_that_are_not_official(tmp_path):
    """lightly's and solo-learn's can be wider: the official model's cannot, the backbone can be had."""
    for made, name in ((lightly("resnet18"), "projection_head.layers.0"), (solo("resnet18"), "projector.0")):
        state = made["state_dict"]
        state[f"{name}.weight"] = torch.zeros(1024, 512)
        message = refused(tmp_path, made, queue_size=32)
        assert (
            "does not fill an official moco: encoder_q.fc.0.weight is (1024, 512), expected (512, 512)"
            in message
        )
        report = convert(tmp_path / "in.pth", tmp_path / "out.pth", "safetensors", encoder="q")
        assert report.layout in ("lightly", "solo-learn")
        (tmp_path / "out.pth").unlink()


def test_names_that_are_no_strings(tmp_path):
    for content in ({0: torch.zeros(2)}, {"state_dict": {0: torch.zeros(2)}}):
        assert "must hold tensors by name" in refused(tmp_path, content)


@pytest.mark.parametrize(
    "name", ["base_encoder.norm.weight", "momentum_encoder.head.0.weight", "predictor.0.weight"]
)
def test_weights_of_integers(tmp_path, name):
    """Of the backbone, of a head, of the predictor; whatever the target."""
    start = official("vit")
    name = f"module.{name}"
    start["state_dict"] = start["state_dict"] | {name: start["state_dict"][name].int()}
    for to in ("official", "lightly"):
        message = refused(tmp_path, start, to)
        end = name.partition("encoder.")[2].removeprefix("head.") or "0.weight"
        assert message.endswith(f"{end} is torch.int32, expected a floating-point dtype")


def test_a_linear_head_for_lightly(tmp_path):
    """Its MoCoProjectionHead has two layers, whatever it is asked for."""
    for made in (official("v1"), lightly("v1")):
        message = refused(tmp_path, made, "lightly", arch="small_resnet")
        assert message.startswith("lightly's MoCo has a head of two layers, and this one, of MoCo v1, is")


def test_weights_that_are_not_finite(tmp_path):
    """Kept bit by bit where files are compared, refused where features are: the message names OUT."""
    start = official("resnet18")
    weights = {
        n: torch.full_like(v, torch.nan) if n.endswith("encoder_q.conv1.weight") else v
        for n, v in start["state_dict"].items()
    }
    message = refused(tmp_path, start | {"state_dict": weights}, "torchvision")
    assert message.startswith("the weights or statistics of encoder q are not finite: ")
    assert message.endswith(f"{tmp_path / 'out.pth'} cannot be verified")
    report = convert(tmp_path / "in.pth", tmp_path / "out.pth", "official")
    assert report.verified == "read back, equal bit by bit"


def test_a_queue_for_a_target_without_one(tmp_path):
    for options in ({"to": "torchvision"}, {"to": "safetensors", "encoder": "q"}):
        message = refused(tmp_path, lightly("resnet18"), queue_size=64, **options)
        want = (
            f"queue_size must be left out with {options['to']} of one encoder, which holds no queue, got 64"
        )
        assert message == want


@pytest.mark.parametrize("to", ["official", "safetensors", "lightly"])
def test_full_disk(tmp_path, to):
    torch.save(official("vit"), tmp_path / "in.pth")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
        with pytest.raises(OSError, match=r"out.pth could not be written: "):
            convert(tmp_path / "in.pth", tmp_path / "out.pth", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_an_existing_file_is_kept(tmp_path):
    torch.save(official("vit"), tmp_path / "a.pth")
    (tmp_path / "b.pth").write_text("mine")
    with pytest.raises(FileExistsError, match=r"b.pth exists: choose another name, or --force"):
        convert(tmp_path / "a.pth", tmp_path / "b.pth", "official")
    with pytest.raises(FileExistsError, match=r"out must be a file, .* is a folder"):
        convert(tmp_path / "a.pth", tmp_path, "official", force=True)
    (tmp_path / "bad.pth").write_text("no checkpoint")
    with pytest.raises(checkpoint.CheckpointError):
        convert(tmp_path / "bad.pth", tmp_path / "b.pth", "official", force=True)
    assert (tmp_path / "b.pth").read_text() == "mine"
    convert(tmp_path / "a.pth", tmp_path / "b.pth", "official", force=True)
    assert load_pretrained(tmp_path / "b.pth").arch == "small_vit"


def test_links(tmp_path):
    """A link is something that exists, wherever it points; replacing it replaces what it points to."""
    torch.save(official("vit"), tmp_path / "a.pth")
    link, target = tmp_path / "link.pth", tmp_path / "elsewhere" / "target.pth"
    link.symlink_to(target)
    with pytest.raises(FileExistsError, match=r"link.pth exists: choose another name, or --force"):
        convert(tmp_path / "a.pth", link, "official")
    for _ in ("dangling", "of a file"):
        convert(tmp_path / "a.pth", link, "official", force=True)
        assert link.is_symlink() and load_pretrained(target).arch == "small_vit"
        target.write_text("old")


def test_out_below_a_file(tmp_path):
    torch.save(official("vit"), tmp_path / "a.pth")
    for out in ("a.pth/b.pth", "a.pth/b/c.pth"):
        with pytest.raises(NotADirectoryError) as error:
            convert(tmp_path / "a.pth", tmp_path / out, "official")
        assert str(error.value) == f"{tmp_path / out} cannot be written: {tmp_path / 'a.pth'} is not a folder"
