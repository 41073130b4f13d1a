"""``moco.loader`` of the official repositories: two views of an image, and the PIL operations that they need.

Sources: He et al. 2020, "Momentum Contrast"; Chen et al. 2020, "Improved Baselines"; Chen et al. 2021, "An
Empirical Study of Training Self-Supervised Vision Transformers". Whole batches: :mod:`moco_fast.data`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from moco_fast.extras import extra


class TwoCropsTransform:
    """``[transform(image), transform2(image)]``: the query's and the key's view.

    Args:
        base_transform: draws a view.
        base_transform2: draws the other one (v3); the first one does unless given (v1, v2).
    """

    def __init__(
        self, base_transform: Callable[[Any], Any], base_transform2: Callable[[Any], Any] | None = None
    ) -> None:
        self.transforms = base_transform, base_transform2 or base_transform

    def __call__(self, image: Any) -> list[Any]:
        return [transform(image) for transform in self.transforms]


class GaussianBlur:
    """Gaussian blur of a PIL image by a radius that is uniform in ``sigma``, drawn from :mod:`random`.

    Args:
        sigma: least and largest radius, in pixels.

    Raises:
        ValueError: sigma is not two numbers with 0 <= least <= largest.
    """

    def __init__(self, sigma: Sequence[float] = (0.1, 2.0)) -> None:
        if len(sigma) != 2 or not 0 <= sigma[0] <= sigma[1]:
            raise ValueError(f"sigma must be two numbers with 0 <= least <= largest, got {sigma!r}")
        self.sigma = sigma

    def __call__(self, image: Any) -> Any:
        return image.filter(extra("PIL.ImageFilter").GaussianBlur(radius=random.uniform(*self.sigma)))


class Solarize:
    """Inverts the values of a PIL image from ``threshold`` on.

    Args:
        threshold: of 0 to 256, which inverts everything or nothing.

    Raises:
        ValueError: threshold out of range.
    """

    def __init__(self, threshold: int = 128) -> None:
        if not 0 <= threshold <= 256:
            raise ValueError(f"threshold must be in [0, 256], got {threshold!r}")
        self.threshold = threshold

    def __call__(self, image: Any) -> Any:
        return extra("PIL.ImageOps").solarize(image, self.threshold)
