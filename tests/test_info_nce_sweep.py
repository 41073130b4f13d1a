"""InfoNCE with the sweep written for Hopper: its logic on an emulated GPU, and all of it on a GPU."""

import math
from concurrent.futures import ThreadPoolExecutor

import emulated
import pytest
import torch
from conftest import interpreter_fault
from features import far
from test_info_nce import SCALE, make, official, relative
from torch.nn import functional as F

import moco_fast
from moco_fast import backends, native
from moco_fast.kernels import backend as triton
from moco_fast.kernels import info_nce_sweep

pytest.importorskip("triton", reason="Triton is not installed: it prepares and finishes the sweep")
from moco_fast.kernels import info_nce as launcher

DTYPES = {"high": torch.float16, "medium": torch.bfloat16}
OFFSET = {torch.float16: 15.0, torch.bfloat16: 0.0}


def sweep(q, k, queue, temperature, shares, steps, stats=True, online=False, least=0.0, **options):
    """What the kernel writes, into NaN: |q|, |k|, pos; sums, totals, shifts, cosines, ranks."""
    n = len(q)
    pairs = torch.full((3, n), math.nan).unbind()
    found = [torch.full((shares, n, q.shape[1]), math.nan), *torch.full((3, shares, n), math.nan).unbind()]
    found.append(torch.full((shares, n), -1, dtype=torch.int32))
    scale, offset = 1 / (math.log(2) * temperature), OFFSET[queue.dtype]
    numbers = scale, scale - offset, offset, least
    wanted = found if stats else found[:3]
    emulated.info_nce_sweep(q, k, queue, pairs, wanted, steps, numbers, online, **options)
    return *pairs, *found


# N, K, C, shares, tiles of 128 per share: one block and several, of few queries and of many, shares of one
# tile and of more than the ring holds, queues that end within a tile.
SIZES = [
    (1, 1, 72, 1, 1),
    (20, 1000, 128, 2, 4),
    (64, 1793, 128, 1, 15),
    (65, 128, 80, 1, 1),
    (70, 1000, 128, 2, 4),
    (130, 3400, 128, 1, 27),
    (300, 770, 104, 3, 3),
    (2, 383, 72, 1, 3),
]


