"""augment: every backend, step by step against torchvision, as a whole against the reference in float64."""

import math

import pytest
import torch
from conftest import with_threads

import moco_fast
from moco_fast import reference
from moco_fast.ops.views import _augment

tv = pytest.importorskip("torchvision.transforms.v2.functional")

OP = "augment"

MEAN = {1: [0.3], 3: [0.5, 0.4, 0.3]}
STD = {1: [0.2], 3: [0.2, 0.3, 0.25]}
NAMES = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY = range(5)
# C, H, W, S: one pixel, enlarged, reduced, views of several tiles and of no whole vector.
SIZES = [
    (3, 1, 1, 1),
    (1, 1, 3, 4),
    (3, 5, 7, 12),
    (1, 28, 28, 28),
    (3, 37, 23, 13),
    (3, 40, 64, 50),
    (3, 90, 70, 16),
]
FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_images(n, channels, height, width=None):
    return torch.randint(0, 256, (n, channels, height, width or height), dtype=torch.uint8)


def unit(images):
    return images.float() / 255


def row(box=(0, 0, 1, 1), amounts=(1, 1, 1, 0, 1), order=range(5), sigma=0, threshold=2):
    """A row of parameters; without arguments the view is the image."""
    return [*box, *amounts, *order, sigma, threshold]


def view(images, *rows, size=None, **options):
    """Views by the rows, the last one for all further images; from 0 to 1 unless told otherwise."""
    channels = images.shape[1]
    rows = [*rows, *[rows[-1]] * (len(images) - len(rows))]
    options = {"mean": [0.0] * channels, "std": [1.0] * channels} | options
    return moco_fast.augment(
        images, torch.tensor(rows, dtype=torch.float32), size or images.shape[3], **options
    )


def random_parameters(n):
    """Everything at once, and everything left out for some."""
    u = torch.rand(n, 9)
    width, height = 0.2 + 0.8 * u[:, 0], 0.2 + 0.8 * u[:, 1]
    left, top = (1 - width) * u[:, 2], (1 - height) * u[:, 3]
    mirrored = u[:, 4] < 0.5
    box = torch.where(mirrored, left + width, left), top, torch.where(mirrored, -width, width), height
    amounts = torch.rand(n, 5) * 1.6 + 0.2
    amounts[:, HUE] = torch.rand(n) * 2 - 1
    amounts[:, GRAY] = torch.rand(n).round()
    kept = torch.rand(n, 5) < 0.2
    amounts = torch.where(kept, torch.tensor(row()[4:9]).float(), amounts)
    order = torch.rand(n, 5).argsort(1)
    sigma = (u[:, 5] * 3 - 0.6).clamp(min=0)
    threshold = torch.where(u[:, 6] < 0.5, 0.5, 2.0)
    return torch.cat([torch.stack(box, 1), amounts, order, sigma[:, None], threshold[:, None]], 1)


def exactly(images, parameters, size, mean, std):
    """In float64."""
    return reference.augment(images, parameters.double(), size, mean, std, torch.float64)


def assert_as_exact_as_eager(
    got, images, parameters, size, half_ulp=lambda dtype: torch.finfo(dtype).eps / 2
):
    """Twice the error of the formula in fp32, one rounding of the result and a little for sums."""
    statistics = MEAN[images.shape[1]], STD[images.shape[1]]
    want = exactly(images, parameters, size, *statistics)
    eager = reference.augment(images, parameters, size, *statistics).to(got.dtype)
    assert torch.isfinite(got).all()
    limit = 2 * (eager.double() - want).abs().max() + half_ulp(got.dtype) * want.abs().max() + 5e-6
    assert (got.double() - want).abs().max() <= limit


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "height", "width", "size"), SIZES)
def test_against_float64(backend, half_ulp, channels, height, width, size, dtype, memory_format):
    images, parameters = random_images(5, channels, height, width), random_parameters(5)
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        got = moco_fast.augment(images, parameters, size, MEAN[channels], STD[channels], dtype, memory_format)
    finally:
        torch.use_deterministic_algorithms(False)
    assert got.shape == (5, channels, size, size) and got.dtype == dtype
    assert got.is_contiguous(memory_format=memory_format)
    assert_as_exact_as_eager(got, images, parameters, size, half_ulp)


