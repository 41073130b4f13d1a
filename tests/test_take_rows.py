"""take_rows: every backend against indexing, bit for bit, for rows of any type in any memory format."""

import math

import pytest
import torch

import moco_fast
from moco_fast.ops.rows import _take_rows

OP = "take_rows"

DTYPES = [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]


def rows_of(*shape, dtype=torch.float32):
    values = torch.randint(0, 256, shape)
    return (values > 127) if dtype == torch.bool else values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 7), (37, 3, 9, 11), (6, 4, 2, 3, 2)], ids=str)
def test_equals_indexing(backend, shape, dtype):
    x = rows_of(*shape, dtype=dtype)
    for count in (1, 3, 2 * shape[0] + 1):
        index = torch.randint(0, shape[0], (count,))
        got = moco_fast.take_rows(x, index)
        assert got.dtype == dtype and torch.equal(got, x[index])


def test_rows_of_many_words(backend):
    """More than one program per row."""
    x = rows_of(3, 40_001)
    assert torch.equal(moco_fast.take_rows(x, torch.tensor([2, 0])), x[[2, 0]])


def test_rows_of_many_pages(backend):
    """So much that it is written into huge pages, where there are any."""
    x = rows_of(7, 1_300_001, dtype=torch.uint8)
    index = torch.tensor([6, 2, 0, 5, 1])
    assert torch.equal(moco_fast.take_rows(x, index), x[index])


def test_memory_formats(backend):
    images = rows_of(4, 3, 8, 6, dtype=torch.uint8)
    index = torch.tensor([3, 3, 0])
    for x, strides in [
        (images.contiguous(memory_format=torch.channels_last), (144, 1, 18, 3)),
        (images.transpose(2, 3), (144, 48, 8, 1)),  # made contiguous
        (images[:, 1:], (96, 48, 6, 1)),
        (images.flatten()[1:].unflatten(0, (25, 23)), (23, 1)),  # starts at an odd address
    ]:
        got = moco_fast.take_rows(x, index)
        assert torch.equal(got, x[index]) and got.stride() == strides


def test_an_index_of_any_stride(backend):
    x, index = rows_of(7, 5), torch.tensor([6, 0, 2, 0, 5, 0])[::2]
    assert torch.equal(moco_fast.take_rows(x, index), x[index])


def test_triton_words_begin_where_rows_do(triton_device):
    from moco_fast.kernels import take_rows as kernel

    memory = torch.zeros(81, dtype=torch.uint8, device=triton_device)
    for begin, shape, word in [
        (0, (10, 8), torch.int64),
        (4, (9, 8), torch.int32),
        (2, (9, 8), torch.int16),
        (1, (10, 8), torch.uint8),
        (0, (9, 6), torch.int16),
    ]:
        rows = memory[begin : begin + math.prod(shape)].view(shape)
        assert kernel._word(rows) == word, (begin, shape)


def test_no_rows_taken(backend):
    got = moco_fast.take_rows(rows_of(3, 4), torch.zeros(0, dtype=torch.int64))
    assert got.shape == (0, 4)


def test_opcheck_and_compile(backend):
    x = rows_of(5, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    index = torch.tensor([4, 1, 1])
    torch.library.opcheck(_take_rows, (x, index))
    got = torch.compile(moco_fast.take_rows, fullgraph=True)(x, index)
    assert torch.equal(got, x[index]) and got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(())}, ValueError, "x must hold at least one row"),
        ({"x": torch.zeros(3, 0)}, ValueError, "x must hold at least one row"),
        ({"index": torch.zeros(2)}, TypeError, r"index must be an int64 tensor.*got torch.float32 \(2,\)"),
        ({"index": torch.zeros(2, 1).long()}, TypeError, "index must be an int64 tensor of one dimension"),
        ({"index": 1}, TypeError, "index must be an int64 tensor.*got int"),
        ({"index": torch.tensor([0, 3])}, ValueError, r"index must be in \[0, 3\), got 0 to 3"),
        ({"index": torch.tensor([-1])}, ValueError, r"index must be in \[0, 3\), got -1 to -1"),
        ({"x": torch.zeros(3, device="meta")}, ValueError, "index is on cpu, but x is on meta"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        moco_fast.take_rows(**({"x": torch.zeros(3, 2), "index": torch.tensor([0])} | changes))
