"""What the scripts train: a convolutional network with torchvision's names, on images of noise."""

import numpy
import torch
from PIL import Image
from torch import nn


class Tiny(nn.Module):
    """Stem, batch norm, one more layer, ``fc``."""

    def __init__(self, num_classes=1000, zero_init_residual=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, num_classes)
        if zero_init_residual:
            nn.init.zeros_(self.layer1[0].bias)

    def forward(self, x):
        return self.fc(self.layer1(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


tiny = Tiny


class Noise(torch.utils.data.Dataset):
    """Smooth random images, each of its own; the label is whether red is above the average."""

    def __init__(self, count, transform, size=20):
        self.transform = transform
        coarse = numpy.random.default_rng(7).integers(0, 256, (count, 4, 4, 3), dtype=numpy.uint8)
        self.images = [Image.fromarray(image).resize((size, size), Image.BILINEAR) for image in coarse]
        self.labels = (coarse[..., 0].mean((1, 2)) > coarse.mean((1, 2, 3))).astype(int)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), int(self.labels[index])