def test_large_views(isa):
    """Of the usual size, from larger images; where the blur has taps enough to leave some out."""
    images, parameters = random_images(6, 3, 300, 256), random_parameters(6)
    parameters[:, reference.SIGMA] = torch.tensor([0.3, 0.6, 1.0, 1.3, 1.6, 2.0])
    got = moco_fast.augment(images, parameters, 224, MEAN[3], STD[3])
    assert_as_exact_as_eager(got, images, parameters, 224)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_instruction_set(isa, channels):
    for size in (1, 5, 16, 33):
        images, parameters = random_images(40, channels, 31, 45), random_parameters(40)
        for dtype in DTYPES:
            got = moco_fast.augment(images, parameters, size, MEAN[channels], STD[channels], dtype)
            assert_as_exact_as_eager(got, images, parameters, size)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_itself(backend, channels):
    images = random_images(3, channels, 28)
    got = view(images, row(), mean=MEAN[channels], std=STD[channels])
    want = tv.normalize(unit(images), MEAN[channels], STD[channels])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.7])
@pytest.mark.parametrize(("op", "channels"), [(0, 1), (0, 3), (1, 1), (1, 3), (2, 3)])
def test_blends_match_torchvision(backend, op, channels, factor):
    images = random_images(4, channels, 12)
    amounts = [1, 1, 1, 0, 1]
    amounts[op] = factor
    want = getattr(tv, NAMES[op])(unit(images), factor)
    torch.testing.assert_close(view(images, row(amounts=amounts)), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.03, 0.5])
def test_hue_matches_torchvision(backend, shift):
    images = random_images(4, 3, 16)
    images[0] = images[0, :1]  # grey: no hue to turn
    images[1, 1] = images[1, 0]  # ties between channels
    images[2, 1] = images[2, 2]
    got, want = view(images, row(amounts=(1, 1, 1, shift, 1))), tv.adjust_hue(unit(images), shift)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_orders(backend):
    """All of them, and grayscale wherever it is among them."""
    images = random_images(1, 3, 8).expand(30, -1, -1, -1)
    factors = (1.32, 0.76, 1.24, 0.04)
    orders = [torch.randperm(5).tolist() for _ in images]
    gray = [i % 3 == 0 for i in range(len(images))]
    rows = [
        row(amounts=(*factors, 0 if g else 1), order=order) for g, order in zip(gray, orders, strict=True)
    ]
    for got, g, order in zip(view(images, *rows), gray, orders, strict=True):
        want = unit(images[0])
        for op in order:
            if op != GRAY:
                want = getattr(tv, NAMES[op])(want, factors[op])
            elif g:
                want = tv.rgb_to_grayscale(want, 3)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "taps"), [(8, 3), (28, 3), (50, 5), (96, 11), (224, 23)])
