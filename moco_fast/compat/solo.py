"""What MoCo scripts import from solo-learn: the losses of MoCo v2+ and v3, with kernels of ours.

In place of ``from solo.losses import mocov2plus_loss_func, mocov3_loss_func``. What differs on purpose:
docs/migration.md. Source: https://github.com/vturrisi/solo-learn.  Tests: tests/test_compat_solo.py.
"""

from __future__ import annotations

from torch import Tensor

from moco_fast import checks, distributed, ops
from moco_fast.compat import trained_keys

__all__ = ["mocov2plus_loss_func", "mocov3_loss_func"]


def mocov2plus_loss_func(
    query: Tensor,  # (N, D), unit rows
    key: Tensor,  # (N, D), unit rows
    queue: Tensor,  # (D, K), unit columns
    temperature: float = 0.1,
) -> Tensor:
    """InfoNCE of queries against their keys and a queue.

    ``mean_i -log( exp(q_i.k_i/T) / (exp(q_i.k_i/T) + sum_j exp(q_i.n_j/T)) )``

    Rows of query and key are normalised here once more, which does not change unit rows. The gradient to
    ``query`` lacks its part along the row, which normalisation before it would take away as well.
    A queue stored as rows, ``rows.t()``, is read as it lies; other strides cost a copy.
    Source: Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning", section 2.

    Args:
        query: of one view.
        key: of the other.
        queue: negatives; it may be overwritten before ``backward()``.
        temperature: T > 0.

    Returns:
        A scalar in fp32 (float64 for float64 inputs).

    Raises:
        TypeError: not floating-point tensors, or a temperature that is no number.
        ValueError: shapes or devices do not match, an empty batch or queue, a temperature not above 0.
    """
    query, key = _views(query, key)
    queue = checks.tensor("queue", queue, ndim=2)
    if queue.shape[0] != query.shape[1]:
        raise ValueError(
            f"queue must have shape ({query.shape[1]}, K) for query {tuple(query.shape)}, "
            f"got {tuple(queue.shape)}"
        )
    return trained_keys.info_nce(query, key.to(query.dtype), queue.t(), temperature)


def mocov3_loss_func(
    query: Tensor,  # (N, D)
    key: Tensor,  # (N, D)
    temperature: float = 0.2,
) -> Tensor:
    """Cross-entropy of queries against the keys of all ranks, times 2T.

    ``2 T F.cross_entropy(q^ @ k^.T / T, arange(N) + N * rank)`` with ``x^ = x / |x|``. As there, the keys of
    several ranks have no gradient, those of one process have if they want one.
    Source: Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers",
    algorithm 1.

    Args:
        query: of one view, not normalised.
        key: of the other, not normalised.
        temperature: T > 0.

    Returns:
        A scalar in fp32 (float64 for float64 inputs).

    Raises:
        TypeError: not floating-point tensors, or a temperature that is no number.
        ValueError: shapes or devices do not match, an empty batch, a temperature not above 0.
    """
    query, key = _views(query, key)
    keys = key.to(query.dtype)
    if distributed.world_size() > 1:
        keys = distributed.all_gather_rows(keys)
    loss = ops.contrast(query, keys, temperature, first=distributed.rank() * len(query))
    return 2 * temperature * loss


def _views(query: object, key: object) -> tuple[Tensor, Tensor]:
    query, key = checks.tensor("query", query, ndim=2), checks.tensor("key", key, ndim=2)
    checks.same_shape("query", query, "key", key)
    return query, key
