"""That a file holds what it should: loaded where it is for, and shown real images.

Tests: tests/test_convert_targets.py.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_fast.convert.contents import Contents, Encoder
from moco_fast.convert.layouts import read_contents
from moco_fast.convert.names import detectron2_name
from moco_fast.convert.targets import linear_layers, timm_model
from moco_fast.data.datasets import load_dataset
from moco_fast.extras import extra
from moco_fast.models import heads
from moco_fast.train.checkpoint import CheckpointError
from moco_fast.train.pretrained import blank

TOLERANCE = 1e-5  # of features, relative to the largest
IMAGES = 4


def verify(path: Path, contents: Contents, to: str, role: str | None) -> str:
    """Load a written file back, and compare.

    Backbones are loaded strictly in the library that they are for, where it is installed, and have to give
    the features of ours on images of scikit-learn's digits; other files are read and compared bit by bit.

    Args:
        path: what ``targets.write`` wrote.
        contents: what it was written from.
        to: the target.
        role: the encoder, None for files of both.

    Returns:
        What was found, or why nothing could be.

    Raises:
        CheckpointError: it differs.
    """
    if to in LOADERS:
        library = to if importlib.util.find_spec(to) else None
        if library is None:
            return f"not verified: {to} is not installed"
        return _compared(path, LOADERS[to](path, contents), contents, role or "q", f"loaded in {to}")
    if to == "detectron2":
        with open(path, "rb") as file:
            model = pickle.load(file)["model"]  # written a moment ago
        names = contents.encoders["q"].backbone
        back = {name: torch.as_tensor(model[detectron2_name(name)]) for name in names}
        network = _ours(contents, Encoder(back, {}))
        return _compared(path, network, contents, role or "q", "names taken back, not loaded in detectron2")
    again = read_contents(path, arch=contents.arch)
    if role is not None:
        same = _equal(again.encoders["q"].backbone, contents.encoders[role].backbone)
    else:
        same = all(
            _equal(getattr(again, part.name), getattr(contents, part.name))
            for part in fields(contents)
            if part.name in ("method", "arch", "encoders", "queue", "queue_ptr", "predictor")
        )
    if not same:
        raise CheckpointError(f"{path} does not hold what was written")
    if to == "lightly" and importlib.util.find_spec(to):
        _load_lightly_heads(path)
        return "read back, equal bit by bit; heads loaded in lightly"
    return "read back, equal bit by bit"


def images(contents: Contents) -> Tensor:
    """A few digits as the backbone sees images, (N, channels, size, size)."""
    digits = load_dataset("digits").train.images.fetch(torch.arange(IMAGES)).images
    facts = contents.facts
    mean, std = (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std"))
    pixels = (digits.float() / 255).expand(-1, facts["channels"], -1, -1)
    return F.interpolate((pixels - mean) / std, size=facts["image_size"], mode="bilinear")


def _compared(path: Path, network: nn.Module, contents: Contents, role: str, how: str) -> str:
    shown = images(contents)
    with torch.no_grad():
        want = _ours(contents, contents.encoders[role])(shown)
        got = network.eval()(shown).flatten(1)
    if not want.isfinite().all():
        raise CheckpointError(
            f"the weights or statistics of encoder {role} are not finite: {path} cannot be verified"
        )
    difference = ((got - want).abs().max() / want.abs().max()).item()
    if not difference <= TOLERANCE:
        raise CheckpointError(f"features of the written file differ by {difference:.1e} ({how})")
    return f"{how}, features of {IMAGES} images differ by {difference:.1e}"


def _ours(contents: Contents, encoder: Encoder) -> nn.Module:
    network, _, _ = blank(contents.arch, contents.facts)
    network.load_state_dict(encoder.backbone)
    return network


def _in_torchvision(path: Path, contents: Contents) -> nn.Module:
    model = extra("torchvision.models").get_model(contents.arch)
    heads.replace(model, heads.head_path(model), nn.Identity())
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _in_timm(path: Path, contents: Contents) -> nn.Module:
    name, options = timm_model(contents)
    model = extra("timm").create_model(name, **options)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _load_lightly_heads(path: Path) -> None:
    """Load the heads of either encoder into lightly's, strictly; backbones are torchvision's."""
    modules = extra("lightly.models.modules.heads")
    held = torch.load(path, weights_only=True)["state_dict"]
    has_predictor = any(name.startswith("prediction_head.") for name in held)
    for name in ("projection_head", "projection_head_momentum", *["prediction_head"] * has_predictor):
        state = {n.removeprefix(name + "."): v for n, v in held.items() if n.startswith(name + ".")}
        linear = linear_layers(state)
        if has_predictor:  # of MoCo v3, whose last norms have no weights, unlike MoCoProjectionHead's
            blocks, places = [], [int(n.split(".")[1]) for n, v in state.items() if v.ndim == 2]
            for i, (place, weight) in enumerate(zip(places, linear, strict=True)):
                norm = None
                if f"layers.{place + 1}.running_mean" in state:
                    norm = nn.BatchNorm1d(len(weight), affine=f"layers.{place + 1}.weight" in state)
                between = nn.ReLU() if i + 1 < len(places) else None
                blocks.append((*weight.shape[::-1], norm, between, f"layers.{place}.bias" in state))
            head = modules.ProjectionHead(blocks)
        else:
            sizes = linear[0].shape[1], linear[0].shape[0], linear[-1].shape[0]
            norms = any(n.endswith("running_mean") for n in state)
            head = modules.MoCoProjectionHead(*sizes, num_layers=len(linear), batch_norm=norms)
        try:
            head.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"lightly cannot load the {name} of the written file: {reason}") from error


LOADERS: dict[str, Callable[[Path, Contents], nn.Module]] = {"torchvision": _in_torchvision, "timm": _in_timm}


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, Encoder) and isinstance(b, Encoder):
        return _equal(a.backbone, b.backbone) and _equal(a.head, b.head)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    return a == b


def _bits(value: Tensor) -> Tensor:
    """Bytes, in which NaN equals itself."""
    return value.contiguous().flatten().view(torch.uint8)