def test_blur_matches_torchvision(backend, size, taps):
    images = random_images(5, 1, size)
    sigmas = (0.1, 0.7, 1.5, 4e8, 0)
    for image, got, sigma in zip(images, view(images, *(row(sigma=s) for s in sigmas)), sigmas, strict=True):
        want = tv.gaussian_blur(unit(image), taps, sigma) if sigma else unit(image)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_grayscale_and_solarise_match_torchvision(backend):
    images = random_images(4, 3, 28)
    got = view(images, row(amounts=(1, 1, 1, 0, 0)))
    torch.testing.assert_close(got, tv.rgb_to_grayscale(unit(images), 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        view(images, row(threshold=0.5)), tv.solarize(unit(images), 0.5), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "height, width, size", [(28, 28, 28), (40, 30, 17), (100, 64, 24), (7, 5, 12), (1, 1, 4)]
)
def test_resize_matches_torchvision_with_antialiasing(backend, height, width, size):
    images = random_images(2, 3, height, width)
    got = view(images, row(), row(box=(1, 0, -1, 1)), size=size)
    want = tv.resize(unit(images), [size, size], antialias=True)
    want[1] = want[1].flip(-1)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_whole_pixel_crop_is_the_slice(backend):
    images = random_images(1, 1, 32)
    got = view(images, row(box=(4 / 32, 10 / 32, 16 / 32, 16 / 32)), size=16)
    torch.testing.assert_close(got, unit(images)[:, :, 10:26, 4:20], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "strided",
    [
        lambda images: images.contiguous(memory_format=torch.channels_last),
        lambda images: images[:, :1].expand(-1, 3, -1, -1),
        lambda images: images.transpose(2, 3),
        lambda images: images[:, :, 3:20, 5:],
        lambda images: images[:, :, ::2, ::3],
        lambda images: images[::2].flip(1),
    ],
)
def test_strides(backend, strided):
    images = strided(random_images(6, 3, 24, 30))
    parameters = random_parameters(len(images))
    got = moco_fast.augment(images, parameters, 11, MEAN[3], STD[3])
    want = moco_fast.augment(images.contiguous(), parameters, 11, MEAN[3], STD[3])
    assert torch.equal(got, want)
    gaps = torch.stack([parameters, torch.full_like(parameters, math.nan)], 2)[..., 0]
    assert torch.equal(moco_fast.augment(images, gaps, 11, MEAN[3], STD[3]), want)


@pytest.mark.parametrize("dimension", [1, 3], ids=["channels", "columns"])
def test_strides_beyond_32_bits(backend, device, dimension):
    """In memory that is for the most part never touched."""
    if torch.cuda.is_available() and device == "cuda":
        assert torch.cuda.mem_get_info()[0] > 5 << 30, "needs 5 GB of free memory"
    strides = [1, 1, 4, 8]
    strides[dimension] = 2**30 + 5
    far = torch.empty(2 * strides[dimension] + 100, dtype=torch.uint8).as_strided((1, 3, 2, 3), strides)
    far.copy_(random_images(1, 3, 2, 3))
    got = moco_fast.augment(far, torch.tensor([row()]).float(), 5, MEAN[3], STD[3])
    want = moco_fast.augment(far.contiguous(), torch.tensor([row()]).float(), 5, MEAN[3], STD[3])
    assert torch.equal(got, want)


def test_autocast_does_not_matter(backend, device):
    images, parameters = random_images(3, 3, 12), random_parameters(3)
    want = moco_fast.augment(images, parameters, 9, MEAN[3], STD[3])
    with torch.autocast("cuda" if device == "cuda" else "cpu", dtype=torch.bfloat16):
        got = moco_fast.augment(images, parameters, 9, MEAN[3], STD[3])
    assert torch.equal(got, want)


def test_many_turns_of_the_hue(backend):
    images = random_images(3, 3, 12)
    got = view(images, *(row(amounts=(1, 1, 1, turns, 1)) for turns in (1000.25, -999.75, 0.25)))
    want = tv.adjust_hue(unit(images), 0.25)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_bits_do_not_depend_on_threads_batch_or_run(backend):
    images, parameters = random_images(9, 3, 26, 31), random_parameters(9)
    arguments = 20, MEAN[3], STD[3]
    (whole,) = with_threads(lambda: (moco_fast.augment(images, parameters, *arguments),))
    alone = [moco_fast.augment(images[i : i + 1], parameters[i : i + 1], *arguments) for i in range(9)]
    if backend == "reference":  # whose matrix products are not the same for one
        torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=1e-5)
    else:
        assert torch.equal(torch.cat(alone), whole)


def test_float64(backend):
    """The reference serves it, unless another backend was asked for."""
    images, parameters = random_images(2, 3, 9), random_parameters(2)
    if backend == "reference":
        got = moco_fast.augment(images, parameters, 7, MEAN[3], STD[3], torch.float64)
        assert torch.equal(got, exactly(images, parameters, 7, MEAN[3], STD[3]))
    else:
        with pytest.raises(RuntimeError, match=r"no torch\.float64 kernel"):
            moco_fast.augment(images, parameters, 7, MEAN[3], STD[3], torch.float64)


def test_opcheck_and_compile(backend):
    images, parameters = random_images(2, 3, 9), random_parameters(2)
    torch.library.opcheck(_augment, (images, parameters, 7, MEAN[3], STD[3], torch.bfloat16, True))
    arguments = images, parameters, 7, MEAN[3], STD[3], torch.bfloat16, torch.channels_last
    compiled = torch.compile(moco_fast.augment, fullgraph=True)
    compiled(images, parameters, 7, [0.1, 0.2, 0.3], STD[3])  # what changes becomes a symbol
    got = compiled(*arguments)
    assert torch.equal(got, moco_fast.augment(*arguments))
    assert got.is_contiguous(memory_format=torch.channels_last) and not got.requires_grad


