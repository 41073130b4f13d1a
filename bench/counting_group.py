"""A gloo process group that counts what arrives at this rank, by kind of collective."""

from collections import Counter
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, AllToAllOptions, BarrierOptions


class CountingGroup(dist.ProcessGroup):
    """Wraps gloo; ``received`` holds bytes of tensors from other ranks, ``calls`` how often."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.inner = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.received, self.calls = Counter(), Counter()

    def getBackendName(self):
        return "counting"

    def count(self, kind, received):
        self.received[kind] += received
        self.calls[kind] += 1

    def alltoall_base(self, output, source, out_splits, in_splits, options=None):
        row = output[0].numel() * output.element_size()
        self.count("all_to_all", row * (sum(out_splits) - out_splits[self.rank()]))
        return self.inner.alltoall_base(output, source, out_splits, in_splits, AllToAllOptions())

    def _allgather_base(self, output, source, options=None):
        self.count("all_gather", (self.size() - 1) * source.numel() * source.element_size())
        return self.inner._allgather_base(output, source, AllgatherOptions())

    # As torch >= 2.13 calls them.
    all_to_all_single, all_gather_single = alltoall_base, _allgather_base

    def allgather(self, outputs, sources, options=None):
        for source in sources:
            self.count("all_gather", (self.size() - 1) * source.numel() * source.element_size())
        return self.inner.allgather(outputs, sources, AllgatherOptions())

    def broadcast(self, tensors, options):
        for tensor in tensors:
            away = options.rootRank != self.rank()
            self.count("broadcast", tensor.numel() * tensor.element_size() if away else 0)
        return self.inner.broadcast(tensors, options)

    def allreduce(self, tensors, options=None):
        if not isinstance(options, AllreduceOptions):
            options = AllreduceOptions()
        self.count("all_reduce", sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return self.inner.allreduce(tensors, options)

    def barrier(self, opts=None):
        return self.inner.barrier(BarrierOptions())


def register():
    """Make "counting" a backend of ``init_process_group``."""
    dist.Backend.register_backend("counting", _create, devices=["cpu"])


def _create(store, rank, size, timeout=timedelta(seconds=120)):
    return CountingGroup(store, rank, size, timeout)
