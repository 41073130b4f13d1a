"""Conversions round-trip bit by bit, whoever wrote the file; tests/test_convert_targets.py loads them."""

from importlib.util import find_spec

import pytest
import torch
from layouts import DIM, K, arch, encoder, equal, lightly, model, official, parts, prefixed, solo
from safetensors.torch import load_file

import moco_fast
from moco_fast.convert.run import convert
from moco_fast.train import checkpoint
from moco_fast.train.build import build_model
from moco_fast.train.config import PretrainConfig
from moco_fast.train.methods import Facts
from moco_fast.train.pretrained import load_pretrained

KINDS = ("v1", "v2", "v3", "vit", "resnet18")


def saved(path, content):
    torch.save(content, path)
    return path


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("through", ["official", "lightly", "safetensors"])
def test_official_through_a_whole_target_and_back(tmp_path, kind, through):
    """Names, order, dtypes and bits; the optimizer too, where the target has a place for it."""
    if (kind, through) == ("v1", "lightly"):
        return  # lightly has no linear head: test_convert_errors.py
    start = official(kind)
    source = saved(tmp_path / "start.pth.tar", start)
    report = convert(source, tmp_path / "between", through)
    loaded = "; heads loaded in lightly" if through == "lightly" and find_spec("lightly") else ""
    assert report.verified == "read back, equal bit by bit" + loaded
    assert report.left_out == (() if through == "official" else ("optimizer",))
    convert(tmp_path / "between", tmp_path / "back.pth", "official")
    back = load(tmp_path / "back.pth")
    if through != "official":
        del start["optimizer"]
    assert equal(back, start) and next(iter(back["state_dict"])).startswith("module.")
    model(kind).load_state_dict({n.removeprefix("module."): v for n, v in back["state_dict"].items()})


@pytest.mark.parametrize(
    ("through", "role"), [("torchvision", "q"), ("timm", "k"), ("safetensors", "q"), ("safetensors", "k")]
)
def test_the_backbone_of_either_encoder(tmp_path, through, role):
    """The same tensors in every target."""
    source = saved(tmp_path / "start.pth.tar", official("resnet18"))
    report = convert(source, tmp_path / "between", through, encoder=role)
    other = "k" if role == "q" else "q"
    epoch = () if through == "safetensors" else ("epoch",)
    assert report.left_out == (*epoch, "optimizer", "projector", f"encoder {other}", "queue")
    assert report.encoder == role and report.tensors == len(parts("resnet18")["q"])
    convert(tmp_path / "between", tmp_path / "back", "safetensors", encoder="q")
    back = load_file(tmp_path / "back")
    assert equal({name: back[name] for name in parts("resnet18")[role]}, parts("resnet18")[role])


@pytest.mark.parametrize(
    ("library", "kind"),
    [
        *(("lightly", kind) for kind in ("v1", "v2", "v3", "resnet18")),
        *(("lightly's benchmark", kind) for kind in ("v1", "v2", "resnet18")),
        *(("solo-learn", kind) for kind in ("v1", "v2", "v3", "vit", "resnet18")),
    ],
)
def test_other_libraries_become_official(tmp_path, kind, library):
    want = official(kind)["state_dict"]
    made = {"lightly": lightly, "solo-learn": solo}.get(library, lambda kind: lightly(kind, benchmark=True))(
        kind
    )
    source = saved(tmp_path / "last.ckpt", made)
    named = None if kind == "resnet18" else arch(kind)  # which the weights tell
    lost = library != "solo-learn" and kind not in ("v3", "vit")  # lightly saves no queue
    if lost:
        with pytest.raises(checkpoint.CheckpointError, match=r"lost its queue.*--queue-size 65536"):
            convert(source, tmp_path / "o.pth", "official", arch=named)
    report = convert(source, tmp_path / "o.pth", "official", arch=named, queue_size=K if lost else None)
    got = load(tmp_path / "o.pth")
    assert (got["epoch"], got["arch"]) == (3, arch(kind)) and "optimizer" not in got
    if lost:
        queue = got["state_dict"]["module.queue"]
        assert torch.allclose(queue.norm(dim=0), torch.ones(K)) and got["state_dict"]["module.queue_ptr"] == 0
        own = ("module.queue", "module.queue_ptr")
        want = {name: got["state_dict"][name] if name in own else value for name, value in want.items()}
    assert equal(got["state_dict"], want)
    lightning = ("global_step", "pytorch-lightning_version")
    asides = {
        "lightly": lightning,
        "lightly's benchmark": ("online_classifier", *lightning),
        "solo-learn": (
            "classifier",
            *(("the queue of the first view's keys",) if kind not in ("v3", "vit") else ()),
            "hyper_parameters",
        ),
    }
    assert report.left_out == asides[library]
    assert report.lacks == (("optimizer", "scaler") if kind in ("v3", "vit") else ("optimizer",))


