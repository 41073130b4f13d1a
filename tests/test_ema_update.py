"""ema_update_: every backend against the formula, bitwise in fp32, and what it leaves alone."""

import pytest
import torch

import moco_fast
from moco_fast import native, ops

OP = "ema_update_"
SHAPES = [(), (1,), (5,), (37, 3), (64, 3, 7, 7), (257, 129), (0, 4), (70_001,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["one pass", "by lists"], autouse=True)
def reads_tensors(request, monkeypatch):
    """Both ways from tensors to addresses: torch >= 2.10 has the first, older ones only the second."""
    if request.param and native.unavailable() is None and hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert native._READS_TENSORS
    monkeypatch.setattr(native, "_READS_TENSORS", request.param and native._READS_TENSORS)


def pairs(dtype=torch.float32, source_dtype=None):
    return (
        [torch.randn(shape).to(dtype) for shape in SHAPES],
        [torch.randn(shape).to(source_dtype or dtype) for shape in SHAPES],
    )


@pytest.mark.parametrize("m", [0.0, 0.5, 0.99, 0.999, 1.0])
def test_bitwise_equal_to_the_official_loop(backend, m):
    targets, sources = pairs()
    want = [t * m + s * (1.0 - m) for t, s in zip(targets, sources, strict=True)]
    moco_fast.ema_update_(targets, sources, m)
    for got, expected in zip(targets, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, dtype, source_dtype):
    targets, sources = pairs(dtype, source_dtype)
    want = [t.double() * 0.9 + s.double() * 0.1 for t, s in zip(targets, sources, strict=True)]
    moco_fast.ema_update_(targets, sources, 0.9)
    for got, expected in zip(targets, want, strict=True):
        assert got.dtype == dtype
        # one rounding to the target's dtype, besides that of fp32 arithmetic
        torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-15, atol=2e-7)


@pytest.mark.parametrize(
    "m", [torch.tensor(0.99), torch.tensor(0.99, dtype=torch.float64)], ids=["fp32", "fp64"]
)
def test_tensor_momentum(backend, m):
    targets, sources = pairs()
    want = [t.double() * 0.99 + s.double() * 0.01 for t, s in zip(targets, sources, strict=True)]
    moco_fast.ema_update_(targets, sources, m)
    for got, expected in zip(targets, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-7)


def test_any_memory_layout(backend):
    """Channels-last weights, transposes, and slices whose gaps must not be touched."""
    base = torch.randn(6, 20)
    targets = [
        torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(7, 4).t(),
        base[:, ::2],
    ]
    sources = [torch.randn(8, 3, 5, 5), torch.randn(4, 7), torch.randn(6, 10)]
    want = [t * 0.9 + s * (1 - 0.9) for t, s in zip(targets, sources, strict=True)]
    gaps = base[:, 1::2].clone()
    moco_fast.ema_update_(targets, sources, 0.9)
    for got, expected in zip(targets, want, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(base[:, 1::2], gaps)


def test_sources_may_be_parameters(backend):
    source = torch.nn.Parameter(torch.ones(3))
    target = torch.zeros(3)
    moco_fast.ema_update_([target], [source], 0.25)
    assert target.tolist() == [0.75] * 3 and not target.requires_grad and source.grad is None


def test_autograd_notices_the_write(backend):
    """The version counter must move, or backward would silently use the new values."""
    target, x = torch.randn(3), torch.randn(3, requires_grad=True)
    y = (x * target).sum()
    moco_fast.ema_update_([target], [torch.ones(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_opcheck_and_compile(backend):
    targets, sources = pairs()
    torch.library.opcheck(ops._ema_update_, (targets, sources, torch.tensor(0.9, dtype=torch.float64)))
    want = [t.clone() for t in targets]
    moco_fast.ema_update_(want, sources, 0.9)

    @torch.compile(fullgraph=True)
    def step(targets, sources):
        moco_fast.ema_update_(targets, sources, 0.9)
        return targets[1] + 1

    assert torch.equal(step(targets, sources), want[1] + 1)
    for got, expected in zip(targets, want, strict=True):
        assert torch.equal(got, expected)


def test_dtypes_without_a_kernel_go_to_the_reference(backend):
    targets, source = [torch.zeros(3), torch.zeros(2)], torch.ones(2).to(torch.float8_e4m3fn)
    moco_fast.ema_update_(targets, [torch.ones(3), source], 0.75)
    assert targets[0].tolist() == [0.25] * 3 and targets[1].tolist() == [0.25] * 2


def test_default_device_and_dtype_do_not_matter(backend):
    target, source = torch.zeros(3), torch.ones(3)
    with torch.device("meta"):
        moco_fast.ema_update_([target], [source], 0.75)
    assert target.tolist() == [0.25] * 3


def test_empty_list(backend):
    moco_fast.ema_update_([], [], 0.9)


@pytest.mark.parametrize(
    ("targets", "sources", "m", "error", "message"),
    [
        ([torch.zeros(3)], [], 0.9, ValueError, "got 0 sources, 1 targets"),
        ([torch.zeros(3)], [torch.zeros(4)], 0.9, ValueError, r"sources\[0\].*\(3,\), got \(4,\)"),
        ([torch.zeros(3)], [torch.zeros(3, device="meta")], 0.9, ValueError, r"sources\[0\] is on meta"),
        ([torch.zeros(3, dtype=torch.int32)], [torch.zeros(3)], 0.9, TypeError, r"targets\[0\].*int32"),
        ([torch.zeros(3), 4], [torch.zeros(3)] * 2, 0.9, TypeError, r"targets\[1\] must be a torch.Tensor"),
        (
            [torch.zeros(3, requires_grad=True)],
            [torch.zeros(3)],
            0.9,
            ValueError,
            r"targets\[0\] requires grad",
        ),
        ([torch.zeros(3)], [torch.ones(3)], 1.5, ValueError, r"m must be in \[0, 1\], got 1.5"),
        ([torch.zeros(3)], [torch.ones(3)], -0.1, ValueError, r"m must be in \[0, 1\], got -0.1"),
        ([torch.zeros(3)], [torch.ones(3)], float("nan"), ValueError, "m must be in .*nan"),
        ([torch.zeros(3)], [torch.ones(3)], "0.9", TypeError, "m must be a number, got str"),
        ([torch.zeros(3)], [torch.ones(3)], torch.tensor(2.0), ValueError, r"m must be in \[0, 1\], got 2.0"),
        ([torch.zeros(3)], [torch.ones(3)], torch.ones(1), TypeError, "m must be a number or a 0-d"),
    ],
)
def test_bad_arguments(targets, sources, m, error, message):
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in targets]
    with pytest.raises(error, match=message):
        moco_fast.ema_update_(targets, sources, m)
    for was, now in zip(before, targets, strict=True):
        assert torch.equal(was, now) if isinstance(was, torch.Tensor) else was == now