@pytest.mark.parametrize("online", [False, True], ids=["fixed shift", "running maximum"])
@pytest.mark.parametrize("dtype", OFFSET, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums(size, dtype, online):
    n, slots, c, shares, steps = size
    q, k, queue = make(n, slots, c, queue_dtype=dtype)
    k = k.roll(1, dims=0)  # others' keys, which some rows of the queue are nearer than
    got = sweep(q, k, queue, 0.07, shares, steps, online=online, seed=n)
    q_norm, k_norm, pos, sums, totals, shifts, cosines, ranks = got

    q, k = q.double(), k.double()
    q_hat = F.normalize(q, dim=1)
    assert torch.allclose(q_norm.double(), q.norm(dim=1), rtol=1e-6)
    assert torch.allclose(k_norm.double(), k.norm(dim=1), rtol=1e-6)
    assert torch.allclose(pos.double(), (q_hat * F.normalize(k, dim=1)).sum(1), atol=1e-6)

    # An element of q^ that lies between two values of the operands' dtype may be rounded to either.
    eps = torch.finfo(dtype).eps
    cosine = q_hat.to(dtype).double() @ queue.double().t()
    p = torch.exp(cosine / 0.07)
    weight = torch.exp2(shifts.double())
    assert relative((totals * weight).sum(0), p.sum(1)) < eps / 10
    assert relative((sums * weight[:, :, None]).sum(0), p @ queue.double()) < eps
    assert torch.allclose(cosines.double().sum(0), cosine.sum(1), atol=eps)
    near = ((cosine - pos.double()[:, None]).abs() < eps / 10).sum(1)
    assert ((ranks.sum(0) - (cosine > pos[:, None]).sum(1)).abs() <= near).all()


@pytest.mark.parametrize("n", [33, 129])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_raw_rows_of_any_dtype(n, dtype):
    """They are widened exactly, so their values in fp32 give the same bits."""
    q, k, queue = make(n, 400, 128, dtype, queue_dtype=torch.float16)
    got = sweep(q, k, queue, 0.2, 2, 2)
    want = sweep(q.float(), k.float(), queue, 0.2, 2, 2)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_rows_of_any_norm():
    """Squares of large values do not overflow; rows shorter than 1e-12 are divided by that."""
    q, k, queue = make(5, 200, 128, queue_dtype=torch.float16)
    q *= torch.tensor([1e30, 1e-25, 0.0, 1.0, 1e-13])[:, None]
    q_norm, _, pos, *_, cosines, _ = sweep(q, k, queue, 0.2, 1, 2)
    q = q.double()
    q_hat = q / q.norm(dim=1, keepdim=True).clamp_min(1e-12)
    assert torch.allclose(q_norm.double(), q.norm(dim=1), rtol=1e-6)
    assert torch.allclose(pos.double(), (q_hat * F.normalize(k.double(), dim=1)).sum(1), atol=1e-6)
    assert torch.allclose(cosines[0].double(), (q_hat @ queue.double().t()).sum(1), atol=1e-3)


def test_without_statistics_nothing_else_is_written():
    q, k, queue = make(5, 300, 128, queue_dtype=torch.float16)
    *found, cosines, ranks = sweep(q, k, queue, 0.2, 1, 3, stats=False)
    want = sweep(q, k, queue, 0.2, 1, 3)
    assert all(torch.equal(*pair) for pair in zip(found, want[:6], strict=True))
    assert cosines.isnan().all() and (ranks == -1).all()


def test_impossible_arguments_of_the_driver_are_told():
    q = torch.ones(5, 128)
    shifted = torch.empty(300 * 128 + 1, dtype=torch.float16)[1:].view(300, 128)
    with pytest.raises(RuntimeError, match="info_nce: cuTensorMapEncodeTiled: error 1"):
        sweep(q, q, shifted, 0.2, 1, 3)


# --- the op, whose last kernel runs in Triton's interpreter ---


PLACES = [
    pytest.param(
        "emulated",
        marks=pytest.mark.skipif(
            not triton.interpreted(), reason="Triton compiles its kernels for the GPU here"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=PLACES)
def op(request, monkeypatch):
    """Loss rows, dq of SCALE times the mean, rank, pos and neg; ``by_hand=False`` for Triton's sweep."""
    device = "cpu" if request.param == "emulated" else "cuda"
    if device == "cpu":
        monkeypatch.setattr(native, "info_nce_sweep", emulated.info_nce_sweep)
    elif reason := native.cannot_serve("info_nce", [torch.empty(1, 128, device="cuda")]):
        pytest.skip(f"native backend on cuda: {reason}")

    def run(q, k, queue, temperature, precision="high", need_dq=True, need_stats=True, by_hand=True):
        if not by_hand and device == "cpu" and (reason := interpreter_fault()):
            pytest.skip(reason)
        moved = (x.to(device) for x in (q, k, queue))
        found = launcher.info_nce(*moved, temperature, precision, need_dq, need_stats, by_hand=by_hand)
        rows, dq, *stats = (x.cpu() for x in found)
        return rows, dq * (SCALE / len(q)), *stats

    return run


# Around the temperatures at which the fixed shift ends.
@pytest.mark.parametrize("temperature", [0.2, 0.06, 0.0599, 0.025, 0.0249, 0.01])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("shape", [(37, 300, 128), (70, 1030, 104)], ids=str)
def test_precisions(op, shape, precision, temperature):
    """Two rounded operands move a cosine by at most eps, and cosines are divided by T."""
    dtype = DTYPES[precision]
    for clustered in (False, True):
        q, k, queue = make(*shape, clustered=clustered, queue_dtype=dtype)
        k = k[torch.randperm(len(k))]
        want, want_dq, logits = official(q, k, queue, temperature)
        rows, dq, rank, pos, neg = op(q, k, queue, temperature, precision)
        eps = torch.finfo(dtype).eps
        assert ((rows - want).abs() <= eps / temperature + 1e-5 + 2e-7 * want).all()
        assert relative(dq, want_dq) <= eps / temperature + 1e-5
        positive, negatives = logits[:, :1], logits[:, 1:]
        assert torch.allclose(pos.double(), positive[:, 0], atol=1e-6)
        assert torch.allclose(neg.double(), negatives.mean(1), atol=eps)
        lowest, highest = (negatives > positive + eps).sum(1), (negatives > positive - eps).sum(1)
        assert ((rank >= lowest) & (rank <= highest)).all()


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_like_triton(op, temperature):
    """From the same operands: what differs is the order of sums, and ties that fp16 rounds either way."""
    q, k, queue = make(70, 1030, 128, queue_dtype=torch.float16)
    rows, dq, rank, _, neg = op(q, k, queue, temperature, by_hand=False)
    got_rows, got_dq, got_rank, _, got_neg = op(q, k, queue, temperature)
    assert torch.allclose(got_rows, rows, rtol=1e-5) and torch.allclose(got_neg, neg, atol=1e-7)
    assert relative(got_dq, dq) < 1e-4
    assert (got_rank - rank).abs().max() <= 1


def test_a_thread_that_is_new_to_cuda(op):
    """It has no context yet, without which the driver describes no memory to the copy engine."""
    arguments = *make(9, 130, 128, queue_dtype=torch.float16), 0.2
    want = op(*arguments)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(op, *arguments).result(60)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_the_faster_sweep_is_taken(op, monkeypatch):
    q, k, queue = make(9, 130, 128, queue_dtype=torch.float16)
    for faster in (False, True):
        monkeypatch.setattr(launcher, "_faster_by_hand", lambda *args, faster=faster: faster)
        got, want = op(q, k, queue, 0.2, by_hand=None), op(q, k, queue, 0.2, by_hand=faster)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_long_rows_of_the_queue_take_the_running_maximum(op):
    """With the fixed shift their exponentials are infinite."""
    q, k, queue = make(40, 520, 128)
    queue[::7] *= 30
    queue = queue.half()
    want, want_dq, _ = official(q, k, queue, 0.07)
    rows, dq, *_ = op(q, k, queue, 0.07)
    assert torch.allclose(rows.double(), want, rtol=2e-3) and relative(dq, want_dq) < 2e-2


@pytest.mark.parametrize("shape", [(5, 260), (70, 1030)], ids=str)
def test_queries_far_from_all_of_the_queue_take_the_running_maximum(op, shape):
    """With the fixed shift fp16 has few digits for their exponentials."""
    q, k, queue = far(-0.6, *shape, 128)
    queue = queue.half()
    want, want_dq, _ = official(q, k, queue, 0.07)
    rows, dq, *_ = op(q, k, queue, 0.07)
    eps = torch.finfo(torch.half).eps
    assert ((rows - want).abs() <= eps / 0.07).all() and relative(dq, want_dq) <= eps


@pytest.mark.parametrize(
    ("n", "slots", "shares", "steps"), [(20, 1000, 2, 4), (20, 140, 1, 2), (70, 1000, 2, 4), (130, 140, 1, 2)]
)
def test_which_sums_are_too_small(n, slots, shares, steps):
    """Those whose exponentials are on average below the least, over the rows that a group has walked."""
    q, k, queue = make(n, slots, 128, queue_dtype=torch.float16)
    exponentials = torch.exp2((F.normalize(q) @ queue.float().t() - 1) / (math.log(2) * 0.2) + 15)
    least = exponentials.view(n, -1).mean(1).amin().item()
    fixed = 1 / (math.log(2) * 0.2) - 15
    for factor, kept in ((0.1, True), (10, False)):
        *_, shifts, _, _ = sweep(q, k, queue, 0.2, shares, steps, least=factor * least)
        assert (shifts == fixed).all() == kept


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "queue"])
def test_non_finite_rows_give_a_non_finite_loss(op, where, value):
    q, k, queue = make(66, 200, 128, queue_dtype=torch.float16)
    {"q": q, "k": k, "queue": queue}[where][2, 3] = value
    touched = ~torch.isfinite(op(q, k, queue, 0.2)[0])
    assert touched.all() if where == "queue" else touched.nonzero().tolist() == [[2]]


@pytest.mark.parametrize("need_stats", [False, True])
@pytest.mark.parametrize("need_dq", [False, True])
def test_every_output_is_written(op, need_dq, need_stats, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: empty(*size, **options).view(-1).fill_(-1).view(*size)
        if options.get("dtype") in (torch.int32, torch.int64)
        else empty(*size, **options).fill_(math.nan),
    )  # fmt: skip
    q, k, queue = make(9, 130, 128, queue_dtype=torch.float16)
    rows, dq, rank, pos, neg = op(q, k, queue, 0.2, need_dq=need_dq, need_stats=need_stats)
    assert all(torch.isfinite(value).all() for value in (rows, dq, pos, neg))
    assert dq.shape == (9 if need_dq else 0, 128) and len(rank) == len(pos) == len(neg) == 9 * need_stats
    assert ((rank >= 0) & (rank < 130)).all()


# --- which calls it serves ---


class RowsOnGpu:
    """As much of a CUDA tensor of rows as is looked at before a kernel runs."""

    is_cuda, device, ndim = True, torch.device("cuda", 0), 2

    def __init__(self, features, n=10, dtype=torch.float32):
        self.shape, self.dtype = (n, features), dtype

    def __len__(self):
        return self.shape[0]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(native.compiled, "_gpu_lacks", lambda device: None)
    monkeypatch.setattr(native.compiled, "_C", object())


def test_it_has_to_be_asked_for(hopper):
    tensors = [RowsOnGpu(128)] * 3
    assert backends.choose("info_nce", tensors) is backends.triton
    with moco_fast.use_backend("native"):
        assert backends.choose("info_nce", tensors) is native


def test_taken_unasked_where_it_was_measured_to_be_faster(hopper, monkeypatch):
    """And not of a queue that it does not read, of another width, or on a CPU."""

    def taken(n, dtype=torch.float16, precision="high", features=128):
        q, queue = RowsOnGpu(features, n), RowsOnGpu(features, dtype=dtype)
        return launcher._faster_by_hand(q, queue, precision)

    assert not taken(9) and not taken(70)
    monkeypatch.setattr(info_nce_sweep, "UNASKED", ("many",))
    assert taken(70) and not taken(64)
    assert not taken(70, torch.float32) and not taken(70, precision="medium") and not taken(70, features=64)
    q, _, on_cpu = make(70, 130, 128, queue_dtype=torch.float16)
    assert not launcher._faster_by_hand(q, on_cpu, "high")


@pytest.mark.parametrize("features", [64, 100, 136])
def test_other_widths_are_refused(hopper, features):
    with (
        moco_fast.use_backend("native"),
        pytest.raises(RuntimeError, match=f"takes a multiple of 8 from 72 to 128 features, got {features}"),
    ):
        backends.choose("info_nce", [RowsOnGpu(features)])


def test_other_gpus_are_refused(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "compute capability 9.0, cuda:0 has 10.0" in native.cannot_serve("info_nce", [RowsOnGpu(128)])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("highest", torch.float16), ("high", torch.float32), ("medium", torch.float16)]
)
def test_a_queue_of_another_dtype_is_refused(precision, dtype):
    queue = torch.empty(8, 128, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"torch.float16 for precision 'high'.* got {dtype} for"):
        info_nce_sweep.check_queue(queue, precision)


