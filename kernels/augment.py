"""Views of images: crop, resize, flip, colour jitter, grayscale, blur, solarise, normalise, in one launch.

A program makes one view in up to four passes over its tiles, with a barrier after each:

1. resample, and the adjustments before the contrast, of which it takes the mean luma
2. the contrast and the adjustments after it
3. blur along rows, where there is a blur
4. blur along columns; solarise, normalise, write

A view that is not blurred is written by the second. Between passes it lies in global memory, in fp32, or in
fp16 where the result is bf16: 2 or 3 more writes and reads of it, for the most part in the L2. It lies there
column by column as long as pixels of a row are wanted side by side, so that threads read several pixels of a
column at once.

Traffic: the crops once, 1 byte per value, and the views once. FLOP per value: 2 for every source pixel under
its triangles, about 50 for colours, 3 for every tap of the blur on either side and along either axis.

Reference: moco_fast.reference.augment.  Tests: tests/test_augment.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moco_fast import reference
from moco_fast.kernels.common import LOG2E

# Rows and columns of a tile, and warps. Not measured on a GPU yet.
TILES = {"views": (32, 32, 8)}

BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY = map(tl.constexpr, range(5))
ADJUSTMENTS = tl.constexpr(5)
COLUMNS = tl.constexpr(reference.COLUMNS)
AMOUNTS, ORDER = tl.constexpr(reference.AMOUNTS.start), tl.constexpr(reference.ORDER.start)
SIGMA, THRESHOLD = tl.constexpr(reference.SIGMA), tl.constexpr(reference.THRESHOLD)
RED, GREEN, BLUE = map(tl.constexpr, reference.LUMA)

# Taps of the blur farther than so many standard deviations are below 1e-9 of the largest, and left out.
FARTHEST = tl.constexpr(6.44)
HALF_LOG2E = tl.constexpr(0.5 * LOG2E)


@triton.jit
def _luma(r, g, b, C: tl.constexpr):
    return r * RED + g * GREEN + b * BLUE if C == 3 else r


@triton.jit
def _clamped(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _turned(high, chroma, hue):
    """A channel of HSV, by value, chroma and the hue in sixths of a turn from where the channel is least."""
    k = hue - 6.0 * tl.floor(hue / 6.0)
    return high - chroma * _clamped(tl.minimum(k, 4.0 - k))


@triton.jit
def _adjusted(r, g, b, adjustment, amount, mean, C: tl.constexpr):
    """One adjustment of pixels."""
    if adjustment == HUE:
        if C == 3 and amount != 0:
            high = tl.maximum(tl.maximum(r, g), b)
            chroma = high - tl.minimum(tl.minimum(r, g), b)
            inverse = 1.0 / tl.where(chroma == 0, 1.0, chroma)
            hue = tl.where(high == g, 2.0 + (b - r) * inverse, 4.0 + (r - g) * inverse)
            hue = tl.where(high == r, (g - b) * inverse, hue) + 6.0 * (amount - tl.floor(amount))
            r = _turned(high, chroma, hue + 5.0)
            g = _turned(high, chroma, hue + 3.0)
            b = _turned(high, chroma, hue + 1.0)
    elif amount != 1 and (C == 3 or adjustment < SATURATION):
        other = tl.where(adjustment == CONTRAST, mean, 0.0) + tl.zeros_like(r)
        if adjustment >= SATURATION:
            other = _luma(r, g, b, C)
        other *= 1.0 - amount
        r = _clamped(r * amount + other)
        g = _clamped(g * amount + other)
        b = _clamped(b * amount + other)
    return r, g, b


@triton.jit
def _adjusted_by(parameters, turn, r, g, b, mean, C: tl.constexpr):
    """The adjustment that comes at a turn. A number that is none reads no other memory, whatever it does."""
    adjustment = tl.load(parameters + ORDER + turn).to(tl.int32)
    amount = tl.load(parameters + AMOUNTS + tl.minimum(tl.maximum(adjustment, 0), ADJUSTMENTS - 1))
    return _adjusted(r, g, b, adjustment, amount, mean, C)


@triton.jit
def _put(at, plane, r, g, b, mask, C: tl.constexpr):
    """Store the channels of pixels."""
    tl.store(at, r.to(at.dtype.element_ty), mask=mask)
    if C == 3:
        tl.store(at + plane, g.to(at.dtype.element_ty), mask=mask)
        tl.store(at + 2 * plane, b.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _axis(begin, extent, length, S):
    """Where an axis of the view begins in source pixels, its step, half the base of a triangle, its taps."""
    step = extent * length / S
    half = tl.maximum(tl.abs(step), 1.0)
    return begin * length, step, half, tl.minimum(tl.ceil(2.0 * half), length * 1.0).to(tl.int32)


@triton.jit
def _weight(pixel, centre, half, length):
    """What a source pixel weighs; none beyond the edges of the image."""
    weight = tl.maximum(1.0 - tl.abs(pixel + 0.5 - centre) / half, 0.0)
    return tl.where((pixel >= 0) & (pixel < length), weight, 0.0)


@triton.jit
def _places(i, start, step, half, taps, length):
    """Centres of the triangles of output pixels i, first source pixels, and one over the sum of weights."""
    centre = start + (i + 0.5) * step
    first = tl.floor(centre - half - 0.5).to(tl.int32) + 1
    # As many pixels as there are taps lie within the image.
    first = tl.maximum(tl.minimum(first, length - taps), 0)
    total = tl.zeros_like(centre)
    for t in range(0, taps):
        total += _weight(first + t, centre, half, length)
    return centre, first, 1.0 / tl.where(total > 0, total, 1.0)  # none beyond the view


@triton.jit
def _reflected(i, S):
    i = tl.abs(i)
    return S - 1 - tl.abs(S - 1 - i)


@triton.jit
def _blurred(x, at, stride, i, S, radius, sigma, mask):
    """``x[at + stride i]`` blurred along the axis of i."""
    value = tl.load(x + at + stride * i, mask=mask, other=0).to(tl.float32)
    total = 1.0
    for d in range(1, radius + 1):
        weight = tl.exp2((d / sigma) * (d / sigma) * -HALF_LOG2E)
        before = tl.load(x + at + stride * _reflected(i - d, S), mask=mask, other=0).to(tl.float32)
        after = tl.load(x + at + stride * _reflected(i + d, S), mask=mask, other=0).to(tl.float32)
        value += weight * (before + after)
        total += 2.0 * weight
    return value / total


@triton.jit
def _write(out, value, channel, y, x, S, threshold, mean, scale, mask, C: tl.constexpr, LAST: tl.constexpr):
    """Solarise, normalise and write pixels of a channel of the view at ``out``."""
    value = (tl.where(value >= threshold, 1.0 - value, value) - mean) * scale
    at = (y * S + x) * C + channel if LAST else (channel * S + y) * S + x
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _augment(
    images,  # (N, C, H, W) uint8
    parameters,  # (N, 16)
    front, back,  # (N, C, S, S) each: the view between passes, in turn
    out,  # (N, C, S, S)
    H, W, S, most_radius,
    image_stride, channel_stride, row_stride, column_stride,
    mean_0, mean_1, mean_2, scale_0, scale_1, scale_2,
    C: tl.constexpr, LAST: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    images += n * image_stride
    next_channel = tl.cast(channel_stride, tl.int64)
    next_column = tl.cast(column_stride, tl.int64)
    parameters += n * COLUMNS
    plane = S * S
    front += n * C * plane
    back += n * C * plane
    out += n * C * plane
    threshold = tl.load(parameters + THRESHOLD)
    sigma = tl.load(parameters + SIGMA)
    # The least as a float: what no int32 holds has none.
    farthest = tl.minimum(tl.ceil(tl.maximum(sigma, 0.0) * FARTHEST), most_radius * 1.0)
    radius = farthest.to(tl.int32)
    contrast = ADJUSTMENTS  # where it is in the order, if anywhere
    for i in tl.static_range(ADJUSTMENTS):
        found = (tl.load(parameters + ORDER + i) == CONTRAST) & (
            tl.load(parameters + AMOUNTS + CONTRAST) != 1
        )
        contrast = tl.where(found, i, contrast)
    across = (S + BLOCK_X - 1) // BLOCK_X
    tiles = across * ((S + BLOCK_Y - 1) // BLOCK_Y)
    in_y = tl.arange(0, BLOCK_Y)[:, None]
    in_x = tl.arange(0, BLOCK_X)[None, :]

    left, step_x, half_x, taps_x = _axis(tl.load(parameters), tl.load(parameters + 2), W, S)
    top, step_y, half_y, taps_y = _axis(tl.load(parameters + 1), tl.load(parameters + 3), H, S)
    lumas = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    for tile in range(0, tiles):
        y = tile // across * BLOCK_Y + in_y
        x = tile % across * BLOCK_X + in_x
        centre_y, first_y, share_y = _places(y, top, step_y, half_y, taps_y, H)
        centre_x, first_x, share_x = _places(x, left, step_x, half_x, taps_x, W)
        r = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        g = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        b = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        mask = (y < S) & (x < S)
        for ty in range(0, taps_y):
            row = images + (first_y + ty).to(tl.int64) * row_stride
            weight_y = _weight(first_y + ty, centre_y, half_y, H)
            for tx in range(0, taps_x):
                weight = weight_y * _weight(first_x + tx, centre_x, half_x, W)
                at = row + (first_x + tx) * next_column
                r += weight * tl.load(at, mask=mask, other=0).to(tl.float32)
                if C == 3:
                    g += weight * tl.load(at + next_channel, mask=mask, other=0).to(tl.float32)
                    b += weight * tl.load(at + 2 * next_channel, mask=mask, other=0).to(tl.float32)
        share = share_y * share_x * (1.0 / 255.0)
        r *= share
        g *= share
        b *= share
        for turn in range(0, contrast):
            r, g, b = _adjusted_by(parameters, turn, r, g, b, 0.0, C)
        lumas += tl.where(mask, _luma(r, g, b, C), 0.0)
        _put(front + x * S + y, plane, r, g, b, mask, C)
    mean = tl.sum(tl.sum(lumas, axis=1), axis=0) / (S * S)
    tl.debug_barrier()

    for tile in range(0, tiles):
        y = tile // across * BLOCK_Y + in_y
        x = tile % across * BLOCK_X + in_x
        mask = (y < S) & (x < S)
        at = front + x * S + y
        r = tl.load(at, mask=mask, other=0).to(tl.float32)
        g = r
        b = r
        if C == 3:
            g = tl.load(at + plane, mask=mask, other=0).to(tl.float32)
            b = tl.load(at + 2 * plane, mask=mask, other=0).to(tl.float32)
        for turn in range(contrast, ADJUSTMENTS):
            r, g, b = _adjusted_by(parameters, turn, r, g, b, mean, C)
        if radius == 0:
            _write(out, r, 0, y, x, S, threshold, mean_0, scale_0, mask, C, LAST)
            if C == 3:
                _write(out, g, 1, y, x, S, threshold, mean_1, scale_1, mask, C, LAST)
                _write(out, b, 2, y, x, S, threshold, mean_2, scale_2, mask, C, LAST)
        else:
            _put(back + x * S + y, plane, r, g, b, mask, C)

    if radius > 0:
        tl.debug_barrier()
        for tile in range(0, C * tiles):
            y = tile % tiles // across * BLOCK_Y + in_y
            x = tile % tiles % across * BLOCK_X + in_x
            mask = (y < S) & (x < S)
            channel = tile // tiles * plane
            value = _blurred(back, channel + y, S, x, S, radius, sigma, mask)
            tl.store(front + channel + y * S + x, value.to(front.dtype.element_ty), mask=mask)
        tl.debug_barrier()
        for tile in range(0, C * tiles):
            y = tile % tiles // across * BLOCK_Y + in_y
            x = tile % tiles % across * BLOCK_X + in_x
            mask = (y < S) & (x < S)
            channel = tile // tiles
            value = _blurred(front, channel * plane + x, S, y, S, radius, sigma, mask)
            m = tl.where(channel == 0, mean_0, tl.where(channel == 1, mean_1, mean_2))
            scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
            _write(out, value, channel, y, x, S, threshold, m, scale, mask, C, LAST)


def augment(
    images: Tensor,
    parameters: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    tiles: tuple[int, int, int] | None = None,
) -> Tensor:
    """See :func:`moco_fast.reference.augment`; ``tiles`` in place of the table's entry."""
    count, channels, height, width = images.shape
    out = reference.empty_views(images, size, dtype, channels_last)
    between = torch.float16 if dtype == torch.bfloat16 else torch.float32
    front, back = (torch.empty_like(out, dtype=between, memory_format=torch.contiguous_format) for _ in "12")
    scales = [1 / s for s in std]
    missing = [0.0] * (3 - channels)
    rows, columns, warps = tiles or TILES["views"]
    block = triton.next_power_of_2(size)
    _augment[(count,)](
        images, parameters.contiguous(), front, back, out, height, width, size,
        reference.blur_radius(size), *images.stride(), *mean, *missing, *scales, *missing,
        C=channels, LAST=channels_last, BLOCK_Y=min(rows, block), BLOCK_X=min(columns, block),
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


CANDIDATES = {"views": [(y, x, w) for y in (16, 32, 64) for x in (16, 32, 64) for w in (4, 8, 16)]}


def tune_case(key: str, size: int = 224, device: str = "cuda") -> Callable[[tuple], Callable[[], Tensor]]:
    """What bench/tune.py times: views of 256 images of 256 pixels in bf16, half of them blurred."""
    images = torch.randint(256, (256, 3, size * 8 // 7, size * 8 // 7), dtype=torch.uint8, device=device)
    row = [0.1, 0.1, 0.8, 0.8, 0.8, 1.2, 1.2, 0.05, 1.0, 0, 3, 1, 2, 4]
    parameters = torch.tensor([[*row, 1.0, 2.0], [*row, 0.0, 2.0]], device=device).repeat(128, 1)
    statistics = (0.5, 0.5, 0.5)
    return lambda tiles: (
        lambda: augment(images, parameters, size, statistics, statistics, torch.bfloat16, True, tiles)
    )
