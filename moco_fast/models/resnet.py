"""A residual network for small images, under torchvision's parameter names.

ImageNet's stem (7x7, stride 2, max-pool) leaves a 28-pixel image 7 pixels wide before the first
block. Here the stem is one 3x3 convolution and the stages decide where to reduce. Names are
torchvision's (``conv1``, ``bn1``, ``layer1.0.conv1``, ..., ``fc``), so whatever reads a ResNet
checkpoint, replaces ``fc`` by a projection head or drops it for a linear probe works unchanged.

One layer is extra: the pooled features pass a batch norm without weights (``pool_norm``). Averages of
ReLU outputs are all positive, so fresh features of any two images have a cosine near one, and a short
run spends its time spreading them. Centred, the contrast starts at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class SmallResNet(nn.Module):
    """``fc(features(x))`` with 3x3 stem, stages of basic blocks and a global average.

    Args:
        num_classes: outputs of ``fc``.
        width: channels of the stem and of the first stage; doubled by every further stage.
        blocks: basic blocks per stage.
        strides: stride of the first block of every stage.
        stem_stride: stride of the stem.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        blocks: Sequence[int],
        strides: Sequence[int],
        stem_stride: int,
        in_channels: int,
    ) -> None:
        from torchvision.models.resnet import BasicBlock, conv1x1  # the package must import without it

        super().__init__()
        if len(blocks) == 0 or len(blocks) != len(strides):
            raise ValueError(f"blocks and strides must be of one length >= 1, got {blocks} and {strides}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, (name, count, stride) in enumerate(zip(self.stages, blocks, strides, strict=True)):
            out = width * 2**i
            shortcut = None
            if stride != 1 or channels != out:
                shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
            first = BasicBlock(channels, out, stride, shortcut)
            self.add_module(name, nn.Sequential(first, *(BasicBlock(out, out) for _ in range(count - 1))))
            channels = out
        self.pool_norm = nn.BatchNorm1d(channels, affine=False)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(
        self,
        x: Tensor,  # (N, in_channels, H, W)
    ) -> Tensor:
        """Pooled, centred features before ``fc``, (N, width * 2**(stages - 1))."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.pool_norm(x.mean((2, 3)))

    def forward(
        self,
        x: Tensor,  # (N, in_channels, H, W)
    ) -> Tensor:
        """``fc(features(x))``, (N, num_classes)."""
        return self.fc(self.features(x))


def small_resnet(
    num_classes: int = 128,
    width: int = 16,
    blocks: Sequence[int] = (1, 1, 1, 1),
    strides: Sequence[int] = (1, 2, 2, 2),
    stem_stride: int = 2,
    in_channels: int = 1,
) -> SmallResNet:
    """Build a :class:`SmallResNet`; the defaults suit 28-pixel grey images on a CPU.

    Usable as MoCo's ``base_encoder`` (called with ``num_classes`` alone).
    """
    return SmallResNet(num_classes, width, blocks, strides, stem_stride, in_channels)
