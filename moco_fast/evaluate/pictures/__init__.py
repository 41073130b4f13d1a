"""Pictures of a run and of what it learned.

Tests: tests/test_pictures.py, tests/test_confusion.py, tests/test_embedding.py.
"""

from moco_fast.evaluate.pictures.confusion import plot_confusion
from moco_fast.evaluate.pictures.curves import plot_curves
from moco_fast.evaluate.pictures.embedding import plot_embedding
from moco_fast.evaluate.pictures.neighbours import plot_neighbours

__all__ = ["plot_confusion", "plot_curves", "plot_embedding", "plot_neighbours"]
