"""The queue of negative keys, a ring buffer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_fast import backends, checks, ops

_MIX = -0x61C8864680B583EB  # 2^64 over the golden ratio, odd: spreads small integers over 64 bits


class Ring(nn.Module):
    """Ring buffer of unit-norm keys, and the float16 mirror of it that some kernels read.

    A subclass holds the buffers and says where they are: ``rows`` and ``pointer``.
    """

    # Once made it stays where it is, while shape and device last: CUDA graphs know its address.
    _mirror: Tensor | None
    _mirrored: int  # version of the rows that the mirror shows
    _rewritten: bool  # by a CUDA graph whose replays raise no version

    def __init__(self) -> None:
        super().__init__()
        self._mirror, self._mirrored, self._rewritten = None, -1, False

    @property
    def rows(self) -> Tensor:
        """The keys as rows, (K, dim), each contiguous."""
        raise NotImplementedError

    @property
    def pointer(self) -> Tensor:
        """The row to be overwritten next, (1,) int64."""
        raise NotImplementedError

    @property
    def negatives(self) -> Tensor:
        """The keys as rows, (K, dim), as :func:`moco_fast.info_nce` reads them fastest.

        For the GPU's kernels a float16 mirror of the buffer, which :meth:`enqueue_` keeps in step; it is
        written anew after any other write that torch knows of (not one through ``.data``). Else :attr:`rows`,
        which ``precision="highest"`` needs in any case.
        """
        rows = self.rows
        if torch.compiler.is_compiling() or not self._mirror_is_read(rows):
            return rows
        if self._mirror is None or self._mirror.shape != rows.shape or self._mirror.device != rows.device:
            with torch.inference_mode(False):  # training writes what an evaluation has made
                self._mirror, self._mirrored = torch.empty_like(rows, dtype=torch.float16), -1
        if self._mirrored != rows._version or self._rewritten:
            self._mirror.copy_(rows)
            self._mirrored = rows._version
        return self._mirror

    @staticmethod
    def _mirror_is_read(rows: Tensor) -> bool:
        backend = backends.choose("info_nce", (rows,))
        return backend is backends.triton or (rows.is_cuda and backend is backends.native)

    def enqueue_(
        self,
        keys: Tensor,  # (N, dim), raw, N <= K
        order: Tensor | None = None,  # (N,) int64
    ) -> None:
        """Replace the oldest keys; see :func:`moco_fast.enqueue_`."""
        rows = self.rows  # a view has the version of what it shows
        if torch.compiler.is_compiling():  # which knows of no version; it rises all the same
            return ops.enqueue_(rows, self.pointer, keys, None, order)
        in_step = self._mirror is not None and self._mirrored == rows._version
        ops.enqueue_(rows, self.pointer, keys, self._mirror if in_step else None, order)
        if in_step:
            self._mirrored = rows._version
        elif rows.is_cuda and torch.cuda.is_current_stream_capturing():
            self._rewritten = True

    def _outdate_mirror(self) -> None:
        self._mirrored = -1

    def _apply(self, *args, **kwargs):
        module = super()._apply(*args, **kwargs)
        self._outdate_mirror()  # other buffers, with versions of their own
        if self._mirror is not None and self._mirror.device != self.rows.device:
            self._mirror = None
        return module

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._outdate_mirror()  # assign=True puts other buffers here, with versions of their own

    def __getstate__(self) -> dict:
        # Copies and pickles make their own mirror, and no graph knows them.
        return self.__dict__ | {"_mirror": None, "_mirrored": -1, "_rewritten": False}


class KeyQueue(Ring):
    """Ring buffer of K unit-norm keys, with the buffers of the official checkpoints.

    The buffer ``queue`` has shape (dim, K), as saved by existing code, over storage
    in which every key is contiguous: :attr:`rows` is the (K, dim) view that the
    ops read, free of charge. The strides survive ``.to()``, copying, saving and
    loading (not ``load_state_dict(assign=True)``, which costs a copy per step).

    Args:
        dim: features per key.
        K: number of slots.

    Raises:
        ValueError: dim or K below 1.

    Example:
        >>> ring = moco_fast.KeyQueue(128, 65536)
        >>> loss = moco_fast.info_nce(q, k, ring.negatives)
        >>> ring.enqueue_(k)
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int = 128, K: int = 65536) -> None:
        super().__init__()
        checks.count("dim", dim)
        checks.count("K", K)
        # Drawn as (dim, K) and normalised over dim 0: one seed gives the official initial queue.
        columns = F.normalize(torch.randn(dim, K), dim=0)
        self.register_buffer("queue", columns.t().contiguous().t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @property
    def rows(self) -> Tensor:
        """The keys as rows, (K, dim): a view of the buffer."""
        return self.queue.t()

    @property
    def pointer(self) -> Tensor:
        """The slot to be overwritten next: the buffer ``queue_ptr``."""
        return self.queue_ptr

    def checksum(self) -> Tensor:
        """A number, 0-d int64, that another queue or pointer has with a probability of about 2^-64.

        The bits of every value times odd numbers that depend on row and column, summed modulo 2^64: the order
        of summation does not matter, that of the keys does.
        """
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = self.rows.contiguous().view(integers[self.queue.itemsize])
        by_row, by_column = (2 * torch.arange(n, device=bits.device) + 1 for n in bits.shape)
        words = bits.to(torch.int64) * (by_column * _MIX)
        return ((words ^ (words >> 29)).sum(dim=1) * by_row).sum() + self.queue_ptr[0] * _MIX

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        saved = state_dict.get(prefix + "queue", self.queue)
        if saved.ndim != 2 or saved.shape == self.queue.shape:
            return
        (dim, K), (own_dim, own_K) = saved.shape, self.queue.shape
        if dim != own_dim:
            errors.append(
                f"The checkpoint is of dim={dim}, this model of dim={own_dim}: build it with dim={dim}. Of "
                "another dim head and queue are trained anew; the backbone can be kept: moco-fast convert IN "
                "OUT --to torchvision."
            )
        else:
            errors.append(
                f"The checkpoint's queue holds K={K} keys, this model's K={own_K}: build it with K={K}, or "
                f"put a fresh queue into the file: moco-fast convert IN OUT --to official --queue-size "
                f"{own_K}."
            )
