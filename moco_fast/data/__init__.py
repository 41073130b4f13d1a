"""Datasets, two-crop augmentation and loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moco_fast.exports import imported_when_used

if TYPE_CHECKING:
    from moco_fast.data.augment import AugmentConfig, TwoCrops, center_view, draw_parameters, random_view
    from moco_fast.data.datasets import load_dataset

__all__ = ["AugmentConfig", "TwoCrops", "center_view", "draw_parameters", "load_dataset", "random_view"]

_HOMES = {
    "AugmentConfig": "augment",
    "TwoCrops": "augment",
    "center_view": "augment",
    "draw_parameters": "augment",
    "load_dataset": "datasets",
    "random_view": "augment",
}

__getattr__, __dir__ = imported_when_used(__name__, _HOMES)