def test_an_old_bank_of_lightly(tmp_path):
    """Its early versions saved the bank, (dim, K) or (K, dim)."""
    want, found = official("v2")["state_dict"], parts("v2")
    for name, bank in (
        ("criterion", found["queue"]),
        ("criterion.memory_bank", found["queue"].t()),
        ("loss_fn.memory_bank", found["queue"].t()),
    ):
        made = lightly("v2")
        made["state_dict"] |= {f"{name}.bank": bank, f"{name}.bank_ptr": found["queue_ptr"]}
        convert(saved(tmp_path / "l.ckpt", made), tmp_path / "o.pth", "official", arch=arch("v2"), force=True)
        assert equal(load(tmp_path / "o.pth")["state_dict"], want)


def test_a_bank_that_may_be_either_way_round(tmp_path):
    """Early versions of lightly had (dim, K), later ones (K, dim): with K = dim nothing tells which."""
    made = lightly("v2")
    made["state_dict"]["criterion.bank"] = torch.eye(DIM)
    source = saved(tmp_path / "l.ckpt", made)
    bank = f"a bank of ({DIM}, {DIM}), which does not tell dim from K"
    with pytest.raises(checkpoint.CheckpointError) as error:
        convert(source, tmp_path / "o.pth", "official", arch=arch("v2"))
    assert f"lost its queue (unused: {bank}" in str(error.value)
    report = convert(source, tmp_path / "o.pth", "official", arch=arch("v2"), queue_size=K)
    assert bank in report.left_out
    square = official("v2")  # ours are (K, dim), always
    square["state_dict"] = square["state_dict"] | {"module.queue": torch.randn(DIM, DIM)}
    convert(saved(tmp_path / "a.pth", square), tmp_path / "l2.ckpt", "lightly")
    convert(tmp_path / "l2.ckpt", tmp_path / "b.pth", "official")
    assert equal(load(tmp_path / "b.pth")["state_dict"], square["state_dict"])


def test_everything_that_is_not_used_is_named(tmp_path):
    """Whatever stands beside the state dict."""
    start = official("vit") | {"scaler": {"scale": 2.0}}
    more = {"best_acc1": 1.0, "scheduler": {"last_epoch": 3}, "args_dict": {}, 0: "x"}
    report = convert(saved(tmp_path / "a.pth", start | more), tmp_path / "b.pth", "official")
    assert report.left_out == ("best_acc1", "scheduler", "args_dict", "0") and report.lacks == ()
    assert equal(load(tmp_path / "b.pth"), start)
    lightning = {name: [] for name in ("optimizer_states", "lr_schedulers", "hyper_parameters")}
    made = {"state_dict": lightly("vit")["state_dict"]} | lightning
    report = convert(saved(tmp_path / "l.pth", made), tmp_path / "c.pth", "official", arch="small_vit")
    assert report.left_out == tuple(lightning) and load(tmp_path / "c.pth")["epoch"] == 0


def test_the_optimizer_of_another_library_is_left_out(tmp_path):
    """It has other parameters than the official model's."""
    source = saved(tmp_path / "l.pth", lightly("vit") | {"optimizer": official("vit")["optimizer"]})
    report = convert(source, tmp_path / "o.pth", "official", arch="small_vit")
    assert "optimizer" in report.left_out and "optimizer" in report.lacks
    assert "optimizer" not in load(tmp_path / "o.pth")


@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod.", "module._orig_mod.", "inside"])
def test_names_of_wrappers(tmp_path, wrapped):
    start = official("vit")
    state = {name.removeprefix("module."): value for name, value in start["state_dict"].items()}
    if wrapped == "inside":
        start["state_dict"] = {n.replace("encoder.", "encoder._orig_mod."): v for n, v in state.items()}
    else:
        start["state_dict"] = {wrapped + n: v for n, v in state.items()}
    source = saved(tmp_path / "wrapped.pth", start)
    convert(source, tmp_path / "o.pth", "official")
    assert equal(load(tmp_path / "o.pth"), official("vit"))
    assert equal(dict(load_pretrained(source).backbone.state_dict()), parts("vit")["q"])


