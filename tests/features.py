"""Features that are hard on a loss."""

import torch
from torch.nn import functional as F


def far(cosine, n, slots, c):
    """Queries at about this cosine to every row of a queue; keys that are nearly rows of it; the queue."""
    torch.manual_seed(0)
    pole = F.normalize(torch.randn(c), dim=0)
    beside = torch.randn(slots, c)
    beside = F.normalize(beside - (beside @ pole)[:, None] * pole, dim=1)
    queue = cosine * pole + (1 - cosine**2) ** 0.5 * beside
    return pole + 0.02 * torch.randn(n, c), queue[:n] + 0.05 * torch.randn(n, c), queue
