"""InfoNCE with several positives: keys of one's own, and rows of the queue with one's label."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moco_fast import checks
from moco_fast.ops import arguments
from moco_fast.ops.losses import info_nce, reduced


def multi_info_nce(
    q: Tensor,  # (N, C)
    k: Tensor,  # (N, C) or (N, P, C)
    queue: Tensor,  # (K, C)
    temperature: float = 0.07,
    *,
    labels: Tensor | None = None,  # (N,) int64
    queue_labels: Tensor | None = None,  # (K,) int64
    classes: int | None = None,
    precision: str = "high",
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE of queries with several positives each, fused.

    ``loss_i = -1/|P_i| sum_{p in P_i} log( exp(s_ip) / sum_a exp(s_ia) )`` with ``s = q^.k^ / T``, where P_i
    are the query's own P keys and the rows of the queue with its label, and a runs over its own keys and the
    whole queue. With one key and no labels it is :func:`info_nce`. The N x K logits do not exist in memory:
    what the sum over p needs of the queue is the sum of its rows by class, and the log-sum-exp is info_nce's.
    The gradient is to ``q`` only.
    Source: Khosla et al. 2020, "Supervised Contrastive Learning", equation 2.

    Args:
        q: queries (N, C), not normalised; fp32, bf16, fp16 or float64.
        k: their own keys, one each (N, C) or P (N, P, C), of the same dtype, not normalised, without grad.
        queue: (K, C), rows of unit norm, any floating dtype.
        temperature: T > 0.
        labels: (N,) int64, class of every query, in [-1, classes); -1: unknown, only its own keys are
            positive.
        queue_labels: (K,) int64, class of every row of the queue, in [-1, classes); -1: unknown, nobody's
            positive.
        classes: how many there are.
        precision: as of :func:`info_nce`.
        reduction: "mean", "sum" or "none" over the queries.

    Returns:
        The loss in fp32 (float64 for float64 inputs), a scalar, or (N,) for "none". It can be differentiated
        once. Sums by class are added in no fixed order on a GPU: they repeat to rounding.

    Raises:
        TypeError, ValueError: as of :func:`info_nce`; labels not int64, not one for each row, or, on a CPU,
            out of range; one of labels, queue_labels and classes without the others.

    Example:
        >>> loss = moco_fast.multi_info_nce(q, k, queue, labels=y, queue_labels=queue_y, classes=1000)
    """
    several = arguments.multi_info_nce(q, k, queue, labels, queue_labels, classes)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    first = k[:, 0] if several else k
    if labels is None and (not several or k.shape[1] == 1):
        return info_nce(q, first, queue, temperature, precision=precision, reduction=reduction)

    # Relative to the first key's loss: where that is the only positive, all terms below are exactly 0.
    rows = info_nce(q, first, queue, temperature, precision=precision, reduction="none")
    q_hat = F.normalize(q.to(rows.dtype), dim=1)
    own = F.normalize((k if several else k[:, None]).to(rows.dtype), dim=-1)
    logits = (q_hat[:, None] * own).sum(dim=2) / temperature  # (N, P)
    if logits.shape[1] > 1:
        # log(1 + e^x): the others' exponentials beside those of the first key and the queue, e^(loss_0 + s_0)
        others = torch.logsumexp(logits[:, 1:], dim=1) - (rows + logits[:, 0])
        rows = rows + torch.logaddexp(others, torch.zeros_like(others))
    further, count = own[:, 1:].sum(dim=1), torch.full_like(rows, own.shape[1])
    if labels is not None:
        assert queue_labels is not None and classes is not None
        sums, counts = _by_class(queue.to(rows.dtype), queue_labels, classes)
        of = torch.where(labels < 0, classes, labels)  # the last row is that of the unknown, and 0
        further, count = further + sums[of], count + counts[of]
    mean = ((count - 1) * logits[:, 0] - (q_hat * further).sum(dim=1) / temperature) / count
    return reduced(rows + mean, reduction)


@torch.no_grad()
def _by_class(
    queue: Tensor,  # (K, C)
    labels: Tensor,  # (K,) int64
    classes: int,
) -> tuple[Tensor, Tensor]:
    """The sum and number of the rows of every class, (classes + 1, C) and (classes + 1,); 0 in the last."""
    of = torch.where(labels < 0, classes, labels)
    sums = queue.new_zeros((classes + 1, queue.shape[1])).index_add_(0, of, queue)
    counts = queue.new_zeros(classes + 1).index_add_(0, of, torch.ones_like(queue[:, 0]))
    sums[-1], counts[-1] = 0, 0
    return sums, counts
