"""One image file -> a square RGB canvas of uint8, upright, whatever its mode.

The canvas is square so that images of any shape stack; the original width /
height comes along, and augmentation draws its crops in that geometry.

Tests: tests/test_decode.py.
"""

from __future__ import annotations

import os
import stat
from typing import Any

import numpy as np

from moco_fast.extras import extra

_ORIENTATION = 0x0112  # EXIF tag
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


def check_header(path: str | bytes) -> str | None:
    """Open a file without decoding it; the reason where it is not an image."""
    image_module = extra("PIL.Image")
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # opening it would wait for somebody to write
            return "a pipe"
        with image_module.open(os.fsdecode(path)):
            return None
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet
        return _reason(error)


def decode(path: str | bytes, canvas: int) -> tuple[np.ndarray, float] | str:
    """Decode one file.

    Args:
        path: image file.
        canvas: side of the result in pixels.

    Returns:
        Pixels (3, canvas, canvas) uint8 and the original width / height, or the reason why the file
        cannot be decoded: one bad file must not end a training run.
    """
    image_module = extra("PIL.Image")
    try:
        with image_module.open(os.fsdecode(path)) as image:
            width, height = image.size
            # JPEG decodes at 1/2, 1/4 or 1/8 size for less than the full price; never below the canvas.
            image.draft("RGB", (canvas, canvas))
            image.load()
            # Read after load(): Pillow turns TIFFs upright while loading, and drops their tag.
            orientation = _orientation(image)
            square = _to_rgb(image).resize(
                (canvas, canvas), image_module.Resampling.BILINEAR, reducing_gap=2.0
            )
    except Exception as error:  # as above; MemoryError included
        return _reason(error)
    if orientation >= 5:  # 5 to 8 swap the axes
        width, height = height, width
    # NumPy, not torch: waking torch's threads for so small a copy can cost more than the decoding.
    return np.ascontiguousarray(_upright(np.asarray(square), orientation).transpose(2, 0, 1)), width / height


def _orientation(image: Any) -> int:
    """EXIF orientation, 1 to 8; damaged EXIF counts as upright."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # malformed EXIF raises anything from SyntaxError to struct.error
        return 1
    return value if value in range(1, 9) else 1


def _upright(
    pixels: np.ndarray,  # (S, S, 3)
    orientation: int,
) -> np.ndarray:
    """Undo an EXIF orientation: axes swapped for 5 to 8, then mirrored."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    return np.flip(pixels, flips)


def _to_rgb(image: Any) -> Any:
    """Any mode as RGB: deep pixels scaled to 8 bits, transparency laid over white."""
    image_module = extra("PIL.Image")
    if image.mode.startswith(("I", "F")):
        image = image_module.fromarray(_to_8_bits(np.asarray(image)))
    elif image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, "white")
        image = image_module.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(
    values: np.ndarray,  # (H, W) uint16, int32 or float32
) -> np.ndarray:
    """Scale deep pixels to uint8; Pillow's own conversion would clip them at 255.

    Integers up to 65,535 are 16-bit images and divide by 257, floats in [0, 1] multiply by 255;
    anything else has no known range and is stretched from its minimum to its maximum.
    """
    unit = values.dtype.kind == "f"
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > (1.0 if unit else 65535.0):
        scale = 255.0 / (high - low) if high > low else 0.0
    else:
        low, scale = 0.0, 255.0 if unit else 1 / 257
    return np.rint((values - low) * scale).astype(np.uint8)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
