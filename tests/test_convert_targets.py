"""What conversions write, loaded in the library it is for: names, strictness, features."""

import pickle

import numpy as np
import pytest
import torch
from layouts import DIM, K, model, official, parts, prefixed
from torch import nn
from torchvision import models

from moco_fast.cli import main
from moco_fast.convert import verify
from moco_fast.convert.names import detectron2_name, indexed, named, recognised
from moco_fast.convert.run import convert
from moco_fast.models import vits
from moco_fast.models.moco_v3 import MoCo_ViT
from moco_fast.train.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "v2.pth.tar"
    torch.save(official("resnet18"), path)
    return path


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_backbones_load_as_the_documentation_says(tmp_path, v2, to):
    """Strictly, and with the features of the model they come from."""
    convert(v2, tmp_path / "b.pth", to)
    if to == "timm":
        network = pytest.importorskip(
            "timm", reason="timm is not installed: nothing to load the export in"
        ).create_model("resnet18", num_classes=0)
    else:
        network = models.resnet18()
        network.fc = nn.Identity()
    network.load_state_dict(load(tmp_path / "b.pth"))
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(
        network.eval()(images), model("resnet18").eval().features(images), rtol=1e-5, atol=1e-5
    )
    if to == "torchvision":
        kept = models.resnet18().load_state_dict(load(tmp_path / "b.pth"), strict=False)
        assert kept.missing_keys == ["fc.weight", "fc.bias"] and kept.unexpected_keys == []


def test_vision_transformers_in_timm(tmp_path):
    """With the 12 heads of MoCo's ViT-S, which timm's has not."""
    timm = pytest.importorskip("timm", reason="timm is not installed: nothing to load the export in")
    network = MoCo_ViT(vits.vit_small, DIM, 24)
    state = {"module." + name: value for name, value in network.state_dict().items()}
    torch.save({"epoch": 1, "arch": "vit_small", "state_dict": state, "optimizer": {}}, tmp_path / "v.pth")
    report = convert(tmp_path / "v.pth", tmp_path / "t.pth", "timm")
    assert report.verified.startswith("loaded in timm, features of 4 images differ by ")
    other = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12)
    other.load_state_dict(load(tmp_path / "t.pth"))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        got, want = other.eval()(images), network.eval().features(images)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("finite", [True, False])
def test_features_that_differ_are_an_error_and_leave_no_file(tmp_path, v2, monkeypatch, finite):
    def another(path, contents):
        network = models.resnet18()
        network.fc = nn.Identity()
        if not finite:
            network.conv1.weight.data.fill_(torch.nan)
        return network

    monkeypatch.setitem(verify.LOADERS, "torchvision", another)
    by = r"\d\S*" if finite else "nan"
    with pytest.raises(CheckpointError, match=rf"features of the written file differ by {by} \(loaded in"):
        convert(v2, tmp_path / "b.pth", "torchvision")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_not_installed(tmp_path, v2, monkeypatch):
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    assert convert(v2, tmp_path / "b.pth", "timm").verified == "not verified: timm is not installed"


def names_of_detectron2(blocks, convolutions):
    """Of its ResNet: a stem and stages res2 to res5, a norm inside every convolution."""
    layers = ["stem.conv1"]
    for stage, count in enumerate(blocks, 2):
        for block in range(count):
            here = [f"conv{i + 1}" for i in range(convolutions)]
            if block == 0 and not (stage == 2 and convolutions == 2):  # where the shape changes
                here.append("shortcut")
            layers += [f"res{stage}.{block}.{layer}" for layer in here]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{n}.weight" for n in layers} | {f"{n}.norm.{value}" for n in layers for value in norm}


def test_detectron2(tmp_path, v2):
    report = convert(v2, tmp_path / "r18.pkl", "detectron2")
    assert report.verified.startswith(
        "names taken back, not loaded in detectron2, features of 4 images differ"
    )
    held = pickle.loads((tmp_path / "r18.pkl").read_bytes())
    assert list(held) == ["model", "__author__", "matching_heuristics"]
    assert held["__author__"] == "MOCO" and held["matching_heuristics"] is True
    assert held["model"].keys() == names_of_detectron2((2, 2, 2, 2), 2)
    want = parts("resnet18")["q"]
    for name, array in held["model"].items():
        assert isinstance(array, np.ndarray), name
    for name, value in want.items():
        assert np.array_equal(held["model"][detectron2_name(name)], value.numpy())


def test_parameters_in_the_file(tmp_path, v2):
    """As state_dict(keep_vars=True) gives them, which want a gradient."""
    made = load(v2)
    made["state_dict"] = {
        name: nn.Parameter(value) if value.is_floating_point() else value
        for name, value in made["state_dict"].items()
    }
    torch.save(made, tmp_path / "kept.pth")
    convert(tmp_path / "kept.pth", tmp_path / "kept.pkl", "detectron2")
    convert(v2, tmp_path / "plain.pkl", "detectron2")
    assert (tmp_path / "kept.pkl").read_bytes() == (tmp_path / "plain.pkl").read_bytes()


@pytest.mark.parametrize(("arch", "blocks"), [("resnet50", (3, 4, 6, 3)), ("resnet101", (3, 4, 23, 3))])
def test_names_of_deep_resnets(arch, blocks):
    with torch.device("meta"):
        weights = {n: v for n, v in models.get_model(arch).state_dict().items() if not n.startswith("fc.")}
    assert {detectron2_name(name) for name in weights} == names_of_detectron2(blocks, 3)
    assert named(indexed(weights)).keys() == weights.keys()
    children = nn.Sequential(*list(models.get_model(arch).children())[:-1]).state_dict()
    assert list(indexed(weights)) == list(children)
    assert recognised(weights) == arch


