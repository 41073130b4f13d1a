"""A view of every image of a batch: crop and resize, colour adjustments, blur, each with its own parameters.

Crop, resize and flip are linear and separable: a view is ``R_y X R_x^T`` with one (S, H) and one
(S, W) matrix per image. Their rows hold a triangle as wide as the reduction, which makes this
torchvision's bilinear resize with antialiasing at the price of two small matrix products. Blur is
the same with one banded (S, S) matrix per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Adjustments of colour, by their number in the parameters. Grayscale is saturation once more.
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY = range(5)

# Columns of the parameters of a view.
BOX, AMOUNTS, ORDER = slice(0, 4), slice(4, 9), slice(9, 14)
SIGMA, THRESHOLD = 14, 15
COLUMNS = 16

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, the weights of torchvision and PIL


def augment(
    images: Tensor,  # (N, C, H, W) uint8, C 1 or 3
    parameters: Tensor,  # (N, 16), fp32 or float64: the dtype of the arithmetic
    size: int,
    mean: Sequence[float],  # per channel
    std: Sequence[float],  # per channel
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Return the views, (N, C, size, size); see :func:`moco_fast.augment`."""
    x = resample(images.to(parameters.dtype) / 255, parameters[:, BOX], size)
    amounts, order = parameters[:, AMOUNTS], parameters[:, ORDER].long()
    for op in order.unbind(1):
        x = adjust_(x, op, amounts.gather(1, op[:, None])[:, 0])
    x = blur(x, parameters[:, SIGMA])
    x = torch.where(x >= per_image(parameters[:, THRESHOLD]), 1 - x, x)
    # Python scalars: a tensor of statistics would be copied to the device on every call.
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        x[:, channel].sub_(m).div_(s)
    return empty_views(images, size, dtype, channels_last).copy_(x)


def empty_views(images: Tensor, size: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Memory for the views."""
    shape = (*images.shape[:2], size, size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)


def resample(
    x: Tensor,  # (N, C, H, W)
    box: Tensor,  # (N, 4) fractions of the image: where the view begins, left and top, its width and height
    size: int,
) -> Tensor:
    """Cut ``box`` out of every image and resize it to (size, size). A width below 0 reads leftwards."""
    left, top, width, height = box.unbind(1)
    columns = _triangles(left, width, size, x.shape[3])
    rows = _triangles(top, height, size, x.shape[2])
    return rows[:, None] @ (x @ columns.transpose(1, 2)[:, None])


def _triangles(start: Tensor, extent: Tensor, size: int, length: int) -> Tensor:
    """(N, size, length) weights that resample ``[start, start + extent]`` of an axis to ``size`` points.

    Half the base of a triangle is one pixel when enlarging (bilinear) and one output step when
    reducing (antialiased). Triangles are cut at the edge of the image, not of the crop: next to the
    crop's border a view may contain up to half a base from outside it.
    """
    step = extent * (length / size)  # input pixels per output pixel, negative where mirrored
    index = torch.arange(size, device=start.device)
    centre = start[:, None] * length + (index + 0.5) * step[:, None]
    pixel = torch.arange(length, device=start.device) + 0.5
    distance = (pixel - centre[:, :, None]).abs()
    weight = (1 - distance / step.abs().clamp(min=1)[:, None, None]).clamp(min=0)
    return weight / weight.sum(2, keepdim=True)


def adjust_(
    x: Tensor,  # (N, C, S, S) in [0, 1], overwritten
    op: Tensor,  # (N,) BRIGHTNESS, CONTRAST, SATURATION, HUE or GRAY
    amount: Tensor,  # (N,)
) -> Tensor:
    """One adjustment of every image, not the same one of all. Those of one channel have no colour."""

    def changed(x: Tensor, chosen: Tensor, make: Callable[[Any], Tensor]) -> Tensor:
        if x.is_cuda:  # make all, and keep what is due: to look which are chosen would be to wait
            return torch.where(per_image(chosen), make(slice(None)), x)
        if len(rows := chosen.nonzero()[:, 0]):
            x[rows] = make(rows)
        return x

    last = GRAY if x.shape[1] == 3 else CONTRAST
    turned = op == HUE
    x = changed(
        x, ~turned & (op <= last) & (amount != 1), lambda rows: blend(x[rows], op[rows], amount[rows])
    )
    if last == CONTRAST:
        return x
    return changed(x, turned & (amount != 0), lambda rows: shift_hue(x[rows], amount[rows]))


def blend(
    x: Tensor,  # (N, C, S, S)
    op: Tensor,  # (N,)
    amount: Tensor,  # (N,)
) -> Tensor:
    """``clamp(f x + (1 - f) reference)``: the reference is 0, the image's mean luma, or each pixel's luma."""
    gray = luma(x)
    reference = per_image(op == CONTRAST) * gray.mean((1, 2, 3), keepdim=True)
    reference = reference + per_image((op == SATURATION) | (op == GRAY)) * gray
    factor = per_image(amount)
    return (factor * x).add_((1 - factor) * reference).clamp_(0, 1)


def shift_hue(
    x: Tensor,  # (N, 3, S, S)
    shift: Tensor,  # (N,) in turns
) -> Tensor:
    """Turn the hue of HSV; value and saturation stay.

    A channel is ``max - (max - min) clamp(min(k, 4 - k), 0, 1)`` with ``k = (n + h) mod 6``, h the
    hue in sixths of a turn and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = x.unbind(1)
    high = x.amax(1)
    chroma = high - x.amin(1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(high == red, (green - blue) / divisor, hue) + 6 * (shift - shift.floor())[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(hue + n, 6)
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def blur_radius(size: int) -> int:
    """Pixels on either side that a blur of a view of side ``size`` sees: its kernel is about a tenth."""
    return min(size - 1, max(1, round(0.05 * size)))


def blur(
    x: Tensor,  # (N, C, S, S)
    sigma: Tensor,  # (N,) in pixels; 0 for none
) -> Tensor:
    """Gaussian blur with reflected borders, as ``B X B^T`` with a banded (S, S) B."""
    size = x.shape[-1]
    offset = torch.arange(-(radius := blur_radius(size)), radius + 1, device=x.device)
    chosen = sigma > 0
    kernel = torch.exp(-0.5 * (offset / torch.where(chosen, sigma, 1)[:, None]) ** 2)
    kernel = torch.where(chosen[:, None], kernel / kernel.sum(1, keepdim=True), (offset == 0).to(kernel))
    index = torch.arange(size, device=x.device)
    # source[d, i]: the pixel that tap d of output pixel i reads.
    source = (size - 1) - ((size - 1) - (index + offset[:, None]).abs()).abs()
    taps = (source[:, :, None] == index).to(kernel)
    band = (kernel @ taps.flatten(1)).view(-1, 1, size, size)
    return band @ (x @ band.transpose(2, 3))


def luma(x: Tensor) -> Tensor:
    """(N, 1, S, S) luma; the image itself if it has one channel."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def per_image(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)
