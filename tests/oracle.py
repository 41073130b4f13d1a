"""``moco.builder`` in plain PyTorch, with official semantics: what a script on moco_fast has to equal."""

import torch

from bench.eager_moco import EagerDistributedMoCo
from bench.eager_moco_v3 import EagerMoCoV3 as MoCo_ResNet
from bench.eager_moco_v3 import EagerMoCoV3ViT as MoCo_ViT
from moco_fast import distributed

__all__ = ["MoCo", "MoCo_ResNet", "MoCo_ViT"]


class MoCo(EagerDistributedMoCo):
    """Shuffles the keys in the order that moco_fast draws."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.shuffle = distributed.BatchShuffle()

    def permutation(self, batch):
        if self.shuffle.generator is None:
            self.shuffle.agree(torch.device("cpu"))
        world = distributed.world_size()
        return distributed.balanced_order(world, batch // world, self.shuffle.generator)

    def forward(self, im_q, im_k):
        """Indices as ``accuracy`` needs them, whose last ``view`` current torch refuses for plain ones."""
        logits, labels = super().forward(im_q, im_k)
        return logits.as_subclass(ColumnMajor), labels


class ColumnMajor(torch.Tensor):
    def topk(self, *args):
        values, indices = self.as_subclass(torch.Tensor).topk(*args)
        return values, indices.t().contiguous().t()
