"""Image files that tests write."""

from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")


def write_image(path: Path, colour=(200, 30, 60), size=(12, 8), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def broken_pixels(path: Path) -> Path:
    """A PNG whose header is whole and whose pixels are not."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path
