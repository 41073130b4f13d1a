"""How ops are registered: what autograd and the dispatcher do around a kernel."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moco_fast


class Watched(TorchDispatchMode):
    """Writes down the names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is zero, unwritten."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


def rows():
    return torch.randn(4, 8, requires_grad=True)


def info_nce(q):
    return moco_fast.info_nce(q, torch.randn(4, 8), torch.randn(5, 8), return_stats=True)[0]


def dino(q):
    return moco_fast.dino(q, torch.randn(4, 8), torch.randn(5, 8), torch.randn(5, 8), torch.zeros(5))


def contrast(q):
    return moco_fast.contrast(q, rows())


def nt_xent(q):
    return moco_fast.nt_xent(q, q.roll(1, 0))


def split_batch_norm(q):
    return moco_fast.split_batch_norm(q, None, None, 2)[0].mean()


losses = pytest.mark.parametrize("loss_of", [info_nce, dino, contrast, nt_xent, split_batch_norm])


@losses
def test_autograd_writes_no_zeros_for_results_that_nobody_used(loss_of):
    """They are as large as the gradients."""
    loss = loss_of(rows())
    with Watched() as watched:
        loss.backward()
    assert watched.names and not [name for name in watched.names if "zero" in name]


@losses
def test_no_gradient_in_none_out(loss_of):
    q = rows()
    assert torch.autograd.grad(NoGradient.apply(loss_of(q)), q, allow_unused=True) == (None,)


def test_what_is_told_beside_a_result_has_no_gradient():
    q = rows()
    _, stats = moco_fast.info_nce(q, q.detach(), q.detach(), return_stats=True)
    _, mean, var = moco_fast.split_batch_norm(q, None, None, 2)
    assert not any(x.requires_grad for x in (*stats, mean, var))


def enqueue(written):
    moco_fast.enqueue_(written, torch.zeros(1, dtype=torch.int64), torch.randn(2, 8))


def enqueue_mirrored(written):
    moco_fast.enqueue_(torch.randn(5, 8), torch.zeros(1, dtype=torch.int64), torch.randn(2, 8), written)


def ema_update(written):
    moco_fast.ema_update_([written], [torch.randn(5, 8)], 0.9)


def ema_update_master(written):
    moco_fast.ema_update_([torch.randn(5, 8)], [torch.randn(5, 8)], 0.9, masters=[written])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("write", [enqueue, enqueue_mirrored, ema_update, ema_update_master])
def test_a_gradient_that_needs_what_an_op_overwrote_raises(write, compiled):
    def step(scale, written):
        loss = (scale * written).sum()
        write(written)
        return loss

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    with pytest.raises(Exception, match="modified by an inplace operation"):
        run(torch.ones(8, requires_grad=True), torch.randn(5, 8)).backward()


@losses
def test_what_is_saved_is_unpacked_once(loss_of):
    """A checkpoint without reentrance unpacks it once only, with create_graph too."""
    q = rows()
    packed, unpacked = [], []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: packed.append(x) or x, lambda x: unpacked.append(x) or x
    )
    with hooks:
        loss = loss_of(q)
    torch.autograd.grad(loss, q, create_graph=True)
    assert 0 < len(unpacked) == len(packed)
    torch.manual_seed(1)
    again = checkpoint(loss_of, q, use_reentrant=False)
    (got,) = torch.autograd.grad(again, q, create_graph=True)
    torch.manual_seed(1)
    assert torch.equal(got, torch.autograd.grad(loss_of(q), q)[0])


@pytest.mark.parametrize("reuse", ["retain_graph", "create_graph"])
@losses
def test_a_graph_that_is_kept_gives_its_gradients_again(loss_of, reuse):
    q = rows()
    loss = loss_of(q) * 3
    first = torch.autograd.grad(loss, q, **{reuse: True})[0].clone()
    second, again = (torch.autograd.grad(loss, q, retain_graph=retain)[0] for retain in (True, False))
    assert torch.equal(first, second) and torch.equal(first, again)


def test_the_gradient_to_prototypes_takes_no_second_memory():
    w, saved = torch.randn(5, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        loss = moco_fast.dino(rows(), torch.randn(4, 8), w, torch.randn(5, 8), torch.zeros(5))
    loss.backward()
    assert w.grad.data_ptr() in saved


@losses
def test_a_node_is_called_after_its_op(loss_of):
    loss = loss_of(rows())
    names, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent]
    assert f"{loss_of.__name__}Backward" in names


@losses
def test_tangents_are_refused(loss_of):
    """Not lost."""
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        loss_of(forward_ad.make_dual(rows().detach(), torch.ones(4, 8)))


@pytest.mark.parametrize("loss_of", [info_nce, dino, contrast, nt_xent])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_gradient_that_the_forward_pass_did_not_compute_raises(loss_of):
    """vmap hides from it that one will be wanted."""
    q = torch.stack([rows().detach()] * 3).requires_grad_()
    with pytest.raises(RuntimeError):
        torch.vmap(loss_of, randomness="different")(q).sum().backward()


def test_what_an_op_does_inside_is_not_recorded():
    """Whoever calls it: a traced graph has lost the no_grad of the public functions."""
    queue, keys = torch.randn(5, 8), rows()
    with moco_fast.use_backend("reference"):
        torch.ops.moco_fast.enqueue_(queue, torch.zeros(1, dtype=torch.int64), keys, None, None)
        taken = torch.ops.moco_fast.take_rows(keys, torch.tensor([1]))
    assert not queue.requires_grad and torch.equal(taken, keys[1:2])


def test_ops_may_be_compiled_strictly(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "only_allow_pt2_compliant_ops", True)
    for op in (torch.ops.moco_fast.info_nce, torch.ops.moco_fast.ema_update_):
        assert torch.Tag.pt2_compliant_tag in op.default.tags
    loss = torch.compile(nt_xent, fullgraph=True, backend="eager")(rows())
    assert loss.requires_grad
