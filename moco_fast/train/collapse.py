"""An alarm for representations that collapse: every image in one place, or on one line.

With unit embeddings ``z^`` of a batch and their mean ``c``::

    spread = sqrt(1 - |c|^2)                    1: in all directions, 0: all in one point
    rank   = (sum_i l_i)^2 / sum_i l_i^2        l: eigenvalues of the covariance of z^

``spread`` is the standard deviation of the unit embeddings, summed over features, that Chen and He 2021
("Exploring Simple Siamese Representation Learning", section 4.1) watch; ``rank`` is the participation ratio,
the number of directions that the embeddings use. A loss does not show a collapse: where there are no
negatives it falls fastest then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Alarming below. A spread of 0.35 is a mean cosine of different images of 0.88; on a line the rank is 1.
SPREAD, RANK = 0.35, 1.1
PATIENCE = 50  # steps that it must last
# First steps that are not judged, or an epoch if that is more, but a tenth of the run at most: embeddings
# draw together before they spread. On the digits the spread is below 0.35 from step 11 to 62 of a sound run.
GRACE = 200


class EmbeddingWatch:
    """Statistics of the embeddings that an encoder makes in training, taken as they pass.

    Args:
        encoder: whose outputs, (N, C), are watched.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self._latest: Tensor | None = None
        encoder.register_forward_hook(self._keep)

    def _keep(self, encoder: nn.Module, inputs: object, output: Tensor) -> None:
        if encoder.training:
            self._latest = output.detach()

    def stats(self) -> dict[str, Tensor]:
        """``spread`` and ``rank`` of the latest batch, 0-d tensors on its device."""
        if self._latest is None:
            raise RuntimeError("the encoder has not been called in training mode")
        latest, self._latest = self._latest, None
        return embedding_stats(latest)


@torch.no_grad()
def embedding_stats(
    z: Tensor,  # (N, C), raw
) -> dict[str, Tensor]:
    """``spread`` and ``rank`` of embeddings; see the top of this module."""
    unit = F.normalize(z.float(), dim=1)
    mean = unit.mean(dim=0)
    centred = unit - mean
    variance = centred.square().sum() / len(unit)
    # The eigenvalues that are not zero are those of the smaller of the two Gram matrices.
    gram = centred @ centred.t() if z.shape[0] < z.shape[1] else centred.t() @ centred
    squares = gram.square().sum() / len(unit) ** 2
    tiny = torch.finfo(squares.dtype).tiny
    return {"spread": variance.sqrt(), "rank": variance.square() / squares.clamp_min(tiny)}


def grace(
    total: int,  # steps of the run
    steps_per_epoch: int,
    rows: int,  # of the embeddings that statistics are taken of
) -> int:
    """Steps at the start of a run that are not judged: all where two rows, or one, are on a line anyhow."""
    return total if rows < 3 else min(total // 10, max(steps_per_epoch, GRACE))


class CollapseAlarm:
    """Tells, once, that the embeddings have been collapsed for a while.

    Args:
        grace: steps that are not judged, of :func:`grace`.
        by_rank: judge by the rank too. With labels of two classes the best embeddings lie on a line.

    Attributes:
        since: step at which the present collapse was first seen, or None.
        told: whether it has lasted, and has been told of.
    """

    def __init__(self, grace: int = 0, by_rank: bool = True) -> None:
        self._grace, self._lowest_rank = grace, RANK if by_rank else 0.0
        self.since: int | None = None
        self.told = False

    def state(self) -> list[Any]:
        """What a checkpoint keeps of it."""
        return [self.since, self.told]

    def set_state(self, state: list[Any]) -> None:
        """Go on from :meth:`state`."""
        self.since, self.told = state

    def look(self, step: int, spread: float, rank: float) -> str | None:
        """What to say after a record with these statistics: nothing, nearly always."""
        if step <= self._grace or (spread >= SPREAD and rank >= self._lowest_rank):
            self.since, self.told = None, False
            return None
        if self.since is None:
            self.since = step
        if self.told or step - self.since < PATIENCE:
            return None
        self.told = True
        where = "in one point" if spread < SPREAD else "on one line"
        return (
            f"COLLAPSE at step {step}: for {step - self.since} steps the embeddings of different images have "
            f"been {where} (spread {spread:.3f}, rank {rank:.2f}). Such features are worth nothing, whatever "
            "the loss says. Usual causes: a stop-gradient, predictor or centring left out, lr too high, "
            "temperature too high."
        )