@pytest.mark.gpu
def test_in_a_cuda_graph():
    with torch.device("cuda"), moco_fast.use_backend("triton"):
        images, parameters = random_images(4, 3, 40), random_parameters(4)
        arguments = 32, MEAN[3], STD[3], torch.bfloat16, torch.channels_last
        moco_fast.augment(images, parameters, *arguments)  # compiled before anything is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = moco_fast.augment(images, parameters, *arguments)
        images.copy_(random_images(4, 3, 40))
        parameters.copy_(random_parameters(4))
        graph.replay()
        assert torch.equal(got, moco_fast.augment(images, parameters, *arguments))


@pytest.mark.parametrize(
    "bad",
    [
        {"box": (-0.2, 0, 1, 1)},
        {"box": (10, 10, 100, 100)},  # pixels
        {"box": (0.4, 0, -0.5, 1)},
        {"order": (0, 1, 2, 3, 3)},
        {"sigma": math.inf},
    ],
)
def test_bad_values(bad):
    """Of the second image."""
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    what = "crops within the image" if "box" in bad else "a permutation" if "order" in bad else "be finite"
    with pytest.raises(
        ValueError, match=rf"parameters must .*{what}.*" + ("" if "sigma" in bad else "row 1")
    ):
        view(images, row(), row(**bad))


def test_the_example_of_the_docstring():
    images, mean, std = random_images(2, 3, 20), MEAN[3], STD[3]
    lines = [line.split(">>> ")[1] for line in moco_fast.augment.__doc__.splitlines() if ">>> " in line]
    names = {"images": images, "mean": mean, "std": std, "torch": torch, "moco_fast": moco_fast}
    exec("\n".join(lines), names)
    want = tv.resize(unit(images), [224, 224], antialias=True)
    torch.testing.assert_close(names["view"], tv.normalize(want, mean, std), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 4)}, TypeError, "images must be a uint8 tensor, got torch.float32"),
        ({"images": [1]}, TypeError, "images must be a uint8 tensor, got <class 'list'>"),
        ({"images": torch.zeros(2, 2, 4, 4).byte()}, ValueError, r"images must be \(N, C, H, W\), C 1 or 3"),
        ({"images": torch.zeros(0, 3, 4, 4).byte()}, ValueError, "images must be .* not empty"),
        ({"parameters": torch.zeros(2, 16).half()}, TypeError, "parameters must be torch.float32 or"),
        ({"parameters": torch.zeros(2, 15)}, ValueError, r"parameters must have shape \(2, 16\).*\(2, 15\)"),
        ({"parameters": torch.zeros(2, 16)}, ValueError, r"permutation of 0 to 4 .* got \[0.0, .* in row 0"),
        ({"parameters": torch.full((2, 16), math.nan)}, ValueError, "parameters must be finite"),
        ({"parameters": torch.zeros(2, 16, device="meta")}, ValueError, "parameters is on meta, but images"),
        ({"size": 16385}, ValueError, "size must be at most 16384, got 16385"),
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": 2.0}, TypeError, "size must be an integer, got float 2.0"),
        ({"mean": [0.0]}, ValueError, r"mean must have 3 finite value\(s\), got \[0.0\]"),
        ({"mean": ["a"] * 3}, TypeError, "mean must be made of numbers"),
        ({"std": [1.0, 0.0, 1.0]}, ValueError, "std must be above 0"),
        ({"std": [1.0, math.inf, 1.0]}, ValueError, "std must have 3 finite"),
        ({"dtype": torch.int32}, TypeError, "dtype must be torch.float32, .* got torch.int32"),
        (
            {"memory_format": torch.preserve_format},
            TypeError,
            "memory_format must be torch.contiguous_format",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    good = {"images": images, "parameters": torch.tensor([row()] * 2).float(), "size": 4}
    with pytest.raises(error, match=message):
        moco_fast.augment(**(good | {"mean": [0.0] * 3, "std": [1.0] * 3} | changes))
