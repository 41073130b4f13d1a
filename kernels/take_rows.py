"""Rows in another order: out_i <- x[index_i], for rows of any type, as words of up to 8 bytes.

One launch packs a batch of images for an exchange between ranks, or brings one back into order. Traffic:
2 M B bytes for M rows of B.

Reference: moco_fast.reference.take_rows.  Tests: tests/test_take_rows.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moco_fast import reference

# Words of a row per program, and warps. Not measured on a GPU yet.
TILES = {"rows": (2048, 4)}

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@triton.jit
def _take_rows(
    x,  # (R, WIDTH) words
    index,  # (M,) int64
    out,  # (M, WIDTH)
    width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Rows along the first axis of the grid, which may be longest.
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + row)
    word = tl.load(x + source * width + col, mask=col < width)
    tl.store(out + row * width + col, word, mask=col < width)


def take_rows(
    x: Tensor,  # (R, ...), contiguous or channels_last
    index: Tensor,  # (M,)
    tiles: tuple[int, int] | None = None,
) -> Tensor:
    """See :func:`moco_fast.reference.take_rows`; ``tiles`` in place of the table's entry."""
    out = reference.empty_rows(x, index.shape[0])
    rows, taken = reference.flat_rows(x), reference.flat_rows(out)
    size = rows.shape[1] * x.element_size()
    word = next(bytes for bytes in WORDS if size % bytes == 0 and rows.data_ptr() % bytes == 0)
    width = size // word
    words, warps = tiles or TILES["rows"]
    block = min(words, triton.next_power_of_2(width))
    if len(index):
        _take_rows[(len(index), triton.cdiv(width, block))](
            rows.view(WORDS[word]), index.contiguous(), taken.view(WORDS[word]), width,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


@triton.jit
def _take_rows_of_peers(
    peers,  # (W,) int64: where every peer's rows begin
    index,  # (M,) int64, into the rows of all peers
    out,  # (M, WIDTH) words
    rows, width,
    BLOCK: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + row)
    x = tl.load(peers + source // rows).to(tl.pointer_type(WORD))
    word = tl.load(x + (source % rows) * width + col, mask=col < width)
    tl.store(out + row * width + col, word, mask=col < width)


def take_rows_of_peers(
    peers: Tensor,  # (W,) int64 addresses of (R, ...) such as out, readable from its device
    index: Tensor,  # (M,)
    rows: int,  # R
    out: Tensor,  # (M, ...), contiguous or channels_last
) -> None:
    """``out_i <- x[index_i]`` for x the rows of all peers, one after the other, wherever they lie."""
    taken = reference.flat_rows(out)
    size = taken.shape[1] * out.element_size()
    word = 8 if size % 8 == 0 else 1  # peers' memory begins on 8 bytes
    width = size // word
    words, warps = TILES["rows"]
    block = min(words, triton.next_power_of_2(width))
    _take_rows_of_peers[(len(index), triton.cdiv(width, block))](
        peers, index.contiguous(), taken.view(WORDS[word]), rows, width,
        BLOCK=block, WORD=tl.int64 if word == 8 else tl.uint8, num_warps=warps,
    )  # fmt: skip


CANDIDATES = {"rows": [(words, warps) for words in (256, 512, 1024, 2048, 4096) for warps in (1, 2, 4, 8)]}


def tune_case(key: str, pixels: int = 224, device: str = "cuda") -> Callable[[tuple], Callable[[], Tensor]]:
    """What bench/tune.py times: a batch of 256 uint8 images in another order."""
    x = torch.zeros(256, 3, pixels, pixels, dtype=torch.uint8, device=device)
    index = torch.randperm(256, device=device)
    return lambda tiles: lambda: take_rows(x, index, tiles)
