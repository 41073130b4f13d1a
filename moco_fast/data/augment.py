"""Two-crop augmentation of a whole batch: uint8 images in, two normalised float views out.

Random resized crop with flip, colour jitter in random order, grayscale, Gaussian blur, solarise,
normalise: MoCo v2's sequence, with parameters per sample, on the device the batch is on. Nothing is
read back to the host, no shape depends on drawn values, and every call draws the same number of
random values, so a generator's state reproduces a batch bit for bit.

Tests: tests/test_augment.py, against ``torchvision.transforms.v2.functional``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moco_fast import checks
from moco_fast.data.transforms import (
    CROP_DRAWS,
    JITTER_DRAWS,
    blur,
    central_box,
    draw_boxes,
    hue_places,
    jitter,
    luma,
    per_image,
    resample,
)

# Uniform draws per sample and view: crop, flip, jitter, grayscale, whether to blur, sigma, solarise.
_DRAWS = (CROP_DRAWS, 1, JITTER_DRAWS, 1, 1, 1, 1)


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges and probabilities of one random view; the defaults are MoCo v2's.

    Saturation, hue and grayscale do nothing to images of one channel.

    Attributes:
        image_size: side S of the square view, in pixels.
        crop_scale: smallest and largest area of the crop, as a fraction of the image.
        crop_ratio: smallest and largest width / height of the crop, drawn uniformly in the logarithm.
        flip_p: probability of a horizontal flip.
        jitter: brightness, contrast, saturation and hue. A factor is uniform in ``[max(0, 1 - v), 1 + v]``;
            the hue shift is uniform in ``[-v, v]`` turns, v <= 0.5.
        jitter_p: probability of colour jitter.
        gray_p: probability of grayscale.
        blur_p: probability of Gaussian blur, whose kernel is about a tenth of the view.
        blur_sigma: smallest and largest standard deviation of the blur, in pixels of the view.
        solarize_p: probability of inverting the values of 0.5 and above.
        gray_first: grayscale before colour jitter, as in MoCo v1, not after it, as ever since.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of its range.
    """

    image_size: int = 224
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    gray_first: bool = False

    def __post_init__(self) -> None:
        checks.count("image_size", self.image_size)
        low, high = _floats("crop_scale", self.crop_scale, 2)
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must satisfy 0 < min <= max <= 1, got {self.crop_scale}")
        for name in ("crop_ratio", "blur_sigma"):
            low, high = _floats(name, getattr(self, name), 2)
            if not 0 < low <= high:
                raise ValueError(f"{name} must satisfy 0 < min <= max, got {getattr(self, name)}")
        jitter = _floats("jitter", self.jitter, 4)
        if min(jitter) < 0 or jitter[3] > 0.5:
            raise ValueError(f"jitter must hold four values >= 0, the last (hue) <= 0.5, got {self.jitter}")
        for name in ("flip_p", "jitter_p", "gray_p", "blur_p", "solarize_p"):
            (p,) = _floats(name, (getattr(self, name),), 1)
            if not 0 <= p <= 1:
                raise ValueError(f"{name} must be a probability in [0, 1], got {p}")


class TwoCrops:
    """Two independently drawn views of every image of a batch.

    Args:
        config: distribution of the query's view, and of the key's view unless ``key_config`` is given.
        mean: mean per channel on the scale [0, 1], subtracted last.
        std: standard deviation per channel on the same scale, divided by last.
        key_config: distribution of the key's view (MoCo v3 draws its two views differently).
    """

    def __init__(
        self,
        config: AugmentConfig,
        mean: Sequence[float],
        std: Sequence[float],
        key_config: AugmentConfig | None = None,
    ) -> None:
        self.configs = (config, key_config or config)
        self.mean, self.std = _statistics(mean, std)

    def __call__(
        self,
        images: Tensor,  # (N, C, H, W) uint8, C is 1 or 3
        generator: torch.Generator,  # on the device of images
        aspect: Tensor | None = None,  # (N,) width / height of the originals
        part: tuple[int, int] = (0, 1),
    ) -> tuple[Tensor, Tensor]:
        """Return ``(view_q, view_k)``, each (N, C, S, S) float32 and normalised.

        Args:
            images: the batch, on any device.
            generator: source of all randomness; its state determines the views.
            aspect: width / height of the original images where ``images`` were squashed to a common
                canvas: crops are then drawn in the geometry of the originals. Default: W / H.
            part: ``images`` are this part of a batch of so many parts of N. Values are drawn for all of
                it, so generators of one seed on several ranks stay in step, and give the views of one rank to
                rounding, however many images a part has.

        Raises:
            TypeError, ValueError: ``images`` or ``aspect`` are not as described.
        """
        _check_images(images, self.mean)
        aspect = _aspect(images, aspect)
        unit = _unit(images)
        query, key = (_view(unit, config, generator, aspect, part) for config in self.configs)
        return _normalize_(query, self.mean, self.std), _normalize_(key, self.mean, self.std)


