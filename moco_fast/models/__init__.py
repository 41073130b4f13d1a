"""Models: MoCo and the backbones made for it."""
