"""What a checkpoint is written as: a function per target, from its contents to what the file holds.

Tests: tests/test_convert.py, tests/test_convert_targets.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_fast.convert.contents import MOCO, MOCO_V3, Contents, Encoder
from moco_fast.convert.names import ALL_RESNETS, RESNETS, detectron2_name, indexed
from moco_fast.extras import extra
from moco_fast.models.backbones import ANY_CHANNELS
from moco_fast.train.checkpoint import OFFICIAL_KEYS, PREFIX, CheckpointError

# timm's name of a backbone and what makes it the same; its ResNets are called as torchvision's.
TIMM_VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_small": ("vit_small_patch16_224", {"num_heads": 12}),
    "vit_base": ("vit_base_patch16_224", {}),
}
OWN_ARCH = "weights that fit no other library go into --to safetensors --encoder q"
WHOLE = ("official", "lightly")  # targets that hold both encoders; safetensors can
TARGETS = ("official", "torchvision", "timm", "detectron2", "lightly", "safetensors")


def official(contents: Contents) -> dict[str, Any]:
    """``{epoch, arch, state_dict, optimizer}`` as main_moco.py saves it, with DDP's prefix.

    What is not known is left out: an optimizer of another library has other parameters.
    """
    state = {PREFIX + name: own(value) for name, value in contents.official_state().items()}
    held = {"epoch": 0} | contents.training | {"arch": contents.arch, "state_dict": state}
    order = [*OFFICIAL_KEYS, *(key for key in held if key not in OFFICIAL_KEYS)]
    return {key: held[key] for key in order if key in held}


def lightly(contents: Contents) -> dict[str, Any]:
    """The state dict of the module in lightly's MoCo example; the bank, which none loads, beside it."""
    if not {"q", "k"} <= contents.encoders.keys():
        raise CheckpointError(f"{contents.method} has no momentum encoder, which lightly's MoCo has")
    if contents.method == MOCO and len(linear_layers(contents.encoders["q"].head)) < 2:
        raise CheckpointError(
            "lightly's MoCo has a head of two layers, and this one, of MoCo v1, is linear: it goes into --to "
            "official or safetensors, its backbone alone into --to torchvision, timm or detectron2"
        )
    state: dict[str, Tensor] = {}
    for role, ending in (("q", ""), ("k", "_momentum")):
        encoder = contents.encoders[role]
        backbone = indexed(encoder.backbone) if contents.arch in ALL_RESNETS else encoder.backbone
        parts = {f"backbone{ending}.": backbone, f"projection_head{ending}.layers.": encoder.head}
        if contents.method == MOCO_V3 and role == "q":
            parts["prediction_head.layers."] = contents.predictor
        state |= {prefix + name: own(value) for prefix, part in parts.items() for name, value in part.items()}
    held: dict[str, Any] = {"epoch": contents.training.get("epoch", 0), "arch": contents.arch}
    if contents.queue is not None:
        held["memory_bank"] = {"bank": own(contents.queue.t()), "bank_ptr": contents.queue_ptr}
    return held | {"state_dict": state}


def linear_layers(head: Mapping[str, Tensor]) -> list[Tensor]:
    """Weights of a head's linear layers, (out, in) each."""
    return [value for value in head.values() if value.ndim == 2]


def torchvision(contents: Contents, encoder: Encoder) -> dict[str, Tensor]:
    """The state dict of torchvision's model, its classifier an Identity."""
    if contents.arch in ANY_CHANNELS:
        raise CheckpointError(f"torchvision has no arch {contents.arch!r}: {OWN_ARCH}")
    return {name: own(value) for name, value in encoder.backbone.items()}


def timm(contents: Contents, encoder: Encoder) -> dict[str, Tensor]:
    """The state dict of timm's model with ``num_classes=0``, see :func:`timm_model`."""
    if contents.arch not in (*RESNETS, *TIMM_VITS):
        known = ", ".join(["ResNets", *TIMM_VITS])
        raise CheckpointError(
            f"timm has no arch with the weights of {contents.arch!r}; expected {known}; {OWN_ARCH}"
        )
    return {name: own(value) for name, value in encoder.backbone.items()}


