"""Whose layout a checkpoint has, and what it then holds: strictly, with a list of what does not fit.

    official v1, v2     encoder_q.*, encoder_k.*, queue, queue_ptr
    official v3         base_encoder.*, momentum_encoder.*, predictor.*
    this library's      the same and ``moco_fast``; other methods have encoder.* or teacher.*
    lightly             backbone.*, projection_head.layers.*, backbone_momentum.*, ...; its benchmarks have
                        query_backbone.* for the trained encoder and backbone.* for its average
    solo-learn          backbone.*, projector.*, momentum_backbone.*, momentum_projector.*, queue (2, dim, K)
    a backbone          names of torchvision or timm, without a classifier

and safetensors of any of them; with or without what DDP and torch.compile put into names.

Tests: tests/test_convert.py, tests/test_convert_errors.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_fast.convert.contents import MOCO, MOCO_V3, Contents, Encoder
from moco_fast.convert.names import named, recognised
from moco_fast.extras import extra
from moco_fast.models.backbones import CIFAR_RESNET
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.checkpoint import CheckpointError, mismatches, shortened
from moco_fast.train.pretrained import ENCODERS, blank, recorded, refuse_classifier, unrecorded

OWN_METHODS = {"moco-v1": MOCO, "moco-v2": MOCO, "sup-moco": MOCO, "moco-v3": MOCO_V3}
TRAINING = ("epoch", "optimizer", "scaler")  # of an official file, beside arch and state_dict


@dataclass(frozen=True)
class Layout:
    """Where a library keeps what. Names are prefixes; an empty head is one inside its encoder."""

    name: str
    q: str
    k: str = ""
    q_head: str = ""
    k_head: str = ""
    predictor: str = "predictor."
    aside: tuple[str, ...] = ()
    """What was trained beside the model, such as classifiers that watch it."""

    def fits(self, names: Mapping[str, Tensor]) -> bool:
        """Whether a state dict has the trained encoder where this layout keeps it."""
        return all(any(name.startswith(prefix) for name in names) for prefix in (self.q, self.q_head))


LAYOUTS = (
    Layout("official MoCo v1 or v2", "encoder_q.", "encoder_k.", aside=("queue_labels",)),
    Layout("official MoCo v3", "base_encoder.", "momentum_encoder."),
    Layout(
        "lightly", "query_backbone.", "backbone.", "query_projection_head.layers.", "projection_head.layers.",
        "prediction_head.layers.", ("online_classifier.",),
    ),
    Layout(
        "lightly", "backbone.", "backbone_momentum.", "projection_head.layers.",
        "projection_head_momentum.layers.", "prediction_head.layers.", ("online_classifier.",),
    ),
    Layout(
        "solo-learn", "backbone.", "momentum_backbone.", "projector.", "momentum_projector.",
        aside=("classifier.", "momentum_classifier."),
    ),
)  # fmt: skip
OFFICIAL = LAYOUTS[:2]
EXPECTED = (
    "encoder_q.* (official v1 and v2), base_encoder.* (v3), backbone.* with projection_head.* (lightly) or "
    "projector.* (solo-learn)"
)


def read_contents(path: str | os.PathLike[str], *, arch: str | None = None, trust: bool = False) -> Contents:
    """Read a checkpoint of any layout.

    Args:
        path: the file, or a run folder of this library.
        arch: name of the backbone; default: what the file says, else the ResNet that its weights are of.
        trust: as of ``train.checkpoint.read``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated; a classifier; unknown names; weights that are left over, missing or of
            another arch; or in need of ``trust``.
        ValueError: unknown ``arch``.
    """
    saved = _load(path, trust)
    own = saved.get("moco_fast")
    arch = arch or saved.get("arch") or None
    if not isinstance(arch, str | None):
        raise CheckpointError(f"{path} must name its arch, got {arch!r}: give --arch, such as resnet50")
    rest = checkpoints.tensors(path, saved["state_dict"])
    layout = _layout(path, rest, own, arch)
    dropped = [prefix.rstrip(".") for prefix in layout.aside if _take(rest, prefix)]

    parts = {"q": _take(rest, layout.q), "k": _take(rest, layout.k) if layout.k else {}}
    heads = {"q": layout.q_head, "k": layout.k_head}
    projectors = {role: _by_layer(_take(rest, prefix)) if prefix else {} for role, prefix in heads.items()}
    predictor = _take(rest, layout.predictor)
    if layout.name == "lightly":
        parts = {role: named(part) for role, part in parts.items()}
    arch = arch or recognised(parts["q"])
    if arch is None:
        raise CheckpointError(
            f"{path} does not name its arch, and its weights are of no ResNet: give --arch, such as vit_small"
        )
    facts = unrecorded(layout.name, parts["q"]) if own is None else recorded(path, own)
    with torch.device("meta"):
        network, head_path, _ = blank(arch, facts)
    encoders = {
        role: _encoder(path, part, projectors[role], arch, network.state_dict(), head_path)
        for role, part in parts.items()
        if part
    }
    if own is not None:
        method = OWN_METHODS.get(facts["method"], facts["method"])
    elif "k" in encoders or layout in OFFICIAL:
        method = MOCO_V3 if predictor or layout is OFFICIAL[1] else MOCO
    else:
        method = "an encoder alone"

    if own is not None and own.get("queues"):
        dropped.append("the queues of other processes")
    if layout.name == "solo-learn" and arch == CIFAR_RESNET:
        dropped.append("the first convolution's padding of 2, which is 1 here: features differ a little")
    unused = {key: value for key, value in saved.items() if key not in ("arch", "state_dict")}
    queue, queue_ptr = _take_queue(rest, unused, encoders["q"].head, dropped)
    if queue is not None and queue.ndim == 3:  # of either view; queries of the first meet keys of the second
        queue = queue[1]
        dropped.append("the queue of the first view's keys")
    if rest and own is not None and method not in (MOCO, MOCO_V3):
        dropped += sorted({name.partition(".")[0] for name in rest})
    elif rest:
        raise CheckpointError(
            f"{path} has the layout of {layout.name}, which knows no {shortened(rest)}: {len(rest)} left over"
        )
    kept = TRAINING if layout in OFFICIAL else TRAINING[:1]  # other optimizers have other parameters
    training = {key: unused.pop(key) for key in kept if key in unused}
    dropped += map(str, unused)
    _refuse_integers(path, predictor, *(encoder.head for encoder in encoders.values()), {"queue": queue})
    return Contents(
        "this library" if own is not None else layout.name, method, arch, facts, head_path, encoders,
        queue, queue_ptr, predictor, training, tuple(dropped),
    )  # fmt: skip


def _load(path: str | os.PathLike[str], trust: bool) -> dict[str, Any]:
    """What the file holds, its tensors under state_dict."""
    if _is_safetensors(Path(path)):
        try:
            with extra("safetensors").safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except ImportError:
            raise
        except Exception as error:  # of a class that only safetensors knows
            raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error
        epoch = {"epoch": int(about["epoch"])} if about.get("epoch", "").isdigit() else {}
        return {"arch": about.get("arch"), "state_dict": state} | epoch
    saved = checkpoints.read(path, keys=(), trust=trust)
    if "state_dict" in saved:
        return saved
    if saved and all(isinstance(value, Tensor) for value in saved.values()):
        return {"state_dict": saved}
    raise CheckpointError(
        f"{path} lacks state_dict, and is none itself: it has {shortened(map(str, saved)) or 'nothing'}"
    )


def _is_safetensors(path: Path) -> bool:
    """The format begins with 8 bytes of length and JSON."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _layout(path: str | os.PathLike[str], names: Mapping[str, Tensor], own: Any, arch: str | None) -> Layout:
    for layout in LAYOUTS:
        if layout.fits(names):
            return layout
    for prefix in ENCODERS if own is not None else ():
        if (layout := Layout("this library", prefix + ".")).fits(names):
            return layout
    bare = set() if arch is None else _bare_names(arch, names)
    expected = EXPECTED if bare else f"{EXPECTED}; or --arch, for a backbone with weights under such names"
    refuse_classifier(path, [name.removeprefix("backbone.") for name in names], expected, bare)
    if recognised(names) or names.keys() & bare:
        return Layout("a backbone alone", "")
    raise CheckpointError(
        f"{path} has no layout that is known here: expected {EXPECTED}, got {len(names)} tensors, "
        f"{shortened(names) or 'none'}"
    )


