"""augment, two views of every image of a batch: MoCo v2's random crops, colour jitter, grayscale and blur.

The least traffic: what the crops hold, in uint8, and the views. The official way is that of MoCo's scripts,
one image after the other through torchvision's transforms; on float tensors it does the same steps, but for
the border of a crop, which it resizes without what lies beyond. PIL images are what the scripts' workers
have: uint8 between all steps; here with as many threads as torch.

Parameters are given to every peer, not drawn. Crops are of whole pixels, as PIL wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moco_fast
from bench import measure
from bench.case import NATIVE, OFFICIAL, OURS, REFERENCE, Case, Peer, bind, relative, serving
from moco_fast import reference
from moco_fast.data import AugmentConfig, draw_parameters

# N, C, side of the images, side of the views, dtype
Size = tuple[int, int, int, int, torch.dtype]
SIZES: dict[str, list[Size]] = {
    "cpu": [
        (32, 3, 256, 224, torch.float32),
        (128, 3, 32, 32, torch.float32),
        (256, 1, 28, 28, torch.float32),
    ],
    "cuda": [(256, 3, 256, 224, torch.bfloat16), (512, 3, 32, 32, torch.bfloat16)],
}
QUICK: list[Size] = [(6, 3, 20, 16, torch.float32)]
PIL = "torchvision on PIL images"
PEERS = [NATIVE, REFERENCE, PIL, OFFICIAL]
CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

Run = Callable[[Tensor, Sequence[Tensor], int, torch.dtype], list[Tensor]]  # images, parameters of two views


def ours(
    backend: str, images: Tensor, parameters: Sequence[Tensor], size: int, dtype: torch.dtype
) -> list[Tensor]:
    mean, std, layout = *statistics(images), torch.channels_last
    with moco_fast.use_backend(backend):
        return [moco_fast.augment(images, p, size, mean, std, dtype, layout) for p in parameters]


def statistics(images: Tensor) -> tuple[list[float], list[float]]:
    return MEAN[: images.shape[1]], STD[: images.shape[1]]


def one_by_one(images: Tensor, parameters: Sequence[Tensor], size: int, dtype: torch.dtype) -> list[Tensor]:
    """torchvision's functions on float tensors."""
    from torchvision.transforms.v2 import functional as tv

    mean, std = statistics(images)
    taps = 2 * reference.blur_radius(size) + 1

    def view(image: Tensor, row: list[float]) -> Tensor:
        x = transformed(tv, image.float() / 255, row, size)
        if row[reference.SIGMA] > 0:
            x = tv.gaussian_blur(x, [taps, taps], [row[reference.SIGMA]] * 2)
        return tv.normalize(x, mean, std).to(dtype)

    rows = [p.tolist() for p in parameters]  # known on the host, where the official code draws them
    return [torch.stack([view(*pair) for pair in zip(images, r, strict=True)]) for r in rows]


def with_pil(images: Tensor, parameters: Sequence[Tensor], size: int, dtype: torch.dtype) -> list[Tensor]:
    """The same on PIL images, with its approximation of a Gaussian."""
    from PIL import ImageFilter
    from torchvision.transforms.v2 import functional as tv

    mean, std = statistics(images)

    def view(image: Tensor, row: list[float]) -> Tensor:
        x = transformed(tv, tv.to_pil_image(image), row, size)
        if row[reference.SIGMA] > 0:
            x = x.filter(ImageFilter.GaussianBlur(row[reference.SIGMA]))
        return tv.normalize(tv.to_dtype(tv.pil_to_tensor(x), torch.float32, scale=True), mean, std).to(dtype)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return [torch.stack(list(pool.map(view, images, p.tolist()))) for p in parameters]


def transformed(tv, image, row: list[float], size: int):
    """Crop, flip and colours of an image, a tensor or PIL's."""
    height, width = tv.get_size(image)
    left, top, across, down = row[reference.BOX]
    if mirrored := across < 0:
        left, across = left + across, -across
    places = [round(v) for v in (top * height, left * width, down * height, across * width)]
    x = tv.resized_crop(image, *places, [size, size], antialias=True)
    x = tv.horizontal_flip(x) if mirrored else x
    change = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    coloured = tv.get_num_channels(image) == 3
    for op in map(int, row[reference.ORDER]):
        amount, none = row[reference.AMOUNTS][op], 0 if op == reference.HUE else 1
        if amount == none or (op >= reference.SATURATION and not coloured):
            continue
        x = tv.rgb_to_grayscale(x, 3) if op == reference.GRAY else change[op](x, amount)
    return x


def smooth_images(n: int, channels: int, side: int, generator: torch.Generator) -> Tensor:
    """As in photographs neighbours are alike, which noise is not, and colours seldom at their ends."""
    coarse = torch.rand(n, channels, max(2, side // 8), max(2, side // 8), generator=generator)
    fine = torch.rand(n, channels, side, side, generator=generator)
    x = 0.9 * F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1) + 0.1 * fine
    return (x * 255).round().byte()


@cache
def case(size: Size, device: torch.device = CPU) -> Case:
    """The case of one size."""
    n, channels, side, side_of_view, dtype = size
    generator = torch.Generator().manual_seed(0)
    on_cpu, config = smooth_images(n, channels, side, generator), AugmentConfig(image_size=side_of_view)
    drawn = [draw_parameters(config, torch.ones(n), generator) for _ in range(2)]
    for parameters in drawn:
        parameters[:, reference.BOX] = (parameters[:, reference.BOX] * side).round() / side
    images, parameters = on_cpu.to(device), [p.to(device) for p in drawn]
    mean, std = statistics(images)
    want = [
        reference.augment(on_cpu, p.double(), side_of_view, mean, std, torch.float64).to(device)
        for p in drawn
    ]

    def errors(run: Run) -> dict[str, float]:
        got = run(images, parameters, side_of_view, dtype)
        return {f"view {i + 1}": relative(a, b) for i, (a, b) in enumerate(zip(got, want, strict=True))}

    def peer(run: Run, tolerance: float) -> Peer:
        return bind(run, errors, images, parameters, side_of_view, dtype, tolerance=tolerance)

    backends, absent = serving("augment", parameters)
    exact = 1e-4 if dtype == torch.float32 else 1e-2
    peers = {f"{OURS} {backend}": peer(partial(ours, backend), exact) for backend in backends}
    if device.type == "cpu":
        peers[PIL] = peer(with_pil, 0.1)
    peers[OFFICIAL] = peer(one_by_one, 0.05)
    label = (
        f"two crops of {n}, {channels}x{side}x{side} to {side_of_view}, {str(dtype).removeprefix('torch.')}"
    )
    read = sum(float((p[:, 2] * p[:, 3]).abs().sum()) for p in drawn) * channels * side**2
    written = 2.0 * n * channels * side_of_view**2 * dtype.itemsize
    return Case("augment", label, peers, 0.0, read + written, absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per size, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else SIZES[device.type]:
        yield case.__wrapped__(size, device)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES["cpu"], ids=str)
def test_augment(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
