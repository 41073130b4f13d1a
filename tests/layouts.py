"""Checkpoints as other libraries write them, made of one of ours: for the tests of moco_fast.convert."""

from functools import cache, partial

import torch
from torchvision import models

import moco_fast
from moco_fast.models.moco_v3 import MoCo_ResNet, MoCo_ViT
from moco_fast.models.resnet import small_resnet
from moco_fast.models.vits import small_vit

DIM, K = 16, 32
INDEX = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def stirred(model):
    """Weights and statistics that no initialisation has, different in both encoders."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                change = 0.05 * torch.rand(value.shape, generator=generator)
                value.add_(change if value.ndim < 2 else change * value)
            else:
                value.fill_(7)
    return model


def encoder(kind):
    """What makes the backbone of a kind, called with ``num_classes``."""
    if kind == "resnet18":
        return models.resnet18
    return (
        partial(small_vit, in_chans=3, img_size=32) if kind == "vit" else partial(small_resnet, in_channels=3)
    )


def model(kind):
    """A tiny model of "v1", "v2" or "v3"; of "vit", v3 of a transformer; of "resnet18", v2 of that."""
    torch.manual_seed(0)
    if kind == "vit":
        return stirred(MoCo_ViT(encoder(kind), DIM, 24))
    if kind == "v3":
        return stirred(MoCo_ResNet(encoder(kind), DIM, 24))
    return stirred(moco_fast.MoCo(encoder(kind), DIM, K, mlp=kind != "v1"))


def arch(kind):
    return {"vit": "small_vit", "resnet18": "resnet18"}.get(kind, "small_resnet")


@cache
def state(kind):
    return model(kind).state_dict()


def official(kind):
    return {
        "epoch": 3,
        "arch": arch(kind),
        "state_dict": {"module." + name: value for name, value in state(kind).items()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
    }


def parts(kind):
    """Of a model: backbone and head of either encoder, queue and pointer, predictor, by plain names."""
    v3 = kind in ("v3", "vit")
    prefixes = ("base_encoder.", "momentum_encoder.") if v3 else ("encoder_q.", "encoder_k.")
    head = "head." if kind == "vit" else "fc."

    def under(prefix, names):
        return {n.removeprefix(prefix): v for n, v in names.items() if n.startswith(prefix)}

    whole = state(kind)
    found = {"predictor": under("predictor.", whole), "queue": whole.get("queue")}
    found["queue_ptr"] = whole.get("queue_ptr")
    for role, prefix in zip("qk", prefixes, strict=True):
        encoder = under(prefix, whole)
        found[role] = {n: v for n, v in encoder.items() if not n.startswith(head)}
        layers = under(head, encoder)
        found[role + "_head"] = {f"0.{n}": v for n, v in layers.items()} if kind == "v1" else layers
    return found


def prefixed(**by_prefix):
    """One state dict of several: ``prefixed(backbone={...})`` has names such as backbone.conv1.weight."""
    return {f"{prefix}.{name}": v for prefix, part in by_prefix.items() for name, v in part.items()}


def children(weights, kind):
    """Under the index of torchvision's child, as lightly's example names a ResNet's weights."""
    if arch(kind) != "resnet18":
        return weights
    return {INDEX[n.partition(".")[0]] + "." + n.partition(".")[2]: v for n, v in weights.items()}


def lightly(kind, benchmark=False):
    """Of lightly's example, or of its ImageNet benchmark, where the trained encoder is query_backbone."""
    found = parts(kind)
    heads = {f"{role}_head": {f"layers.{n}": v for n, v in found[f"{role}_head"].items()} for role in "qk"}
    predictor = {f"layers.{name}": value for name, value in found["predictor"].items()}
    if benchmark:
        tensors = prefixed(
            backbone=found["k"], projection_head=heads["k_head"], query_backbone=found["q"],
            query_projection_head=heads["q_head"], online_classifier={"linear.weight": torch.zeros(3, 512)},
        )  # fmt: skip
    else:
        tensors = prefixed(
            backbone=children(found["q"], kind), projection_head=heads["q_head"],
            projection_head_momentum=heads["k_head"],
            backbone_momentum=children(found["k"], kind), prediction_head=predictor,
        )  # fmt: skip
    return {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.0", "state_dict": tensors}


def solo(kind):
    """Of solo-learn, whose MoCo has a queue for either view; ours is that of the second view's keys."""
    found = parts(kind)
    tensors = prefixed(
        backbone=found["q"], classifier={"weight": torch.zeros(3, 512), "bias": torch.zeros(3)},
        projector=found["q_head"], predictor=found["predictor"], momentum_backbone=found["k"],
        momentum_projector=found["k_head"],
    )  # fmt: skip
    if found["queue"] is not None:
        tensors |= {"queue": torch.stack([-found["queue"], found["queue"]]), "queue_ptr": found["queue_ptr"]}
    return {"epoch": 3, "state_dict": tensors, "hyper_parameters": {"lr": 0.1}}


def equal(a, b):
    """Whether two nested structures are alike, bit by bit, in the order of their names too."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