def _bare_names(arch: str, weights: Mapping[str, Tensor]) -> set[str]:
    with torch.device("meta"):
        return set(blank(arch, unrecorded("", weights))[0].state_dict())


def _take(rest: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Move the tensors under a prefix out of ``rest``, and name them without it."""
    found = [name for name in rest if name.startswith(prefix)]
    return {name.removeprefix(prefix): rest.pop(name) for name in found}


def _encoder(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    head: dict[str, Tensor],
    arch: str,
    wanted: Mapping[str, Tensor],
    head_path: str,
) -> Encoder:
    inside = {n.removeprefix(head_path + "."): v for n, v in weights.items() if n.startswith(head_path + ".")}
    backbone = {name: value for name, value in weights.items() if not name.startswith(head_path + ".")}
    if problems := mismatches(backbone, wanted):
        other = recognised(backbone)
        hint = f" (they are of {other})" if other not in (None, arch) else ""
        raise CheckpointError(f"{path} does not hold the weights of arch {arch!r}{hint}: {problems}")
    return Encoder({name: backbone[name] for name in wanted}, _by_layer(inside) if inside else head)


def _by_layer(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """A head's tensors by the index of their layer, also where it is a single linear layer."""
    return {f"0.{n}": v for n, v in head.items()} if head.keys() <= {"weight", "bias"} else head


def _refuse_integers(path: str | os.PathLike[str], *parts: Mapping[str, Tensor | None]) -> None:
    for name, value in (item for part in parts for item in part.items()):
        if value is None or value.is_floating_point() or name.endswith("num_batches_tracked"):
            continue
        raise CheckpointError(f"{path}: {name} is {value.dtype}, expected a floating-point dtype")


def _take_queue(
    rest: dict[str, Tensor], unused: dict[str, Any], head: Mapping[str, Tensor], dropped: list[str]
) -> tuple[Tensor | None, Tensor | None]:
    """Queue (dim, K) and pointer; lightly calls them bank, (K, dim), in early versions (dim, K)."""
    if "queue" in rest:
        return rest.pop("queue"), rest.pop("queue_ptr", None)
    bank: dict[str, Any] = {}
    held = [name.removesuffix("bank") for name in rest if name.endswith(".memory_bank.bank")]
    for prefix in (*held[:1], "criterion."):  # where lightly's early versions had it
        bank |= {name: rest.pop(prefix + name) for name in ("bank", "bank_ptr") if prefix + name in rest}
    early = "bank" in bank
    if not early and isinstance(unused.get("memory_bank"), dict):
        bank = unused.pop("memory_bank")  # where we write it, (K, dim), as lightly saves none
    rows = bank.get("bank")
    if not isinstance(rows, Tensor) or not rows.numel():
        return None, None
    dim = next((value.shape[0] for value in reversed(list(head.values())) if value.ndim == 2), None)
    if rows.ndim != 2 or (early and rows.shape[0] == rows.shape[1] == dim):
        dropped.append(f"a bank of {tuple(rows.shape)}, which does not tell dim from K")
        return None, None
    return (rows if early and rows.shape[0] == dim else rows.t()), bank.get("bank_ptr")
