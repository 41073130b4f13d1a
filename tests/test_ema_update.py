"""ema_update_: every backend against the formula, bitwise in fp32, and what it leaves alone."""

import pytest
import torch

import moco_fast
from moco_fast import native
from moco_fast.native import multi_tensor
from moco_fast.ops.ema_update import _ema_update_

OP = "ema_update_"
SHAPES = [(), (1,), (5,), (37, 3), (64, 3, 7, 7), (257, 129), (0, 4), (70_001,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["one pass", "by lists"], autouse=True)
def reads_tensors(request, monkeypatch):
    """Both ways from tensors to addresses: torch >= 2.10 has the first, older ones only the second."""
    if "triton" in request.node.name and not request.param:
        pytest.skip("Triton's kernel takes lists only")
    if request.param and native.unavailable() is None and hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert multi_tensor._READS_TENSORS
    monkeypatch.setattr(multi_tensor, "_READS_TENSORS", request.param and multi_tensor._READS_TENSORS)


def pairs(dtype=torch.float32, source_dtype=None, device="cpu"):
    return (
        [torch.randn(shape).to(device, dtype) for shape in SHAPES],
        [torch.randn(shape).to(device, source_dtype or dtype) for shape in SHAPES],
    )


@pytest.mark.parametrize("m", [0.0, 0.5, 0.99, 0.999, 1.0])
def test_bitwise_equal_to_the_official_loop(backend, device, m):
    targets, sources = pairs(device=device)
    want = [t * m + s * (1.0 - m) for t, s in zip(targets, sources, strict=True)]
    moco_fast.ema_update_(targets, sources, m)
    for got, expected in zip(targets, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, device, half_ulp, dtype, source_dtype):
    targets, sources = pairs(dtype, source_dtype, device)
    want = [t.double() * 0.9 + s.double() * 0.1 for t, s in zip(targets, sources, strict=True)]
    moco_fast.ema_update_(targets, sources, 0.9)
    for got, expected in zip(targets, want, strict=True):
        assert got.dtype == dtype
        # one rounding to the target's dtype, besides that of fp32 arithmetic
        torch.testing.assert_close(got.double(), expected, rtol=half_ulp(dtype) + 1e-15, atol=2e-7)


@pytest.mark.parametrize(
    "m", [torch.tensor(0.99), torch.tensor(0.99, dtype=torch.float64)], ids=["fp32", "fp64"]
)
def test_tensor_momentum(backend, device, m):
    targets, sources = pairs(device=device)
    m = m.to(device)
    want = [t.double() * 0.99 + s.double() * 0.01 for t, s in zip(targets, sources, strict=True)]
    moco_fast.ema_update_(targets, sources, m)
    for got, expected in zip(targets, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-7)


def test_any_memory_layout(backend, device):
    """Channels-last weights, transposes, and slices whose gaps must not be touched."""
    base = torch.randn(6, 20, device=device)
    targets = [
        torch.randn(8, 3, 5, 5, device=device).to(memory_format=torch.channels_last),
        torch.randn(8, 3, 5, 5, device=device).to(memory_format=torch.channels_last),
        torch.randn(7, 4, device=device).t(),
        base[:, ::2],
    ]
    shapes = [(8, 3, 5, 5), (8, 3, 5, 5), (4, 7), (6, 10)]
    sources = [torch.randn(shape, device=device) for shape in shapes]
    sources[1] = sources[1].to(memory_format=torch.channels_last)
    want = [t * 0.9 + s * (1 - 0.9) for t, s in zip(targets, sources, strict=True)]
    gaps = base[:, 1::2].clone()
    moco_fast.ema_update_(targets, sources, 0.9)
    for got, expected in zip(targets, want, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(base[:, 1::2], gaps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 257, 8193, 70_001])
def test_slices_that_begin_anywhere(backend, device, dtype, size):
    """Views into flat buffers are not aligned to vectors; what lies beside them must survive."""
    flat = torch.randn(3 * size + 12, device=device).to(dtype)
    sources = [torch.randn(size + i, device=device).to(dtype)[i:] for i in range(3)]
    targets, edges = [], []
    for i, source in enumerate(sources):
        begin = i * (size + 3) + i
        targets.append(flat[begin : begin + size])
        edges += [begin - 1] * (begin > 0) + [begin + size]
        assert targets[-1].shape == source.shape
    around = flat[edges].clone()
    want = [(t.double() * 0.9 + s.double() * 0.1) for t, s in zip(targets, sources, strict=True)]
    moco_fast.ema_update_(targets, sources, 0.9)
    for got, expected in zip(targets, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=6e-7)
    assert torch.equal(flat[edges], around)


def test_more_tensors_than_one_launch_holds(backend, device):
    targets = list(torch.randn(2500, 3, device=device).unbind())
    sources = list(torch.randn(2500, 3, device=device).unbind())
    want = torch.stack(targets) * 0.9 + torch.stack(sources) * (1 - 0.9)
    moco_fast.ema_update_(targets, sources, 0.9)
    assert torch.equal(torch.stack(targets), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_masters_hold_what_the_targets_round_away(backend, device, half_ulp, dtype):
    """In bf16 no step of m = 0.999 changes a target; the master gets there, and takes it along."""
    _, sources = pairs(dtype, device=device)
    targets = [torch.full_like(source, 2) for source in sources]
    masters = [target.float() for target in targets]
    want = [master.double() for master in masters]
    for _ in range(30):
        moco_fast.ema_update_(targets, sources, 0.999, masters=masters)
        want = [w * 0.999 + s.double() * 0.001 for w, s in zip(want, sources, strict=True)]
    for target, master, expected in zip(targets, masters, want, strict=True):
        torch.testing.assert_close(master.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(target.float(), master, rtol=half_ulp(dtype), atol=0)
        assert target.numel() == 0 or (target != 2).any()


def test_masters_beside_float64_sources_and_odd_layouts(backend):
    """Left to the reference, row by row."""
    targets = [torch.zeros(4, 3).bfloat16().t(), torch.zeros(3).bfloat16()]
    sources = [torch.ones(3, 4).bfloat16(), torch.ones(3).double()]
    masters = [torch.zeros(3, 4), torch.zeros(3)]
    moco_fast.ema_update_(targets, sources, 0.75, masters=masters)
    for tensor in (*targets, *masters):
        assert (tensor == 0.25).all()


@pytest.mark.gpu
@pytest.mark.parametrize("with_masters", [False, True])
def test_graph_replays_what_eager_does(backend, with_masters):
    """Captured once, replayed with other values and another m."""
    dtype = torch.bfloat16 if with_masters else torch.float32
    targets, sources = pairs(dtype, device="cuda")
    masters = [t.float() for t in targets] if with_masters else None
    m = torch.tensor(0.9, device="cuda", dtype=torch.float64)
    graph = torch.cuda.CUDAGraph()
    one = torch.ones((), device="cuda", dtype=torch.float64)
    moco_fast.ema_update_(
        targets, sources, one, masters=masters
    )  # outside the graph: modules load on first use
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        moco_fast.ema_update_(targets, sources, m, masters=masters)
    want = [t.clone() for t in targets]
    want_masters = [t.clone() for t in masters] if masters else None
    for value in (0.9, 0.5):
        m.fill_(value)
        graph.replay()
        moco_fast.ema_update_(want, sources, value, masters=want_masters)
        for got, expected in zip(targets + (masters or []), want + (want_masters or []), strict=True):
            assert torch.equal(got, expected)
        torch._foreach_add_(sources, 1)


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    targets, sources = [torch.zeros(1 << 20, device="cuda")], [torch.zeros(1 << 20, device="cuda")]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        sources[0].fill_(4)
        moco_fast.ema_update_(targets, sources, 0.75)
        got = targets[0].clone()
    stream.synchronize()
    assert (got == 1).all()


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


def test_autograd_notices_the_write_to_masters(backend):
    target, master, x = torch.zeros(3).bfloat16(), torch.randn(3), torch.randn(3, requires_grad=True)
    y = (x * master).sum()
    moco_fast.ema_update_([target], [torch.ones(3)], 0.5, masters=[master])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_opcheck_and_compile(backend, device):
    targets, sources = pairs(device=device)
    torch.library.opcheck(_ema_update_, (targets, sources, torch.tensor(0.9, dtype=torch.float64), []))
    masters = [t.float() for t in targets]
    torch.library.opcheck(_ema_update_, (targets, sources, torch.tensor(0.9), masters))
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


def test_nothing_to_update(backend, device):
    """A GPU refuses a launch of no blocks."""
    moco_fast.ema_update_([], [], 0.9)
    moco_fast.ema_update_([torch.empty(0, device=device)], [torch.empty(0, device=device)], 0.9)


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


@pytest.mark.parametrize(
    ("masters", "error", "message"),
    [
        ([], ValueError, "got 0 masters, 1 targets"),
        ([3], TypeError, r"masters\[0\] must be a torch.Tensor, got int"),
        ([torch.zeros(3).double()], TypeError, r"masters\[0\] must be torch.float32, got torch.float64"),
        ([torch.zeros(4)], ValueError, r"masters\[0\].*\(3,\), got \(4,\)"),
        ([torch.zeros(3, device="meta")], ValueError, r"masters\[0\] is on meta"),
        ([torch.zeros(3, requires_grad=True)], ValueError, r"masters\[0\] requires grad"),
    ],
)
def test_bad_masters(masters, error, message):
    target = torch.zeros(3).bfloat16()
    with pytest.raises(error, match=message):
        moco_fast.ema_update_([target], [torch.ones(3)], 0.5, masters=masters)
    with pytest.raises(TypeError, match=r"targets\[0\] is torch.float64, more than its master"):
        moco_fast.ema_update_([target.double()], [torch.ones(3)], 0.5, masters=[torch.zeros(3)])
    assert (target == 0).all()


@pytest.mark.parametrize("begins", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_vectors_want_all_operands_aligned(begins, triton_device):
    from moco_fast.kernels import ema_update

    row = [torch.zeros(9, device=triton_device)[begin : begin + 8] for begin in begins]
    _, aligned = ema_update._kind(*row)
    assert aligned == (not any(begins))


def test_a_number_for_float64_is_refused_in_a_cuda_graph(triton_device, monkeypatch):
    from moco_fast.kernels import ema_update

    x = torch.ones(3, dtype=torch.float64, device=triton_device)
    monkeypatch.setattr(ema_update, "_capturing", lambda device: True)
    m = torch.tensor(0.5, dtype=torch.float64, device="meta")  # as one that is not on the GPU
    with pytest.raises(RuntimeError, match="takes m for float64 as a tensor on the GPU in a CUDA graph"):
        ema_update.ema_update_([x], [2 * x], m)
    assert (x == 1).all()


def test_momentum_on_another_device():
    with pytest.raises(ValueError, match=r"m is on meta, but targets\[0\] is on cpu"):
        moco_fast.ema_update_([torch.zeros(3)], [torch.ones(3)], torch.tensor(0.5, device="meta"))


@pytest.mark.skipif(native.unavailable() is not None, reason="no native backend")
def test_what_the_native_backend_serves(monkeypatch):
    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.float32

    class Built:
        has_cuda, found = True, [("Some GPU", "9.0")]

        @classmethod
        def cuda_devices(cls):
            return cls.found

    def reason(capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        native.compiled._gpu_lacks.cache_clear()
        return native.cannot_serve("ema_update_", [OnGpu()])

    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    monkeypatch.setattr(native.compiled, "_C", Built)
    assert reason() is None and reason((12, 0)) is None
    assert "want compute capability 8.0, cuda:0 has 7.5" in reason((7, 5))
    assert "runs on the CPU" in native.cannot_serve("enqueue_", [OnGpu()])
    Built.found = []
    assert "the driver is older" in reason()
    Built.has_cuda = False
    assert "built without CUDA" in reason()
    native.compiled._gpu_lacks.cache_clear()
