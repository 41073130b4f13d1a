"""From uniform draws to the parameters of views.

Tests: tests/test_two_crops.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Tries for a crop that fits into the image, as in torchvision; then the central crop.
CROP_TRIES = 10

# Uniform draws per sample: area of every try, ratio of every try, left and top.
CROP_DRAWS = 2 * CROP_TRIES + 2

# Uniform draws per sample: whether to jitter, four factors, by whose draws the four are sorted.
JITTER_DRAWS = 9


def draw_boxes(
    u: Tensor,  # (N, CROP_DRAWS) uniform
    aspect: Tensor,  # (N,) width / height of the images
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Random resized crops as (N, 4) fractions of the image: left, top, width, height.

    In an image of width / height a, a crop of area fraction s and ratio r has the width fraction
    sqrt(s r / a) and the height fraction sqrt(s a / r). As in torchvision the first of ten tries
    that fits is taken, else the largest central crop with the image's ratio clamped into the range;
    unlike there the boxes are not rounded to whole pixels.
    """
    (s_min, s_max), (r_min, r_max) = scale, ratio
    area = s_min + (s_max - s_min) * u[:, :CROP_TRIES]
    shape = torch.exp(math.log(r_min) + math.log(r_max / r_min) * u[:, CROP_TRIES : 2 * CROP_TRIES])
    width = torch.sqrt(area * shape / aspect[:, None])
    height = torch.sqrt(area * aspect[:, None] / shape)
    # The slack lets a full crop pass whose square root was rounded up.
    fits = (width <= 1 + 1e-6) & (height <= 1 + 1e-6)
    first = fits.float().argmax(1, keepdim=True)  # the first of equals
    size = torch.cat((width.gather(1, first), height.gather(1, first)), dim=1).clamp(max=1)
    random = torch.cat(((1 - size) * u[:, 2 * CROP_TRIES :], size), dim=1)
    return torch.where(fits.any(1, keepdim=True), random, central_box(aspect, r_min, r_max))


def central_box(aspect: Tensor, r_min: float, r_max: float) -> Tensor:
    """The largest central crop with width / height in ``[r_min, r_max]``, as (N, 4) fractions."""
    relative = aspect.clamp(r_min, r_max) / aspect
    width, height = relative.clamp(max=1), (1 / relative).clamp(max=1)
    return torch.stack(((1 - width) / 2, (1 - height) / 2, width, height), dim=1)


def draw_jitter(
    u: Tensor,  # (N, JITTER_DRAWS) uniform
    strength: tuple[float, float, float, float],  # brightness, contrast, saturation, hue
    p: float,
) -> tuple[Tensor, Tensor]:
    """Amounts of brightness, contrast, saturation and hue, and their order, (N, 4) each.

    Args:
        u: the draws.
        strength: as in ``AugmentConfig.jitter``.
        p: probability per image.
    """
    lows = [max(0.0, 1 - v) for v in strength[:3]]
    factors = [
        low + (1 + v - low) * u[:, 1 + i] for i, (low, v) in enumerate(zip(lows, strength, strict=False))
    ]
    amounts = torch.stack((*factors, strength[3] * (2 * u[:, 4] - 1)), dim=1)
    none = torch.tensor([1.0, 1.0, 1.0, 0.0], device=u.device)
    return torch.where(u[:, :1] < p, amounts, none), u[:, 5:].argsort(1).to(u.dtype)
