"""Any image file becomes RGB of one size, or a reason why not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from images import Image, broken_pixels, write_image

from moco_fast.data.decode import decode


def pixels_of(path: Path, canvas: int = 8) -> torch.Tensor:
    result = decode(str(path), canvas)
    assert not isinstance(result, str), result
    assert result[0].shape == (3, canvas, canvas) and result[0].dtype == np.uint8
    return torch.from_numpy(result[0])


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("LA", (50, 255), "png", (50, 50, 50)),
        ("LA", (50, 0), "png", (255, 255, 255)),  # transparent: white
        ("RGBA", (10, 20, 30, 255), "png", (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("YCbCr", (100, 128, 128), "jpg", (100, 100, 100)),
        ("I;16", 257 * 200, "png", (200, 200, 200)),
        ("I;16", 257 * 200, "tif", (200, 200, 200)),
        ("I", 257 * 3, "tif", (3, 3, 3)),
        ("F", 0.2, "tif", (51, 51, 51)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, suffix, expected, tmp_path):
    path = write_image(tmp_path / f"a.{suffix}", colour, mode=mode)
    assert torch.equal(
        pixels_of(path), torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    )


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 99, 199])
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", transparency=1)
    assert pixels_of(tmp_path / "a.png")[:, 0, 0].tolist() == [9, 99, 199]
    assert pixels_of(tmp_path / "b.png")[:, 0, 0].tolist() == [255, 255, 255]


def test_deep_pixels_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    row = pixels_of(tmp_path / "a.png", 64)[0, 0].long()
    assert row[0] == 0 and row[-1] == 255 and (row - torch.linspace(0, 255, 64)).abs().max() <= 1
    wild = np.array([[-4.0, 4.0], [np.nan, 0.0]], dtype=np.float32)
    Image.fromarray(wild).save(tmp_path / "b.tif")
    assert pixels_of(tmp_path / "b.tif", 2)[0].tolist() == [[0, 255], [128, 128]]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels_of(tmp_path / "a.gif")[:, 3, 3].tolist() == [250, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, suffix, tmp_path):
    from PIL import ImageOps

    blocks = np.array([[0, 80], [160, 240]], dtype=np.uint8).repeat(16, 0).repeat(32, 1)
    image = Image.fromarray(blocks).convert("RGB")  # 64 wide, 32 high
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB").resize((8, 8)))
    pixels, aspect = decode(str(path), 8)
    difference = pixels.transpose(1, 2, 0).astype(int) - expected.astype(int)
    # The middle rows and columns mix neighbours; corners tell the orientation.
    assert np.abs(difference[[0, 0, -1, -1], [0, -1, 0, -1]]).max() <= 6
    assert aspect == (0.5 if orientation >= 5 else 2.0)


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (4000, 3000)])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_tiny_huge_and_narrow_images(size, suffix, tmp_path):
    path = write_image(tmp_path / f"a.{suffix}", (120, 120, 120), size=size)
    pixels, aspect = decode(str(path), 16)
    assert np.abs(pixels.astype(int) - 120).max() <= 1 and aspect == size[0] / size[1]


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert (pixels_of(tmp_path / "a.png").int() - 127).abs().max() <= 12


def test_undecodable_file_gives_its_reason(tmp_path):
    assert isinstance(decode(str(tmp_path / "nowhere.png"), 8), str)
    assert "truncated" in decode(str(broken_pixels(tmp_path / "a.png")), 8)