def timm_model(contents: Contents) -> tuple[str, dict[str, Any]]:
    """Name and options with which ``timm.create_model`` makes the model of :func:`timm`."""
    if contents.arch not in TIMM_VITS:
        return contents.arch, {"num_classes": 0}
    name, options = TIMM_VITS[contents.arch]
    sizes = {"img_size": contents.facts["image_size"], "in_chans": contents.facts["channels"]}
    return name, {"num_classes": 0} | options | sizes


def detectron2(contents: Contents, encoder: Encoder) -> dict[str, Any]:
    """What detectron2 loads as a pretrained backbone, as MoCo's own converter writes it."""
    if contents.arch not in RESNETS:
        raise CheckpointError(f"detectron2's backbones are torchvision's ResNets, got arch {contents.arch!r}")
    model = {
        detectron2_name(name): (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for name, value in encoder.backbone.items()  # numpy has no bfloat16
    }
    return {"model": model, "__author__": "MOCO", "matching_heuristics": True}


BACKBONES = {"torchvision": torchvision, "timm": timm, "detectron2": detectron2}


def content(contents: Contents, to: str, role: str | None) -> dict[str, Any]:
    """What a file of the target holds.

    Args:
        contents: of a checkpoint.
        to: one of ``TARGETS``.
        role: the encoder, "q" or "k"; None: both, of the targets that can hold them.

    Raises:
        CheckpointError: the target cannot hold it.
    """
    if to == "official":
        return official(contents)
    if to == "lightly":
        return lightly(contents)
    if role is None:
        return {name: own(value) for name, value in contents.official_state().items()}
    encoder = contents.encoder(role)
    if to == "safetensors":
        return {name: own(value) for name, value in encoder.backbone.items()}
    return BACKBONES[to](contents, encoder)


def write(path: Path, held: dict[str, Any], contents: Contents, to: str, role: str | None) -> None:
    """Write what :func:`content` returned; whatever the format's library raises, such as for a full disk.

    Raises:
        ImportError: safetensors is missing.
    """
    if to == "safetensors":
        about = {"format": "pt", "arch": contents.arch, "method": contents.method, "encoder": role or "both"}
        if "epoch" in contents.training:
            about["epoch"] = str(contents.training["epoch"])
        extra("safetensors.torch").save_file(held, path, metadata=about)
    elif to == "detectron2":
        with open(path, "wb") as file:
            pickle.dump(held, file)
    else:
        torch.save(held, path)


def left_out(contents: Contents, to: str, role: str | None) -> list[str]:
    """What of the contents the target does not hold."""
    parts = list(contents.dropped)
    if to != "official":
        parts += [key for key in contents.training if key != "epoch" or to in BACKBONES]
    if role is not None:
        held = {"projector": contents.encoders[role].head, "predictor": contents.predictor}
        parts += [name for name, part in held.items() if part]
        parts += [f"encoder {other}" for other in contents.encoders if other != role]
        parts += ["queue"] if contents.queue is not None else []
    return parts


def lacking(contents: Contents, to: str) -> list[str]:
    """What ``main_moco.py --resume`` loads and an official file of these contents does not hold."""
    if to != "official":
        return []
    loaded = ("optimizer", "scaler") if contents.method == MOCO_V3 else ("optimizer",)
    return [key for key in loaded if key not in contents.training]


def tensors_in(held: Mapping[str, Any]) -> list[Tensor]:
    """All tensors (arrays, for detectron2) that a file holds as weights."""
    inside = held.get("state_dict") or held.get("model") or held
    bank = [value for value in held.get("memory_bank", {}).values() if value is not None]
    return [*(torch.as_tensor(value) for value in inside.values()), *bank]


def own(value: Tensor) -> Tensor:
    """The tensor in memory of its own: a file holds whole storages, and safetensors nothing strided."""
    return value.detach().clone(memory_format=torch.contiguous_format)
