"""MoCo over two processes (gloo) against one process with the whole batch."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import moco_fast

WORLD, BATCH, STEPS = 2, 6, 5


class PlainNet(nn.Module):
    """No batch norm: who shares a batch with whom cannot be seen, so both runs must agree."""

    def __init__(self, num_classes):
        super().__init__()
        self.hidden = nn.Linear(12, 20)
        self.fc = nn.Linear(20, num_classes)

    def forward(self, x):
        return self.fc(F.relu(self.hidden(x)))


def build(seed=0):
    torch.manual_seed(seed)
    return moco_fast.MoCo(PlainNet, dim=8, K=32, m=0.9, T=0.2, mlp=True)


def batches():
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        im_q = torch.randn(WORLD * BATCH, 12, generator=generator)
        yield im_q, im_q + 0.1 * torch.randn(im_q.shape, generator=generator)


def train(model, part=slice(None)):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for im_q, im_k in batches():
        logits, labels = model(im_q=im_q[part], im_k=im_k[part])
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def worker(rank, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    model = build(seed=rank)  # each rank its own queue, until the model agrees on one
    if rank == 1:
        model.queue_ptr.fill_(7)
    torch.manual_seed(100 + rank)
    wrapped = DistributedDataParallel(model)
    assert {"queue", "queue_ptr"} <= set(wrapped.parameters_to_ignore)
    losses = train(wrapped, slice(rank * BATCH, (rank + 1) * BATCH))
    with pytest.raises(RuntimeError, match=r"MoCo.loss bypasses DistributedDataParallel"):
        model.loss(*next(batches()))
    torch.save((losses, model.state_dict(), copy.deepcopy(model).state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_ranks_hold_the_same_state(ranks):
    for name, value in ranks[0][1].items():
        assert torch.equal(value, ranks[1][1][name]), name
        assert torch.equal(value, ranks[0][2][name]), name  # and it can be copied after training


def test_two_processes_equal_one(ranks):
    model = build()
    losses = train(model)
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, losses, rtol=1e-5, atol=0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            ranks[0][1][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
