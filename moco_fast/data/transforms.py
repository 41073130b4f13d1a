"""Image operations with parameters per sample: crop and resize, colour jitter, blur.

Float images (N, C, H, W) in [0, 1], C 1 or 3, on any device. Parameters are tensors of N values, or
uniform draws from which they are computed; nothing is read back to the host.

Crop, resize and flip are linear and separable: a view is ``R_y X R_x^T`` with one (S, H) and one
(S, W) matrix per sample. Their rows hold a triangle as wide as the reduction, which makes this
torchvision's bilinear resize with antialiasing at the price of two small matrix products. Blur is
the same with one banded (S, S) matrix per sample.

Tests: tests/test_augment.py, against ``torchvision.transforms.v2.functional``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Tries for a crop that fits into the image, as in torchvision; then the central crop.
CROP_TRIES = 10

# Uniform draws per sample: area of every try, ratio of every try, left and top.
CROP_DRAWS = 2 * CROP_TRIES + 2

# Uniform draws per sample: whether to jitter, four factors, order keys of the three blends, place of the hue.
JITTER_DRAWS = 9

# Places of the hue among the three blends; so many images of a batch in a row share them out.
PLACES = 4

# ITU-R 601 luma, the weights of torchvision and PIL.
_LUMA = (0.2989, 0.587, 0.114)


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


def resample(
    x: Tensor,  # (N, C, H, W)
    box: Tensor,  # (N, 4) fractions: left, top, width, height
    flip: Tensor,  # (N,) bool
    size: int,
) -> Tensor:
    """Cut ``box`` out of every image, resize it to (size, size), mirror where ``flip``."""
    left, top, width, height = box.unbind(1)
    # Mirroring is reading from the right edge leftwards.
    start, step = torch.where(flip, left + width, left), torch.where(flip, -width, width)
    columns = triangles(start, step, size, x.shape[3])
    rows = triangles(top, height, size, x.shape[2])
    return rows[:, None] @ (x @ columns.transpose(1, 2)[:, None])


def triangles(start: Tensor, extent: Tensor, size: int, length: int) -> Tensor:
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


def hue_places(
    u: Tensor,  # (N,) uniform, of all images of a step
) -> Tensor:
    """How many of the three blends come before an image's hue shift, (N,) int64 in [0, 3].

    Uniform for every image. Every four in a row, from the first image on, hold each place once, so that
    how many images have a place is known without reading it back; the last N mod 4 are independent.
    """
    whole = len(u) // PLACES * PLACES
    rest = (PLACES * u[whole:]).long().clamp(max=PLACES - 1)  # rounded up, where u is just below 1
    return torch.cat([u[:whole].view(-1, PLACES).argsort(1).flatten(), rest])


def jitter(
    x: Tensor,  # (N, C, S, S) in [0, 1]
    u: Tensor,  # (N, JITTER_DRAWS) uniform
    strength: tuple[float, float, float, float],  # brightness, contrast, saturation, hue
    p: float,
    places: Tensor | None = None,  # (N,)
    first: int = 0,
) -> Tensor:
    """Brightness, contrast, saturation and hue, in an order drawn per sample.

    The first three are one formula, ``clamp(f x + (1 - f) reference)`` with the reference 0, the
    mean luma, or the luma, so a pass over the batch does a different one for every sample. The hue
    shift comes before, between or after them: a quarter of the batch at each of the four places,
    which costs one shift in all. Images of a group of four that is only partly in ``x``, six at
    most, are shifted at every place, and keep what is due.

    Args:
        x: the images.
        u: draws for them.
        strength: as in ``AugmentConfig.jitter``.
        p: probability per image.
        places: :func:`hue_places` of the images, from draws for all images of the step. Default: ``x``
            is all of them.
        first: which image of the step the first is.
    """
    on = u[:, :1] < p
    lows = [max(0.0, 1 - v) for v in strength[:3]]
    factors = [
        low + (1 + v - low) * u[:, 1 + i] for i, (low, v) in enumerate(zip(lows, strength, strict=False))
    ]
    factor = torch.where(on, torch.stack(factors, dim=1), 1.0)
    blends = 3 if x.shape[1] == 3 else 2  # the third is saturation
    order = u[:, 5 : 5 + blends].argsort(1)
    hue = strength[3] if x.shape[1] == 3 else 0.0
    shift = torch.where(on[:, 0], hue * (2 * u[:, 4] - 1), 0.0)
    places = hue_places(u[:, 8]) if places is None else places
    if hue > 0:
        groups, others = _by_place(places, first)
    for place in range(blends + 1):
        if hue > 0:
            rows = torch.cat([groups[place], others])
            before = x[rows]
            after = shift_hue(before, shift[rows])
            if len(others):
                after = torch.where(per_image(places[rows] == place), after, before)
            x[rows] = after
        if place < blends:
            op = order[:, place : place + 1]
            x = blend_(x, factor.gather(1, op), op)
    return x


def _by_place(
    places: Tensor,  # (N,)
    first: int,
) -> tuple[Tensor, Tensor]:
    """Images of the whole groups of four by place, (4, N // 4 or less), and those of no whole group."""
    index = torch.arange(len(places), device=places.device)
    head = min(-first % PLACES, len(places))
    end = len(places) - (len(places) - head) % PLACES
    groups = places[head:end].view(-1, PLACES).argsort(1) + index[head:end:PLACES, None]
    return groups.t(), torch.cat([index[:head], index[end:]])


def blend_(
    x: Tensor,  # (N, C, S, S), overwritten
    factor: Tensor,  # (N, 1)
    op: Tensor,  # (N, 1): 0 brightness, 1 contrast, 2 saturation
) -> Tensor:
    gray = luma(x)
    reference = per_image(op == 1) * gray.mean((1, 2, 3), keepdim=True)
    if x.shape[1] == 3:
        reference = reference + per_image(op == 2) * gray
    factor = per_image(factor)
    return x.mul_(factor).add_((1 - factor) * reference).clamp_(0, 1)


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
    hue = torch.where(high == red, (green - blue) / divisor, hue) + 6 * shift[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(hue + n, 6)
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def blur(
    x: Tensor,  # (N, C, S, S)
    sigma: Tensor,  # (N,)
    chosen: Tensor,  # (N,) bool
) -> Tensor:
    """Gaussian blur with reflected borders where ``chosen``, as ``B X B^T`` with a banded (S, S) B."""
    size = x.shape[-1]
    radius = min(size - 1, max(1, round(0.05 * size)))
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = torch.where(chosen[:, None], kernel / kernel.sum(1, keepdim=True), (offset == 0).float())
    index = torch.arange(size, device=x.device)
    # source[d, i]: the pixel that tap d of output pixel i reads.
    source = (size - 1) - ((size - 1) - (index + offset[:, None]).abs()).abs()
    taps = (source[:, :, None] == index).float()
    band = (kernel @ taps.flatten(1)).view(-1, 1, size, size)
    return band @ (x @ band.transpose(2, 3))


def luma(x: Tensor) -> Tensor:
    """(N, 1, S, S) luma; the image itself if it has one channel."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def per_image(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)
