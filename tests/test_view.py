"""What a network is shown in evaluation: torchvision's Resize and CenterCrop, from a file to the tensor."""

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from moco_fast.data.folder import load_folder
from moco_fast.data.images import ImageSet, MemoryImages
from moco_fast.evaluate.features import View

Image = pytest.importorskip("PIL.Image")
transforms = pytest.importorskip("torchvision.transforms")

CPU = torch.device("cpu")
SIZES = [(500, 375), (375, 500), (333, 500), (1200, 900), (256, 256), (640, 200)]  # width, height


def photo(width, height, seed):
    """Noise whose amplitude falls with the frequency, as in photographs, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    noise = rng.standard_normal((3, height, width // 2 + 1)) + 1j * rng.standard_normal(
        (3, height, width // 2 + 1)
    )
    x = np.fft.irfft2(noise / np.maximum(frequency, 1), s=(height, width))
    x = (x - x.mean()) / x.std() * 55 + 128
    return x.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.fixture(scope="module", params=["png", "jpg"])
def folder(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    for i, (width, height) in enumerate(SIZES):
        Image.fromarray(photo(width, height, i)).save(root / f"{i}.{request.param}", quality=95)
    return root


def shown(view, images):
    return torch.cat([x for x, _ in view.of(images, torch.arange(len(images)))])


def official(root, resize, crop):
    view = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop), transforms.ToTensor()])
    return torch.stack([view(Image.open(path).convert("RGB")) for path in sorted(root.iterdir())])


def distance(a, b):
    """Mean absolute difference of every image in units of 1 / 255, in means over 8 x 8 pixels.

    Files are squashed to a square of 448 pixels first, which interpolates otherwise: pixel by pixel, noise of
    deviation 55 differs by up to 12. The means tell whether the region is the same.
    """
    return 255 * (avg_pool2d(a, 8) - avg_pool2d(b, 8)).abs().mean((1, 2, 3))


def test_files_are_shown_as_by_the_official_evaluation(folder):
    """To half a pixel, to which the official code rounds where it crops."""
    images = load_folder(folder, 448, print).train
    want = official(folder, 256, 224)
    view = View(224, [0.0] * 3, [1.0] * 3, CPU)
    assert view.crop_of(images) == 0.875
    got = shown(view, images)
    near = distance(got, want)
    assert near.max() < 2 and (255 * (got - want).abs().mean((1, 2, 3))).max() < 12
    for crop in (0.85, 0.9, 1.0):
        other = distance(shown(View(224, [0.0] * 3, [1.0] * 3, CPU, crop=crop), images), want)
        assert (other > 4 * near).all() and other.min() > 7


def test_other_sizes_and_datasets_are_shown_whole(folder):
    images = load_folder(folder, 128, print).train
    view = View(64, [0.0] * 3, [1.0] * 3, CPU)
    assert view.crop_of(images) == 1.0
    assert distance(shown(view, images), official(folder, 64, 64)).max() < 2
    own = ImageSet(MemoryImages(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), None)
    assert View(224, [0.0] * 3, [1.0] * 3, CPU).crop_of(own) == 1.0
    assert View(64, [0.0] * 3, [1.0] * 3, CPU, crop=0.5).crop_of(own) == 0.5
    assert View(224, [0.0] * 3, [1.0] * 3, CPU).raw(4).crop_of(images) == 1.0


def test_a_crop_cuts_pixels_out():
    pixels = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    images = ImageSet(MemoryImages(pixels), None)
    cut = shown(View(4, [0.0], [1.0], CPU, crop=0.5), images)
    torch.testing.assert_close(cut * 255, pixels[..., 2:6, 2:6].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("crop", [0.0, -1.0, 1.01, float("nan"), "all"])
def test_bad_crops(crop):
    with pytest.raises((TypeError, ValueError), match="crop must be"):
        View(8, [0.0], [1.0], CPU, crop=crop)