def test_lightly_loads_its_target(tmp_path, v2):
    """Into the module of its MoCo example, strictly; the bank beside it."""
    modules = pytest.importorskip(
        "lightly.models.modules", reason="lightly is not installed: nothing to compare with"
    )
    from lightly.loss import NTXentLoss

    convert(v2, tmp_path / "l.ckpt", "lightly")
    module = nn.Module()
    for ending in ("", "_momentum"):
        layers = nn.Sequential(*list(models.resnet18().children())[:-1])
        module.add_module("backbone" + ending, layers)
        module.add_module("projection_head" + ending, modules.MoCoProjectionHead(512, 512, DIM))
    module.criterion = NTXentLoss(memory_bank_size=(K, DIM))
    got = load(tmp_path / "l.ckpt")
    module.load_state_dict(got["state_dict"])
    bank = module.criterion.memory_bank
    assert bank.bank.shape == got["memory_bank"]["bank"].shape
    assert bank.bank_ptr.shape == got["memory_bank"]["bank_ptr"].shape
    bank.bank, bank.bank_ptr = got["memory_bank"].values()
    assert torch.equal(bank.bank.t(), parts("resnet18")["queue"])
    network, images = model("resnet18").eval(), torch.randn(2, 3, 64, 64)
    features = module.eval().backbone(images).flatten(1)
    assert torch.equal(features, network.features(images))
    assert torch.equal(module.projection_head(features), network.encoder_q(images))


@pytest.mark.parametrize("kind", ["resnet18", "v3", "vit"])
def test_heads_that_lightly_cannot_load(tmp_path, kind, monkeypatch):
    """An error, and no file."""
    pytest.importorskip("lightly.models.modules", reason="lightly is not installed: nothing to load it in")
    torch.save(official(kind), tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "b.ckpt", "lightly").verified.endswith("loaded in lightly")
    linear_layers = verify.linear_layers
    monkeypatch.setattr(verify, "linear_layers", lambda head: [w[:-1] for w in linear_layers(head)])
    with pytest.raises(CheckpointError, match="lightly cannot load the projection_head of the written file"):
        convert(tmp_path / "a.pth", tmp_path / "c.ckpt", "lightly")
    assert not (tmp_path / "c.ckpt").exists()


def test_a_bare_backbone_names_no_arch(tmp_path):
    for arch in (None, "resnet18"):
        torch.save(prefixed(module=parts("resnet18")["q"]), tmp_path / "a.pth")
        report = convert(
            tmp_path / "a.pth", tmp_path / "b", "safetensors", encoder="q", arch=arch, force=True
        )
        assert (report.arch, report.layout) == ("resnet18", "a backbone alone")


def test_bfloat16_for_detectron2(tmp_path):
    """numpy has none: float32 of the same values."""
    start = official("resnet18")
    names = start["state_dict"]
    start["state_dict"] = {n: v.bfloat16() if v.is_floating_point() else v for n, v in names.items()}
    torch.save(start, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.pkl", "detectron2")
    array = pickle.loads((tmp_path / "b.pkl").read_bytes())["model"]["stem.conv1.weight"]
    want = start["state_dict"]["module.encoder_q.conv1.weight"]
    assert array.dtype == np.float32 and torch.equal(torch.from_numpy(array), want.float())


def test_a_backbone_with_weights_beside_its_head(tmp_path):
    """A MobileNet's classifier.0 is part of the backbone, classifier.3 its head."""
    whole = models.mobilenet_v3_small()
    names = {n: v for n, v in whole.state_dict().items() if not n.startswith("classifier.3.")}
    torch.save(names, tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "b.pth", "torchvision", arch="mobilenet_v3_small")
    assert report.tensors == len(names) and "classifier.0.weight" in load(tmp_path / "b.pth")
    with pytest.raises(
        CheckpointError, match=r"holds a classifier .*; or --arch, for a backbone with weights"
    ):
        convert(tmp_path / "a.pth", tmp_path / "c.pth", "torchvision")
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match="holds a classifier"):
        convert(tmp_path / "whole.pth", tmp_path / "c.pth", "torchvision", arch="mobilenet_v3_small")


def test_command_says_what_resume_misses(tmp_path, capsys):
    torch.save(official("vit") | {"best_acc1": 1.0}, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--to", "official"]) == 0
    printed = capsys.readouterr().out
    assert "left out: best_acc1\nlacks scaler: to --resume from it, remove the lines that load" in printed


def test_command(tmp_path, v2, capsys):
    out = tmp_path / "deeper" / "k.safetensors"
    arguments = ["convert", str(v2), str(out), "--to", "safetensors", "--encoder", "k"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert (
        f"{out}: official MoCo v1 or v2 -> safetensors, resnet18, encoder k, 120 tensors, 44.7 MB" in printed
    )
    assert "left out: optimizer, projector, encoder q, queue\nread back, equal bit by bit" in printed
    assert main(arguments) == 1
    assert f"{out} exists: choose another name, or --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "moco-fast convert runs/NAME backbone.pth --to torchvision" in printed
    assert "only for files of people you trust" in printed
