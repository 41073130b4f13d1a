"""Vision transformers and backbones by name: shapes, names, values of the start, and what is refused."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

import moco_fast
from moco_fast.models import vits
from moco_fast.models.backbones import ANY_CHANNELS, VITS, backbone

timm = pytest.importorskip("timm")


def on_meta(build, **options):
    with torch.device("meta"):
        return build(**options)


def test_positions_are_the_formula():
    grid, features = 3, 12
    positions = vits.sin_cos_positions(grid, features)
    assert positions.shape == (1, 10, 12) and positions.dtype == torch.float32
    assert (positions[0, 0] == 0).all()  # the class token is nowhere
    for row in range(grid):
        for column in range(grid):
            waves = [1 / 10000 ** (i / 3) for i in range(3)]
            want = [f(place * w) for place in (row, column) for f in (math.sin, math.cos) for w in waves]
            got = positions[0, 1 + row * grid + column]
            torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=1e-6)


def test_positions_tell_all_patches_apart():
    patches = vits.sin_cos_positions(14, 768)[0, 1:]
    distances = torch.cdist(patches, patches) + 1e9 * torch.eye(196)
    assert distances.min() > 1


@pytest.mark.parametrize(
    ("name", "features", "blocks"),
    [("vit_small", 384, 12), ("vit_base", 768, 12), ("vit_conv_small", 384, 11), ("vit_conv_base", 768, 11)],
)
def test_sizes_and_names(name, features, blocks):
    model = on_meta(vits.__dict__[name], num_classes=10)
    assert len(model.blocks) == blocks and model.blocks[0].attn.num_heads == 12
    assert model.pos_embed.shape == (1, 197, features) and not model.pos_embed.requires_grad
    assert model.cls_token.shape == (1, 1, features) and model.head.weight.shape == (10, features)
    names = list(model.state_dict())
    assert names[:2] == ["cls_token", "pos_embed"] and names[-4:] == [
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    ]  # fmt: skip
    block = [n.removeprefix("blocks.3.") for n in names if n.startswith("blocks.3.")]
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    assert block == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    stem = {n: tuple(p.shape) for n, p in model.patch_embed.named_parameters()}
    if "conv" in name:
        widths = [3, features // 8, features // 4, features // 2, features]
        shapes = [stem[f"proj.{3 * i}.weight"] for i in range(4)]
        assert shapes == [(b, a, 3, 3) for a, b in pairwise(widths)]
        assert stem["proj.12.weight"] == (features, features, 1, 1)
    else:
        assert stem == {"proj.weight": (features, 3, 16, 16), "proj.bias": (features,)}


def test_initial_values():
    """Uniform in +- sqrt(6 / (rows + columns)), where q, k and v are a matrix each."""
    model = vits.small_vit(num_classes=50, in_chans=3, img_size=32)
    bounds = [(part, 96 + 96) for part in model.blocks[1].attn.qkv.weight.chunk(3)]
    bounds += [(model.blocks[0].mlp.fc1.weight, 96 + 384), (model.head.weight, 96 + 50)]
    bounds += [(model.patch_embed.proj.weight, 3 * 8 * 8 + 96)]
    for weight, fans in bounds:
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.03
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert (value == 0).all(), name
    assert 0 < model.cls_token.abs().max() < 1e-5
    torch.manual_seed(0)
    again = vits.small_vit(num_classes=50, in_chans=3, img_size=32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("size", "patch", "tokens"), [(28, None, 17), (28, 4, 50), (32, None, 17)])
def test_small_vit_takes_its_images(size, patch, tokens):
    options = {} if patch is None else {"patch_size": patch}
    model = vits.small_vit(7, img_size=size, **options)
    assert model.pos_embed.shape == (1, tokens, 96)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)


def test_stem_halves_the_image_until_a_patch_is_a_pixel():
    model = vits.vit(32, 1, 2, False, 5, conv_stem=True, img_size=32, patch_size=8, in_chans=1)
    model(torch.randn(2, 1, 32, 32)).sum().backward()
    assert model.pos_embed.shape == (1, 17, 32)
    assert model.patch_embed.proj[0].weight.shape == (8, 1, 3, 3)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("frozen", [False, True])
def test_stop_grad_conv1(frozen):
    model = vits.small_vit(5, stop_grad_conv1=frozen)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(p.requires_grad != frozen for p in model.patch_embed.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model(torch.randn(4, 1, 28, 28)).pow(2).sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        still = name == "pos_embed" or (frozen and name.startswith("patch_embed"))
        assert torch.equal(value, before[name]) == still, name


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (vits.vit_conv_small, {"stop_grad_conv1": True}, ValueError, "stop_grad_conv1 freezes a patch proj"),
        (vits.vit_conv_base, {"patch_size": 14}, ValueError, "patch_size must be a power of 2.*got 14"),
        (
            vits.vit_small,
            {"img_size": 100},
            ValueError,
            "img_size must be a multiple of .*=16, got 100",
        ),
        (vits.vit_small, {"img_size": 0}, ValueError, "img_size must be at least 1, got 0"),
        (vits.vit_small, {"patch_size": 16.0}, TypeError, "patch_size must be an integer, got float 16.0"),
        (vits.small_vit, {"img_size": "28"}, TypeError, "img_size must be an integer, got str '28'"),
        (vits.small_vit, {"img_size": 30}, ValueError, "img_size must be a multiple of .*=7, got 30"),
        (
            vits.vit_small,
            {"reg_tokens": 2},
            ValueError,
            r"\(1, 197, 384\).*reg_tokens would make it \(1, 199",
        ),
        (vits.vit_small, {"pos_embed": "none"}, ValueError, "pos_embed would make it None"),
    ],
)
def test_what_does_not_fit(build, options, error, message):
    with pytest.raises(error, match=message):
        on_meta(build, **options)


def test_odd_features_have_no_positions():
    with pytest.raises(ValueError, match=r"embed_dim must be a multiple of 4, .* got 6"):
        vits.sin_cos_positions(2, 6)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(ImportError, match=r"timm.*is needed here.*pip install .*\[train\]"):
        vits.small_vit()


@pytest.mark.parametrize("arch", ANY_CHANNELS)
def test_backbones_by_name(arch):
    build = backbone(arch, width=4, in_channels=1, image_size=32)
    model = on_meta(build, num_classes=9)
    assert model(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 9)
    if arch in VITS:
        usual = on_meta(backbone(arch, width=4))
        assert usual.patch_embed.img_size == ((28, 28) if arch == "small_vit" else (224, 224))


def test_cifar_resnet_reduces_where_stages_do():
    model = backbone("cifar_resnet18", width=4)(num_classes=9)
    assert list(model.state_dict()) == list(on_meta(backbone("resnet18", width=4)).state_dict())
    shapes = {}
    for name in ("conv1", "layer1", "layer4"):
        hook = lambda module, inputs, output, name=name: shapes.update({name: tuple(output.shape)})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    model(torch.randn(2, 3, 32, 32))
    assert shapes == {"conv1": (2, 64, 32, 32), "layer1": (2, 64, 32, 32), "layer4": (2, 512, 4, 4)}
    deviation = math.sqrt(2 / (9 * 64))  # as torchvision draws its convolutions
    assert abs(model.conv1.weight.std() / deviation - 1) < 0.1


@pytest.mark.parametrize(
    ("arch", "channels", "message"),
    [
        ("small_vits", 1, "'small_vits' is unknown; close are: small_vit"),
        ("vit_smal", 3, "'vit_smal' is unknown; close are: .*vit_small"),
        ("cifar_resnet", 3, "'cifar_resnet' is unknown; close are: cifar_resnet18"),
        ("resnet18", 1, "'resnet18' takes images of 3 channels, got 1"),
    ],
)
def test_unknown_backbones(arch, channels, message):
    with pytest.raises(ValueError, match=message):
        backbone(arch, width=8, in_channels=channels)


@pytest.mark.parametrize("mlp", [False, True])
def test_a_transformer_under_moco_v1_and_v2(mlp):
    model = moco_fast.MoCo(backbone("small_vit", width=8, in_channels=1), 16, 32, mlp=mlp)
    images = torch.randn(4, 1, 28, 28)
    model.loss(images, images).backward()
    assert model.head == "head" and model.features(images).shape == (4, 96)
    assert isinstance(model.encoder_q.head, nn.Sequential if mlp else nn.Linear)
