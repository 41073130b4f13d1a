"""Views of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moco_fast import reference
from moco_fast.native import compiled
from moco_fast.native.compiled import DTYPES


def augment(
    images: Tensor,
    parameters: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """See :func:`moco_fast.reference.augment`."""
    if images.stride(3) != 1:
        images = images.contiguous()
    parameters = parameters.contiguous()
    out = reference.empty_views(images, size, dtype, channels_last)
    compiled._C.augment(
        images.data_ptr(), tuple(images.shape), images.stride()[:3], parameters.data_ptr(), size, tuple(mean),
        tuple(std), DTYPES[dtype], channels_last, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
