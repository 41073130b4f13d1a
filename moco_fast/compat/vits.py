"""``vits`` of the official v3 repository; the functions need timm."""

from moco_fast.models.vits import vit_base, vit_conv_base, vit_conv_small, vit_small

__all__ = ["vit_base", "vit_conv_base", "vit_conv_small", "vit_small"]
