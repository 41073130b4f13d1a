"""Public op of the augmentation: from uint8 images to normalised views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moco_fast import backends, reference
from moco_fast.ops import arguments, library


@torch.no_grad()
def augment(
    images: Tensor,  # (N, C, H, W) uint8
    parameters: Tensor,  # (N, 16)
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A view of every image: crop, resize, flip, colour jitter, grayscale, blur, solarise, normalise, fused.

    What is to be done to an image stands in its row of the parameters; :class:`moco_fast.data.TwoCrops` draws
    them, and calls this op. Pixels count from 0 to 1. In this order:

    1. Crop and resize to ``(size, size)``: bilinear, with antialiasing where the crop is larger. Columns 0 to
       3 are where the crop begins, left and top, its width and its height, as fractions of the image; a
       width below 0 reads from right to left. The crop lies within the image.
    2. Five adjustments of colour. Columns 4 to 8 are how much of each: factors f of brightness 0, contrast 1,
       saturation 2 and grayscale 4, ``clamp(f x + (1 - f) r, 0, 1)`` with r zero, the view's mean luma, and
       each pixel's luma for the last two; turns of the hue 3, of HSV. 1, and of the hue 0, is none at all.
       Columns 9 to 13 are their order, a permutation of the five numbers.
    3. Gaussian blur with a standard deviation, column 14, in pixels of the view; 0 for none. The kernel
       reaches ``round(0.05 size)`` pixels, at least one; borders are reflected.
    4. Values of at least column 15 are inverted, ``1 - x``; above 1 for none.
    5. ``(x - mean) / std`` per channel.

    Source: Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning", section 3; Chen et al.
    2020, "A Simple Framework for Contrastive Learning", appendix A. Steps are as torchvision has them on
    floating-point images, but crops need not be whole pixels, and the outermost pixels of a view see what
    lies beside the crop.

    Args:
        images: (N, C, H, W) uint8, C 1 or 3, any strides. Images of one channel have no colour to adjust.
        parameters: (N, 16) float32, or float64 for arithmetic in float64.
        size: side of the views, in pixels.
        mean: per channel.
        std: per channel, above 0.
        dtype: of the views: float32, bfloat16, float16 or float64.
        memory_format: of the views, ``torch.contiguous_format`` or ``torch.channels_last``.

    Returns:
        (N, C, size, size). Without gradient.

    Raises:
        TypeError: images are not uint8, parameters neither float32 nor float64, dtype or memory_format none
            of these, size, mean or std no numbers.
        ValueError: shapes or devices do not match, an empty batch, size below 1 or above 16384, std not
            positive, mean or std not finite; parameters on the CPU that are not finite, crop outside the
            image or hold no permutation. On a GPU they are not looked at.

    Example:
        >>> no_crop = [0.0, 0, 1, 1, *(1, 1, 1, 0, 1), *range(5), 0, 2]
        >>> view = moco_fast.augment(images, torch.tensor([no_crop] * len(images)), 224, mean, std)
    """
    arguments.augment(images, parameters, size, mean, std, dtype, memory_format)
    mean, std = [float(m) for m in mean], [float(s) for s in std]
    return _augment(images, parameters, size, mean, std, dtype, memory_format == torch.channels_last)


@library.op("augment")
def _augment(
    images: Tensor,
    parameters: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    arguments.augment_values(parameters)
    if dtype == torch.float64:
        parameters = parameters.double()
    backend = backends.choose("augment", (parameters,))
    with library.without_autocast(images.device):
        return backend.augment(images, parameters, size, mean, std, dtype, channels_last)


@library.fake(_augment)
def _(images, parameters, size, mean, std, dtype, channels_last):
    return reference.empty_views(images, size, dtype, channels_last)
