"""Models: MoCo, the methods that it is measured against, and the backbones made for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moco_fast.exports import imported_when_used

if TYPE_CHECKING:
    from moco_fast.models.backbones import backbone
    from moco_fast.models.dino import DINO
    from moco_fast.models.end_to_end import EndToEnd
    from moco_fast.models.memory_bank import MemoryBank
    from moco_fast.models.moco import MoCo
    from moco_fast.models.moco_v3 import MoCo_ResNet, MoCo_ViT
    from moco_fast.models.simclr import SimCLR
    from moco_fast.models.simsiam import SimSiam
    from moco_fast.models.sup_moco import SupMoCo

__all__ = [
    "DINO",
    "EndToEnd",
    "MemoryBank",
    "MoCo",
    "MoCo_ResNet",
    "MoCo_ViT",
    "SimCLR",
    "SimSiam",
    "SupMoCo",
    "backbone",
]

_HOMES = {
    "DINO": "dino",
    "EndToEnd": "end_to_end",
    "MemoryBank": "memory_bank",
    "MoCo": "moco",
    "MoCo_ResNet": "moco_v3",
    "MoCo_ViT": "moco_v3",
    "SimCLR": "simclr",
    "SimSiam": "simsiam",
    "SupMoCo": "sup_moco",
    "backbone": "backbones",
}

__getattr__, __dir__ = imported_when_used(__name__, _HOMES)
