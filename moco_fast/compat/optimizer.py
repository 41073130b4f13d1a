"""``moco.optimizer`` of the official v3 repository."""

from moco_fast.optim import LARS

__all__ = ["LARS"]