@pytest.mark.parametrize("method", ["moco-v1", "moco-v2", "moco-v3", "sup-moco", "simsiam", "dino"])
def test_this_library(tmp_path, method):
    """MoCo becomes official, and is read again as what it was; of other methods the encoder serves."""
    config = PretrainConfig(data="digits", width=8, batch_size=32).with_method(method)
    network = build_model(config, 1, Facts(100, 10))
    extras = {"config": config.to_dict(), "channels": 1, "mean": [0.3], "std": [0.4]}
    source = saved(
        tmp_path / "checkpoint.pth",
        {
            "epoch": 2,
            "arch": config.arch,
            "state_dict": checkpoint.model_state(network),
            "optimizer": {"param_groups": []},
            "moco_fast": extras,
        },
    )
    if method in ("simsiam", "dino"):
        with pytest.raises(checkpoint.CheckpointError, match=f"of {method} lacks parts of MoCo"):
            convert(source, tmp_path / "o.pth", "official")
    else:
        report = convert(tmp_path, tmp_path / "o.pth", "official")
        got = load(tmp_path / "o.pth")
        assert list(got) == ["epoch", "arch", "state_dict", "optimizer"]
        want = checkpoint.model_state(network)
        labels = want.pop("module.queue_labels", None)
        assert equal(dict(want), got["state_dict"]) and report.layout == "this library"
        assert report.left_out == (*(() if labels is None else ("queue_labels",)), "moco_fast")
        assert equal(
            load_pretrained(tmp_path / "o.pth").backbone.state_dict(),
            load_pretrained(source).backbone.state_dict(),
        )
    convert(source, tmp_path / "q.safetensors", "safetensors", encoder="q")
    want = load_pretrained(source).backbone.state_dict()
    got = load_file(tmp_path / "q.safetensors")
    assert equal(dict(sorted(want.items())), dict(sorted(got.items())))


def test_our_optimizer_goes_on_in_torch(tmp_path):
    """What the official script does with a checkpoint: load it into torch.optim.SGD over all parameters."""
    network = model("v2")
    optimizer = moco_fast.SGD(network.parameters(), 0.1, momentum=0.9)
    views = torch.randn(2, 4, 3, 28, 28)
    network(*views, return_loss=True).backward()
    optimizer.step()
    start = official("v2") | {
        "state_dict": checkpoint.model_state(network),
        "optimizer": optimizer.state_dict(),
    }
    convert(saved(tmp_path / "a.pth", start), tmp_path / "b.pth", "official")
    other = torch.optim.SGD(model("v2").parameters(), 0.1, momentum=0.9)
    other.load_state_dict(load(tmp_path / "b.pth")["optimizer"])
    assert equal(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_another_queue_size(tmp_path):
    """How to go on with another K: the model's error says so, and this is it."""

    source = saved(tmp_path / "a.pth", official("v2"))
    bigger = moco_fast.MoCo(encoder("v2"), DIM, 2 * K, mlp=True)
    state = {n.removeprefix("module."): v for n, v in load(source)["state_dict"].items()}
    with pytest.raises(RuntimeError, match=r"queue holds K=32 keys, this model's K=64: .*--queue-size 64"):
        bigger.load_state_dict(state)
    report = convert(source, tmp_path / "b.pth", "official", queue_size=2 * K)
    assert report.left_out == ("the queue of K=32 for a fresh one of K=64",)
    fresh = load(report.out)["state_dict"]
    torch.testing.assert_close(fresh["module.queue"].norm(dim=0), torch.ones(2 * K))
    assert fresh["module.queue_ptr"].tolist() == [0]
    bigger.load_state_dict({n.removeprefix("module."): v for n, v in fresh.items()})
    with pytest.raises(RuntimeError, match=r"of dim=16, this model of dim=8: build it.*torchvision"):
        moco_fast.MoCo(encoder("v2"), 8, K, mlp=True).load_state_dict(state)
    with pytest.raises(checkpoint.CheckpointError, match="queue_size must be left out: moco-v3 has no queue"):
        convert(saved(tmp_path / "c.pth", official("v3")), tmp_path / "d.pth", "official", queue_size=8)


def test_solo_learn_for_cifar(tmp_path):
    """Its first convolution is padded by 2: the weights are ours, the features not quite, which is said."""
    found = parts("resnet18")
    found["q"] = found["q"] | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    made = {"state_dict": prefixed(backbone=found["q"], projector=found["q_head"])}
    report = convert(saved(tmp_path / "s.ckpt", made), tmp_path / "q", "safetensors", encoder="q")
    assert report.arch == "cifar_resnet18" and "padding of 2" in report.left_out[0]
