"""Features on a plane: t-SNE of their principal components.

Tests: tests/test_embedding.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_fast.data.fraction import turns
from moco_fast.extras import extra

COMPONENTS = 50  # kept before t-SNE, as its authors do
PERPLEXITY = 30.0
FEWEST = 5  # points below which there is no neighbourhood to keep


def embed(
    features: Tensor,  # (N, F), any floating dtype
    seed: int,
) -> Tensor:
    """Places (N, 2) float32 in which features of high cosine similarity are close: t-SNE.

    Unit rows, their first 50 principal components, then t-SNE with perplexity 30 (less for under 100 rows)
    from the first two components. The same for the same seed.

    Raises:
        ValueError: fewer than 5 rows, or features that are not finite.

    Source: van der Maaten and Hinton 2008, "Visualizing Data using t-SNE", section 4.
    """
    if features.ndim != 2 or len(features) < FEWEST:
        raise ValueError(f"features must be (N, F) with at least {FEWEST} rows, got {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("features must be finite, but some hold inf or nan")
    rows = F.normalize(features.detach().cpu().double(), dim=1)
    rows = rows - rows.mean(0)
    # Signs of singular vectors are arbitrary: the largest coordinate of each is made positive.
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions[:COMPONENTS]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    parts = rows @ (directions * largest.sign()).T
    spread = parts[:, 0].std().clamp(min=1e-12)
    start = F.pad(parts, (0, max(0, 2 - parts.shape[1])))[:, :2] / spread * 1e-4
    tsne = extra("sklearn.manifold").TSNE(
        perplexity=min(PERPLEXITY, (len(rows) - 1) / 3), init=start.float().numpy(), random_state=seed
    )
    # Its parallel parts are so short that threads cost more than they save; and one adds in the same order.
    with extra("threadpoolctl").threadpool_limits(1):
        return torch.from_numpy(tsne.fit_transform(parts.float().numpy()))


def spread_over_classes(
    labels: Tensor | None,  # (N,) integers
    count: int,
    most: int,
    seed: int,
) -> Tensor:
    """At most ``most`` of ``count`` rows, sorted, drawn alike from every class; from all rows without labels.

    A class with fewer images than its share gives all it has, and the others make up for it.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    if labels is None:
        return order[:most].sort().values
    # Whoever has an early turn in its class is taken.
    turn = turns(labels, order)[order]
    return order[turn.argsort(stable=True)[:most]].sort().values
