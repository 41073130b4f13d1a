"""Two-crop augmentation of a whole batch: uint8 images in, two normalised views out.

Random resized crop with flip, colour jitter in random order, grayscale, Gaussian blur, solarise,
normalise: MoCo v2's sequence. Parameters are drawn here, per sample; :func:`moco_fast.augment` makes
the views of them, on the device the batch is on. Every call draws the same number of random values, so a
generator's state reproduces a batch bit for bit.

Tests: tests/test_two_crops.py, against ``torchvision.transforms.v2.functional``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moco_fast import checks, ops, reference
from moco_fast.data.draws import CROP_DRAWS, JITTER_DRAWS, central_box, draw_boxes, draw_jitter

# Uniform draws per sample and view: crop, flip, jitter, grayscale, whether to blur, sigma, solarise.
_DRAWS = (CROP_DRAWS, 1, JITTER_DRAWS, 1, 1, 1, 1)
NO_THRESHOLD = 2.0  # of solarising: above all pixels


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
        low, high = checks.numbers("crop_scale", self.crop_scale, 2)
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must satisfy 0 < min <= max <= 1, got {self.crop_scale}")
        for name in ("crop_ratio", "blur_sigma"):
            low, high = checks.numbers(name, getattr(self, name), 2)
            if not 0 < low <= high:
                raise ValueError(f"{name} must satisfy 0 < min <= max, got {getattr(self, name)}")
        jitter = checks.numbers("jitter", self.jitter, 4)
        if min(jitter) < 0 or jitter[3] > 0.5:
            raise ValueError(f"jitter must hold four values >= 0, the last (hue) <= 0.5, got {self.jitter}")
        for name in ("flip_p", "jitter_p", "gray_p", "blur_p", "solarize_p"):
            (p,) = checks.numbers(name, (getattr(self, name),), 1)
            if not 0 <= p <= 1:
                raise ValueError(f"{name} must be a probability in [0, 1], got {p}")


class TwoCrops:
    """Two independently drawn views of every image of a batch.

    Args:
        config: distribution of the query's view, and of the key's view unless ``key_config`` is given.
        mean: mean per channel on the scale [0, 1], subtracted last.
        std: standard deviation per channel on the same scale, divided by last.
        key_config: distribution of the key's view (MoCo v3 draws its two views differently).
        dtype: of the views: float32, bfloat16, float16 or float64.
        memory_format: of the views, ``torch.contiguous_format`` or ``torch.channels_last``.
    """

    def __init__(
        self,
        config: AugmentConfig,
        mean: Sequence[float],
        std: Sequence[float],
        key_config: AugmentConfig | None = None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        checks.views(dtype, memory_format)
        self.configs = (config, key_config or config)
        self.mean, self.std = _statistics(mean, std)
        self.dtype, self.memory_format = dtype, memory_format

    def __call__(
        self,
        images: Tensor,  # (N, C, H, W) uint8, C is 1 or 3
        generator: torch.Generator,
        aspect: Tensor | None = None,  # (N,) width / height of the originals
        part: tuple[int, int] = (0, 1),
    ) -> tuple[Tensor, Tensor]:
        """Return ``(view_q, view_k)``, each (N, C, S, S) and normalised.

        Args:
            images: the batch, on any device.
            generator: source of all randomness; its state determines the views. On a GPU what is drawn with a
                generator of the CPU travels there in one copy, with one of the GPU in many small launches.
            aspect: width / height of the original images where ``images`` were squashed to a common
                canvas: crops are then drawn in the geometry of the originals. Best on the generator's device.
                Default: W / H.
            part: ``images`` are this part of a batch of so many parts of N. Values are drawn for all of
                it, so generators of one seed on several ranks stay in step, and give the views of one rank.

        Raises:
            TypeError, ValueError: ``images`` or ``aspect`` are not as described.
        """
        query, key = (
            random_view(
                images, config, self.mean, self.std, generator, aspect, part, self.dtype, self.memory_format
            )
            for config in self.configs
        )
        return query, key


def random_view(
    images: Tensor,  # (N, C, H, W) uint8, C is 1 or 3
    config: AugmentConfig,
    mean: Sequence[float],  # per channel
    std: Sequence[float],  # per channel
    generator: torch.Generator,
    aspect: Tensor | None = None,  # (N,) width / height of the originals
    part: tuple[int, int] = (0, 1),
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """One random view of every image, (N, C, S, S) and normalised; args as for :class:`TwoCrops`."""
    mean, std = _statistics(mean, std)
    _check_images(images, mean)
    parameters = draw_parameters(config, _aspect(images, aspect, generator.device), generator, part)
    parameters = _on(images.device, parameters)
    return ops.augment(images, parameters, config.image_size, mean, std, dtype, memory_format)


def draw_parameters(
    config: AugmentConfig,
    aspect: Tensor,  # (N,) width / height of the images, on the generator's device
    generator: torch.Generator,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """What :func:`moco_fast.augment` takes for a view of N images, (N, 16); args as for :class:`TwoCrops`."""
    index, parts = part
    if not 0 <= index < parts:
        raise ValueError(f"part must be (index, parts) with 0 <= index < parts, got {part}")
    _check_aspect(aspect)
    aspect, count = aspect.float(), len(aspect)
    u = torch.rand(
        parts * count, sum(_DRAWS), generator=generator, device=generator.device, dtype=torch.float32
    )
    own = u[index * count : (index + 1) * count].split(_DRAWS, dim=1)
    u_crop, u_flip, u_jitter, u_gray, u_blur, u_sigma, u_solarize = own
    boxes = draw_boxes(u_crop, aspect, config.crop_scale, config.crop_ratio)
    left, top, width, height = boxes.split(1, dim=1)
    flip = u_flip < config.flip_p
    # Mirroring is reading from the right edge leftwards.
    box = torch.where(flip, left + width, left), top, torch.where(flip, -width, width), height
    amounts, order = draw_jitter(u_jitter, config.jitter, config.jitter_p)
    gray = torch.where(u_gray < config.gray_p, 0.0, 1.0)
    last = torch.full_like(gray, reference.GRAY)
    order = torch.cat((last, order) if config.gray_first else (order, last), dim=1)
    low, high = config.blur_sigma
    sigma = torch.where(u_blur < config.blur_p, low + (high - low) * u_sigma, 0.0)
    threshold = torch.where(u_solarize < config.solarize_p, 0.5, NO_THRESHOLD)
    return torch.cat((*box, amounts, gray, order, sigma, threshold), dim=1)


def center_view(
    images: Tensor,  # (N, C, H, W) uint8, C is 1 or 3
    size: int,
    mean: Sequence[float],  # per channel
    std: Sequence[float],  # per channel
    aspect: Tensor | None = None,  # (N,) width / height of the originals
    crop: float = 1.0,
) -> Tensor:
    """The evaluation view: a central square of the original image, (N, C, size, size) float32.

    Args as for :class:`TwoCrops`; nothing is random. ``crop``, in (0, 1], is the side of the square over the
    shorter side of the image: 0.875 for torchvision's ``Resize(256)`` and ``CenterCrop(224)``.
    """
    checks.count("size", size)
    (crop,) = checks.numbers("crop", (crop,), 1)
    if not 0 < crop <= 1:
        raise ValueError(f"crop must be in (0, 1], got {crop}")
    mean, std = _statistics(mean, std)
    _check_images(images, mean)
    aspect = _aspect(images, aspect, torch.device("cpu") if aspect is None else aspect.device)
    _check_aspect(aspect)
    left, top, width, height = central_box(aspect, 1.0, 1.0).unbind(1)
    margin = (1 - crop) / 2
    box = torch.stack((left + margin * width, top + margin * height, crop * width, crop * height), dim=1)
    untouched = torch.tensor([1.0, 1, 1, 0, 1, 0, 1, 2, 3, 4, 0, NO_THRESHOLD], device=box.device)
    parameters = torch.cat((box, untouched.expand(len(box), -1)), dim=1)
    return ops.augment(images, _on(images.device, parameters), size, mean, std)


def _on(device: torch.device, parameters: Tensor) -> Tensor:
    """On a device; without waiting, if that is a GPU."""
    if device.type == "cuda" and parameters.device.type == "cpu":
        return parameters.pin_memory().to(device, non_blocking=True)
    return parameters.to(device)


def _statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return checks.statistics(mean, std, 1 if isinstance(mean, Sequence) and len(mean) == 1 else 3)


def _check_images(images: Tensor, mean: Sequence[float]) -> None:
    checks.images(images)
    if images.shape[1] != len(mean):
        raise ValueError(
            f"images must have {len(mean)} channels, as mean has, got shape {tuple(images.shape)}"
        )


def _aspect(images: Tensor, aspect: Tensor | None, device: torch.device) -> Tensor:
    if aspect is None:
        return torch.full((len(images),), images.shape[3] / images.shape[2], device=device)
    if aspect.shape != (len(images),) or not aspect.is_floating_point():
        raise ValueError(
            f"aspect must be a floating-point tensor of shape ({len(images)},), "
            f"got {aspect.dtype} {tuple(aspect.shape)}"
        )
    return aspect.to(device, torch.float32)


def _check_aspect(aspect: Tensor) -> None:
    """Raise unless every ratio is finite and above 0. Those on a GPU are not read: that would wait for it."""
    if aspect.is_cpu and len(bad := (~((aspect > 0) & (aspect < math.inf))).nonzero()):  # NaN fails too
        row = int(bad[0])
        raise ValueError(f"aspect must be finite and above 0, got {float(aspect[row])} in row {row}")