def random_view(
    images: Tensor,  # (N, C, H, W) uint8, C is 1 or 3
    config: AugmentConfig,
    mean: Sequence[float],  # per channel
    std: Sequence[float],  # per channel
    generator: torch.Generator,  # on the device of images
    aspect: Tensor | None = None,  # (N,) width / height of the originals
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """One random view of every image, (N, C, S, S) float32 and normalised; args as for :class:`TwoCrops`."""
    mean, std = _statistics(mean, std)
    _check_images(images, mean)
    view = _view(_unit(images), config, generator, _aspect(images, aspect), part)
    return _normalize_(view, mean, std)


def center_view(
    images: Tensor,  # (N, C, H, W) uint8, C is 1 or 3
    size: int,
    mean: Sequence[float],  # per channel
    std: Sequence[float],  # per channel
    aspect: Tensor | None = None,  # (N,) width / height of the originals
    crop: float = 1.0,
) -> Tensor:
    """The evaluation view: a central square of the original image, (N, C, size, size).

    Args as for :class:`TwoCrops`; nothing is random. ``crop``, in (0, 1], is the side of the square over the
    shorter side of the image: 0.875 for torchvision's ``Resize(256)`` and ``CenterCrop(224)``.
    """
    checks.count("size", size)
    (crop,) = _floats("crop", (crop,), 1)
    if not 0 < crop <= 1:
        raise ValueError(f"crop must be in (0, 1], got {crop}")
    mean, std = _statistics(mean, std)
    _check_images(images, mean)
    aspect = _aspect(images, aspect)
    left, top, width, height = central_box(aspect, 1.0, 1.0).unbind(1)
    margin = (1 - crop) / 2
    box = torch.stack((left + margin * width, top + margin * height, crop * width, crop * height), dim=1)
    keep = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    return _normalize_(resample(_unit(images), box, keep, size), mean, std)


def _unit(images: Tensor) -> Tensor:
    """Pixels from 0 to 1, in one new tensor."""
    return images.to(torch.float32, copy=True).div_(255)


def _view(
    unit: Tensor,  # (N, C, H, W) in [0, 1]
    config: AugmentConfig,
    generator: torch.Generator,
    aspect: Tensor,  # (N,)
    part: tuple[int, int],
) -> Tensor:  # (N, C, S, S) in [0, 1]
    index, parts = part
    first = index * len(unit)
    every = torch.rand(parts * len(unit), sum(_DRAWS), generator=generator, device=unit.device)
    draws = every[first : first + len(unit)]
    u_crop, u_flip, u_jitter, u_gray, u_blur, u_sigma, u_solarize = draws.split(_DRAWS, dim=1)
    boxes = draw_boxes(u_crop, aspect, config.crop_scale, config.crop_ratio)
    view = resample(unit, boxes, u_flip[:, 0] < config.flip_p, config.image_size)
    # What the configuration never does is skipped; what it draws is not, so the draws stay aligned.
    if config.gray_first:
        view = _gray(view, u_gray, config)
    if config.jitter_p > 0 and max(config.jitter) > 0:
        places = hue_places(every.split(_DRAWS, dim=1)[2][:, -1])[first : first + len(unit)]
        view = jitter(view, u_jitter, config.jitter, config.jitter_p, places, first)
    if not config.gray_first:
        view = _gray(view, u_gray, config)
    if config.blur_p > 0:
        low, high = config.blur_sigma
        view = blur(view, (low + (high - low) * u_sigma)[:, 0], u_blur[:, 0] < config.blur_p)
    if config.solarize_p > 0:
        chosen = per_image(u_solarize < config.solarize_p) & (view >= 0.5)
        view = torch.where(chosen, 1 - view, view)
    return view


def _gray(view: Tensor, u: Tensor, config: AugmentConfig) -> Tensor:
    if config.gray_p == 0 or view.shape[1] == 1:
        return view
    return torch.where(per_image(u < config.gray_p), luma(view), view)


def _normalize_(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    # Python scalars: a tensor of statistics would be copied to the device on every call.
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        x[:, channel].sub_(m).div_(s)
    return x


def _floats(name: str, values: Sequence[float], count: int) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or any(
        isinstance(v, bool) or not isinstance(v, (int, float)) for v in values
    ):
        raise TypeError(f"{name} must be made of numbers, got {values!r}")
    if len(values) != count or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name} must have {count} finite value(s), got {values!r}")
    return tuple(float(v) for v in values)


def _statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = _floats("mean", mean, len(mean)), _floats("std", std, len(mean))
    if len(mean) not in (1, 3) or min(std) <= 0:
        raise ValueError(f"mean and std must have 1 or 3 values, std positive, got {mean} and {std}")
    return mean, std


def _check_images(images: Tensor, mean: Sequence[float]) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images must be a uint8 tensor, got {getattr(images, 'dtype', type(images))}")
    if images.ndim != 4 or images.shape[1] != len(mean) or images.numel() == 0:
        raise ValueError(f"images must be (N, {len(mean)}, H, W) and not empty, got {tuple(images.shape)}")


def _aspect(images: Tensor, aspect: Tensor | None) -> Tensor:
    if aspect is None:
        return torch.full((len(images),), images.shape[3] / images.shape[2], device=images.device)
    if aspect.shape != (len(images),) or not aspect.is_floating_point():
        raise ValueError(
            f"aspect must be a floating-point tensor of shape ({len(images)},), "
            f"got {aspect.dtype} {tuple(aspect.shape)}"
        )
    return aspect.to(images.device, torch.float32)