@pytest.mark.skipif(
    native.unavailable() is not None or not native.compiled._C.has_cuda or torch.cuda.is_available(),
    reason="wants the CUDA part of the build, and no GPU",
)
def test_arguments_reach_the_compiled_module(monkeypatch):
    """Past the conversion of all arguments, where the runtime finds no GPU."""
    monkeypatch.setattr(native.losses, "stream", lambda device: 0)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    q, k, queue = (x.as_subclass(OnGpu) for x in make(3, 130, 128, queue_dtype=torch.float16))
    row = torch.zeros(1, 3)
    with pytest.raises(RuntimeError, match=r"info_nce: cuda[A-Za-z]+: "):
        native.info_nce_sweep(
            q, k, queue, [row[0]] * 3, [row[..., None], row, row], 2, (1.0, 1.0, 15.0, 0.0), False
        )


# --- on a GPU ---


def on_request(q, k, queue):
    """Loss and dq of the native backend."""
    with moco_fast.use_backend("native"):
        loss = moco_fast.info_nce(q, k, queue)
    return loss.detach(), *torch.autograd.grad(loss, q)


@pytest.fixture
def headline():
    """q, k and queue at the size of the README's tables, on the GPU."""
    if reason := native.cannot_serve("info_nce", [torch.empty(1, 128, device="cuda")]):
        pytest.skip(f"native backend on cuda: {reason}")
    q, k, queue = (x.cuda() for x in make(256, 65536, 128, queue_dtype=torch.float16))
    return q.requires_grad_(), k, queue


@pytest.mark.gpu
def test_through_the_public_op(headline):
    q, k, queue = headline
    got = on_request(q, k, queue)
    loss = moco_fast.info_nce(q, k, queue)
    assert torch.allclose(got[0], loss, rtol=1e-4)
    assert relative(got[1], torch.autograd.grad(loss, q)[0]) < 1e-3
    for _ in range(20):
        assert all(torch.equal(*pair) for pair in zip(on_request(q, k, queue), got, strict=True))


@pytest.mark.gpu
def test_replayed_from_a_graph(headline):
    q, k, queue = headline
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_request(q, k, queue)  # outside the graph: modules load on first use
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = on_request(q, k, queue)
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
        queue.copy_(queue.flip(0))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(found, on_request(q, k, queue), strict=True))
