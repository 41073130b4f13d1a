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

WORDS = {torch.int64: tl.int64, torch.int32: tl.int32, torch.int16: tl.int16, torch.uint8: tl.uint8}


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
    rows = reference.flat_rows(x)
    word = _word(rows)
    source, taken = rows.view(word), reference.flat_rows(out).view(word)
    if len(index):
        grid, options = _launch(len(index), taken.shape[1], tiles)
        _take_rows[grid](source, index.contiguous(), taken, taken.shape[1], **options)
    return out


def _word(rows: Tensor) -> torch.dtype:  # (R, values)
    """The largest word that rows consist of and begin on."""
    size = rows.shape[1] * rows.element_size()
    return next(w for w in WORDS if size % w.itemsize == 0 and rows.data_ptr() % w.itemsize == 0)


def _launch(count: int, width: int, tiles: tuple[int, int] | None) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and options for so many rows of so many words."""
    words, warps = tiles or TILES["rows"]
    block = min(words, triton.next_power_of_2(width))
    return (count, triton.cdiv(width, block)), {"BLOCK": block, "num_warps": warps}


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
    rows_out = reference.flat_rows(out)
    word = _word(rows_out)  # peers' memory begins on words of any size
    taken = rows_out.view(word)
    grid, options = _launch(len(index), taken.shape[1], None)
    _take_rows_of_peers[grid](
        peers, index.contiguous(), taken, rows, taken.shape[1], WORD=WORDS[word], **options
    )


CANDIDATES = {"rows": [(words, warps) for words in (256, 512, 1024, 2048, 4096) for warps in (1, 2, 4, 8)]}


def tune_case(key: str, pixels: int = 224, device: str = "cuda") -> Callable[[tuple], Callable[[], Tensor]]:
    """What bench/tune.py times: a batch of 256 uint8 images in another order."""
    x = torch.zeros(256, 3, pixels, pixels, dtype=torch.uint8, device=device)
    index = torch.randperm(256, device=device)
    return lambda tiles: lambda: take_rows(x, index, tiles)
