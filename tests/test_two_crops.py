"""Two-crop augmentation: what is drawn, and that it alone determines the views; the op: test_augment.py."""

import dataclasses
import math

import pytest
import torch

import moco_fast
from moco_fast import reference
from moco_fast.data import draws
from moco_fast.data.augment import AugmentConfig, TwoCrops, center_view, draw_parameters, random_view
from moco_fast.train.presets import PRESETS

tv = pytest.importorskip("torchvision.transforms.v2.functional")

IDENTITY = AugmentConfig(
    image_size=28,
    crop_scale=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    flip_p=0.0,
    jitter=(0.0, 0.0, 0.0, 0.0),
    jitter_p=0.0,
    gray_p=0.0,
    blur_p=0.0,
)
MEAN = {1: (0.3,), 3: (0.5, 0.4, 0.3)}
STD = {1: (0.2,), 3: (0.2, 0.3, 0.25)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(n: int, channels: int, height: int, width: int | None = None) -> torch.Tensor:
    shape = (n, channels, height, width or height)
    return torch.randint(0, 256, shape, generator=seeded(), dtype=torch.uint8)


def unit(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255


def normalised(images: torch.Tensor) -> torch.Tensor:
    return tv.normalize(unit(images), MEAN[images.shape[1]], STD[images.shape[1]])


def views(
    config: AugmentConfig, images: torch.Tensor, seed: int = 0, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views on the scale [0, 1]: the normalisation is switched off."""
    channels = images.shape[1]
    return TwoCrops(config, (0.0,) * channels, (1.0,) * channels)(images, seeded(seed), **kwargs)


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_returns_the_normalised_image(channels):
    images = random_images(5, channels, 28)
    for view in TwoCrops(IDENTITY, MEAN[channels], STD[channels])(images, seeded()):
        torch.testing.assert_close(view, normalised(images), rtol=0, atol=2e-6)


def test_grayscale_before_jitter():
    """As in MoCo v1: what is grey has no colour to turn; else grey is as light as the colour turned to."""
    images = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
    images[:, 0] = 200  # red
    config = dataclasses.replace(IDENTITY, gray_p=1.0, jitter=(0.0, 0.0, 0.0, 0.5), jitter_p=1.0)
    after, _ = views(config, images)
    before, _ = views(dataclasses.replace(config, gray_first=True), images)
    torch.testing.assert_close(before, tv.rgb_to_grayscale(unit(images), 3), rtol=0, atol=1e-6)
    assert after[:, 0].std() > 0.05
    assert PRESETS["moco-v1"].config.augment.gray_first and not PRESETS["moco-v2"].config.augment.gray_first


@pytest.mark.parametrize("aspect", [0.5, 1.0, 1.5])
def test_crops_have_the_requested_area_and_ratio_in_the_original_geometry(aspect):
    n = 20000
    u = torch.rand(n, draws.CROP_DRAWS, generator=seeded())
    box = draws.draw_boxes(u, torch.full((n,), aspect), (0.2, 0.6), (3 / 4, 4 / 3))
    left, top, width, height = box.unbind(1)
    area, ratio = width * height, aspect * width / height
    assert area.min() >= 0.2 - 1e-4 and area.max() <= 0.6 + 1e-4
    assert ratio.min() >= 3 / 4 - 1e-4 and ratio.max() <= 4 / 3 + 1e-4
    assert min(left.min(), top.min()) >= 0
    assert max((left + width).max(), (top + height).max()) <= 1 + 1e-6
    if aspect == 1.0:  # every try fits: the distributions are the drawn ones
        assert abs(area.mean() - 0.4) < 0.005
        assert abs(ratio.log().mean()) < 0.005
        assert abs((left / (1 - width)).mean() - 0.5) < 0.01


@pytest.mark.parametrize("aspect, expected", [(4.0, (1 / 3, 1.0)), (0.25, (1.0, 1 / 3)), (1.2, (1.0, 1.0))])
def test_a_crop_that_never_fits_is_the_central_one(aspect, expected):
    u = torch.rand(50, draws.CROP_DRAWS, generator=seeded())
    u[:, draws.CROP_TRIES : 2 * draws.CROP_TRIES] *= 0.01  # only narrow tries, which never fit
    boxes = draws.draw_boxes(u, torch.full((50,), aspect), (1.0, 1.0), (3 / 4, 4 / 3))
    left, top, width, height = boxes.unbind(1)
    torch.testing.assert_close(width, torch.full((50,), expected[0]))
    torch.testing.assert_close(height, torch.full((50,), expected[1]))
    torch.testing.assert_close(left, (1 - width) / 2)
    torch.testing.assert_close(top, (1 - height) / 2)


def test_center_view_is_the_central_square_of_the_original():
    images = random_images(2, 3, 20, 40)
    ours = center_view(images, 20, MEAN[3], STD[3])
    torch.testing.assert_close(ours, normalised(images[..., 10:30]), rtol=0, atol=1e-5)
    squashed = center_view(images[..., :20], 20, MEAN[3], STD[3], aspect=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(squashed[0], normalised(images[..., :20])[0], rtol=0, atol=1e-5)
    wide = tv.resize(unit(images[1:, :, :, 5:15]), [20, 20], antialias=True)[..., 1:-1]
    wide = tv.normalize(wide, MEAN[3], STD[3])  # but for the border, which sees beyond the crop
    torch.testing.assert_close(squashed[1:, ..., 1:-1], wide, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_generator_state_determines_the_views(channels):
    config = AugmentConfig(image_size=28, solarize_p=0.2)
    images = random_images(16, channels, 28)
    crops, generator = TwoCrops(config, MEAN[channels], STD[channels]), seeded(3)
    state = generator.get_state()
    first = crops(images, generator)
    after = generator.get_state()
    second = crops(images, generator)
    generator.set_state(state)
    again = crops(images, generator)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], first[1])
    # The same number of draws whatever the configuration.
    generator.set_state(state)
    TwoCrops(IDENTITY, MEAN[channels], STD[channels])(images, generator)
    assert torch.equal(generator.get_state(), after)


@pytest.mark.parametrize(
    "active",
    [
        {"crop_scale": (0.2, 1.0)},
        {"jitter": (0.4, 0.0, 0.0, 0.0), "jitter_p": 1.0},
        {"jitter": (0.0, 0.4, 0.0, 0.0), "jitter_p": 1.0},
        {"jitter": (0.0, 0.0, 0.4, 0.0), "jitter_p": 1.0},
        {"jitter": (0.0, 0.0, 0.0, 0.4), "jitter_p": 1.0},
        {"blur_p": 1.0},
    ],
)
def test_every_sample_has_its_own_parameters(active):
    images = random_images(1, 3, 28).expand(6, -1, -1, -1)
    for view in views(dataclasses.replace(IDENTITY, **active), images):
        distances = torch.cdist(view.flatten(1), view.flatten(1))
        assert (distances + torch.eye(6) > 1e-3).all()


@pytest.mark.parametrize("field", ["flip_p", "gray_p", "blur_p", "solarize_p", "jitter_p"])
def test_probabilities_are_frequencies(field):
    active = {field: 0.3, "jitter": (0.4, 0.4, 0.4, 0.1)}
    n = 4000
    images = random_images(1, 3, 28).expand(n, -1, -1, -1)
    view, _ = views(dataclasses.replace(IDENTITY, **active, blur_sigma=(1.0, 2.0)), images)
    changed = ((view - unit(images)).abs().amax((1, 2, 3)) > 1e-4).float().mean()
    assert abs(changed - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)


@pytest.mark.parametrize(("images", "parts"), [(16, 2), (18, 3), (15, 5), (14, 7), (6, 6)])
def test_parts_of_a_batch_get_the_views_of_the_whole(images, parts):
    pixels = random_images(images, 3, 20)
    config = AugmentConfig(image_size=12, jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, gray_p=0.0)
    whole = views(config, pixels)
    each = [views(config, x, part=(i, parts)) for i, x in enumerate(pixels.chunk(parts))]
    for want, got in zip(whole, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(got), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "n, height, width, size", [(1, 1, 1, 1), (2, 2, 3, 5), (5, 37, 23, 13), (3, 64, 64, 2)]
)
def test_any_size_gives_finite_views(n, height, width, size, channels):
    images = random_images(n, channels, height, width)
    config = AugmentConfig(image_size=size, blur_p=1.0, jitter_p=1.0, solarize_p=0.5)
    aspect = torch.linspace(0.3, 3.0, n)
    for view in views(config, images, aspect=aspect):
        assert view.shape == (n, channels, size, size) and view.dtype == torch.float32
        assert torch.isfinite(view).all()
        assert view.min() >= -1e-6 and view.max() <= 1 + 1e-6


def test_the_two_views_may_have_distributions_of_their_own():
    images = random_images(4, 3, 28)
    crops = TwoCrops(IDENTITY, MEAN[3], STD[3], key_config=dataclasses.replace(IDENTITY, flip_p=1.0))
    query, key = crops(images, seeded())
    torch.testing.assert_close(query.flip(-1), key, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("image_size", 0, ValueError),
        ("image_size", 28.0, TypeError),
        ("crop_scale", (0.0, 1.0), ValueError),
        ("crop_scale", (0.5, 1.5), ValueError),
        ("crop_scale", (0.5, 0.2), ValueError),
        ("crop_scale", (0.5,), ValueError),
        ("crop_scale", 0.5, TypeError),
        ("crop_ratio", (-1.0, 1.0), ValueError),
        ("crop_ratio", (4 / 3, 3 / 4), ValueError),
        ("flip_p", 1.1, ValueError),
        ("jitter", (0.4, 0.4, 0.4, 0.6), ValueError),
        ("jitter", (-0.1, 0.4, 0.4, 0.1), ValueError),
        ("jitter", (0.4, 0.4, 0.4), ValueError),
        ("jitter_p", -0.1, ValueError),
        ("gray_p", float("nan"), ValueError),
        ("blur_p", "0.5", TypeError),
        ("blur_sigma", (0.0, 1.0), ValueError),
        ("solarize_p", 2.0, ValueError),
    ],
)
def test_config_names_the_offending_field(field, value, error):
    with pytest.raises(error, match=field):
        AugmentConfig(**{field: value})


def test_call_errors():
    crops = TwoCrops(IDENTITY, MEAN[3], STD[3])
    with pytest.raises(TypeError, match="images"):
        crops(torch.rand(2, 3, 8, 8), seeded())
    with pytest.raises(ValueError, match="images"):
        crops(random_images(2, 1, 8), seeded())
    with pytest.raises(ValueError, match="aspect"):
        crops(random_images(2, 3, 8), seeded(), aspect=torch.ones(3))
    for wrong in (0.0, -1.5, math.inf, math.nan):
        aspect, generator = torch.tensor([1.0, wrong]), seeded()
        with pytest.raises(ValueError, match=f"aspect must be finite and above 0, got {wrong} in row 1"):
            crops(random_images(2, 3, 8), generator, aspect=aspect)
        assert torch.equal(generator.get_state(), seeded().get_state())
        with pytest.raises(ValueError, match="aspect must be finite"):
            center_view(random_images(2, 3, 8), 8, MEAN[3], STD[3], aspect=aspect)
    with pytest.raises(ValueError, match=r"part must be \(index, parts\) .* got \(2, 2\)"):
        crops(random_images(2, 3, 8), seeded(), part=(2, 2))
    with pytest.raises(TypeError, match=r"mean must be made of numbers, got 0\.5"):
        TwoCrops(IDENTITY, 0.5, STD[3])
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32, .*got torch\.int8"):
        TwoCrops(IDENTITY, MEAN[3], STD[3], dtype=torch.int8)
    with pytest.raises(ValueError, match="std"):
        TwoCrops(IDENTITY, MEAN[3], (0.2, 0.0, 0.2))
    with pytest.raises(ValueError, match="size"):
        center_view(random_images(2, 3, 8), 0, MEAN[3], STD[3])


def test_jitter_is_drawn_within_its_ranges_and_in_every_order():
    n, strength = 20_000, (0.4, 1.5, 0.2, 0.1)
    amounts, order = draws.draw_jitter(torch.rand(n, draws.JITTER_DRAWS, generator=seeded()), strength, 0.8)
    none = torch.tensor([1.0, 1.0, 1.0, 0.0])
    on = (amounts != none).any(1)
    assert abs(on.float().mean() - 0.8) < 4 * math.sqrt(0.8 * 0.2 / n)
    lows, highs = torch.tensor([0.6, 0.0, 0.8, -0.1]), torch.tensor([1.4, 2.5, 1.2, 0.1])
    drawn = amounts[on]
    spread = (drawn - lows) / (highs - lows)
    assert spread.min() >= -1e-5 and spread.max() <= 1 + 1e-5
    assert (spread.mean(0) - 0.5).abs().max() < 0.01 and (spread.var(0) - 1 / 12).abs().max() < 0.005
    _, counts = order.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and (counts / n - 1 / 24).abs().max() < 5 * math.sqrt(1 / 24 / n)


def test_parameters_are_drawn_independently_and_within_their_ranges():
    config = AugmentConfig(
        224, (0.1, 0.5), (0.8, 1.25), 0.4, (0.4, 0.4, 0.4, 0.1), 0.7, 0.3, 0.6, (0.5, 2.0), 0.2
    )
    n = 20_000
    plain = dataclasses.replace(config, flip_p=0.0)
    drawn, unflipped = (draw_parameters(c, torch.full((n,), 1.1), seeded()) for c in (config, plain))
    left, top, width, height = drawn[:, reference.BOX].unbind(1)
    flipped = width < 0
    # What is mirrored is the same crop.
    box = torch.stack((torch.where(flipped, left + width, left), top, width.abs(), height), dim=1)
    torch.testing.assert_close(box, unflipped[:, reference.BOX], rtol=0, atol=1e-6)
    assert torch.equal(drawn[:, 4:], unflipped[:, 4:]) and drawn.dtype == torch.float32
    area, ratio = box[:, 2] * box[:, 3], box[:, 2] / box[:, 3] * 1.1
    jittered = drawn[:, 7] != 0
    gray, sigma, threshold = drawn[:, 8], drawn[:, reference.SIGMA], drawn[:, reference.THRESHOLD]
    blurred, solarized = sigma > 0, threshold == 0.5
    assert set(gray.tolist()) == {0.0, 1.0} and set(threshold.tolist()) == {0.5, 2.0}
    for chosen, p in ((flipped, 0.4), (jittered, 0.7), (gray == 0, 0.3), (blurred, 0.6), (solarized, 0.2)):
        assert abs(chosen.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    some = sigma[blurred]
    assert some.min() >= 0.5 and some.max() <= 2 and abs(some.mean() - 1.25) < 0.01 and some.max() > 1.99
    place = torch.stack((box[:, 0] / (1 - box[:, 2]), box[:, 1] / (1 - box[:, 3])))
    among = jittered & blurred
    values = torch.stack(
        (*place, area, ratio, flipped, gray, solarized, sigma, *drawn[:, 4:8].t(), *drawn[:, 9:13].t())
    )[:, among].double()
    related = torch.corrcoef(values) - torch.eye(len(values))
    related[-4:, -4:] = 0  # places in an order are not independent
    assert related.abs().max() < 5 / math.sqrt(int(among.sum()))
    chances = torch.stack([x.double() for x in (flipped, jittered, gray, blurred, solarized, *place)])
    assert (torch.corrcoef(chances) - torch.eye(7)).abs().max() < 5 / math.sqrt(n)


def test_the_shape_of_the_originals_counts():
    """Of squares that were 2 : 1 the crops are half as wide."""
    config = AugmentConfig(9, (0.2, 0.3), (1.0, 1.0))
    for aspect in (torch.full((50,), 2.0), torch.full((50,), 2.0, dtype=torch.float64)):
        box = draw_parameters(config, aspect, seeded())[:, reference.BOX]
        assert box.dtype == torch.float32
        torch.testing.assert_close(2 * box[:, 2].abs(), box[:, 3], rtol=1e-5, atol=0)
    images, options = random_images(50, 1, 24), dict(config=config, mean=MEAN[1], std=STD[1])
    wide = random_view(images, generator=seeded(), aspect=torch.full((50,), 2.0), **options)
    parameters = draw_parameters(config, torch.full((50,), 2.0), seeded())
    assert torch.equal(wide, moco_fast.augment(images, parameters, 9, [*MEAN[1]], [*STD[1]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_memory_format_of_the_views(dtype):
    images, config = random_images(4, 3, 28), AugmentConfig(image_size=9)
    crops = TwoCrops(config, MEAN[3], STD[3], dtype=dtype, memory_format=torch.channels_last)
    for got, want in zip(
        crops(images, seeded()), TwoCrops(config, MEAN[3], STD[3])(images, seeded()), strict=True
    ):
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, want.to(dtype), rtol=0.01, atol=0.01)


def test_random_view_is_a_view_of_two_crops():
    images = torch.randint(256, (6, 3, 12, 10), dtype=torch.uint8)
    config, mean, std = AugmentConfig(image_size=7), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    first, _ = TwoCrops(config, mean, std)(images, torch.Generator().manual_seed(4))
    assert torch.equal(random_view(images, config, mean, std, torch.Generator().manual_seed(4)), first)
    half = random_view(images[3:], config, mean, std, torch.Generator().manual_seed(4), part=(1, 2))
    assert half.shape == (3, 3, 7, 7)
    torch.testing.assert_close(
        half, random_view(images, config, mean, std, torch.Generator().manual_seed(4))[3:]
    )
