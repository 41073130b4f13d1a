"""Vision transformers as MoCo v3 trains them: timm's, with another position embedding and initialisation.

What differs from ``timm.models.vision_transformer.VisionTransformer``: the position embedding is sine and
cosine of row and column, and frozen; q, k and v are initialised as the three matrices that they are; 12 heads
in ViT-S as in ViT-B; the patch projection can stay as it was drawn. Parameter names are timm's.

Source: Chen, Xie, He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", sections 4
and 5; the convolutional stem: Xiao et al. 2021, "Early Convolutions Help Transformers See Better".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moco_fast import checks
from moco_fast.extras import extra

WAVELENGTH = 10_000.0  # longest of the position embedding, over 2 pi


def vit_small(stop_grad_conv1: bool = False, num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """ViT-S/16: 384 features, 12 blocks of 12 heads. Arguments: :func:`vit`."""
    return vit(384, 12, 12, stop_grad_conv1, num_classes, **kwargs)


def vit_base(stop_grad_conv1: bool = False, num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """ViT-B/16: 768 features, 12 blocks of 12 heads. Arguments: :func:`vit`."""
    return vit(768, 12, 12, stop_grad_conv1, num_classes, **kwargs)


def vit_conv_small(stop_grad_conv1: bool = False, num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """ViT-S with a convolutional stem, which takes the place of a block: 11. Arguments: :func:`vit`."""
    return vit(384, 11, 12, stop_grad_conv1, num_classes, conv_stem=True, **kwargs)


def vit_conv_base(stop_grad_conv1: bool = False, num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """ViT-B with a convolutional stem, which takes the place of a block: 11. Arguments: :func:`vit`."""
    return vit(768, 11, 12, stop_grad_conv1, num_classes, conv_stem=True, **kwargs)


def small_vit(
    num_classes: int = 128,
    in_chans: int = 1,
    img_size: int = 28,
    patch_size: int | None = None,
    stop_grad_conv1: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A transformer for small images that a CPU trains: 96 features, 4 blocks of 4 heads.

    Args:
        patch_size: a quarter of the image, so that there are 4 x 4 patches, unless given.
        num_classes, in_chans, img_size, stop_grad_conv1, kwargs: as in :func:`vit`.
    """
    if patch_size is None:
        patch_size = max(1, checks.count("img_size", img_size) // 4)
    return vit(
        96, 4, 4, stop_grad_conv1, num_classes,
        in_chans=in_chans, img_size=img_size, patch_size=patch_size, **kwargs,
    )  # fmt: skip


def vit(
    embed_dim: int,
    depth: int,
    num_heads: int,
    stop_grad_conv1: bool,
    num_classes: int,
    *,
    conv_stem: bool = False,
    img_size: int = 224,
    patch_size: int = 16,
    **kwargs: Any,
) -> nn.Module:
    """A vision transformer with a class token, whose feature the head takes.

    Args:
        embed_dim: features of a token, a multiple of 4.
        depth: blocks.
        num_heads: of every block.
        stop_grad_conv1: leave the patch projection as it was drawn, which makes training stable. A stem of
            convolutions has learned features and batch norms instead, and cannot be frozen.
        num_classes: outputs of the head.
        conv_stem: 3x3 convolutions of stride 2 with batch norm and ReLU, then a 1x1 convolution, in place of
            the patch projection.
        img_size: pixels on a side, a multiple of ``patch_size``.
        patch_size: pixels on a side; a power of 2 with ``conv_stem``.
        kwargs: further arguments of timm's ``VisionTransformer``, such as ``in_chans`` or ``drop_path_rate``.

    Raises:
        ImportError: timm is missing.
        TypeError, ValueError: a size that does not fit; stop_grad_conv1 with a convolutional stem.
    """
    checks.count("img_size", img_size)
    checks.count("patch_size", patch_size)
    if img_size % patch_size:
        raise ValueError(f"img_size must be a multiple of patch_size={patch_size}, got {img_size}")
    if conv_stem and stop_grad_conv1:
        raise ValueError(
            "stop_grad_conv1 freezes a patch projection, but the conv variants have a stem in its place, "
            "which must be trained: leave it out, or take vit_small or vit_base"
        )
    if conv_stem and (patch_size & (patch_size - 1) or patch_size == 1):
        raise ValueError(f"patch_size must be a power of 2 above 1 for a stem, got {patch_size}")
    model = extra("timm.models.vision_transformer").VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        num_classes=num_classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="skip",
        **kwargs,
    )
    positions = sin_cos_positions(img_size // patch_size, embed_dim)
    found = None if model.pos_embed is None else tuple(model.pos_embed.shape)
    if found != positions.shape:
        raise ValueError(
            f"the position embedding must have shape {tuple(positions.shape)}, one class token and every "
            f"patch; {', '.join(kwargs)} would make it {found}"
        )
    model.pos_embed = nn.Parameter(positions, requires_grad=False)
    nn.init.normal_(model.cls_token, std=1e-6)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for matrix in module.weight.data.chunk(3 if name.endswith("attn.qkv") else 1):
                nn.init.xavier_uniform_(matrix)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = model.patch_embed.proj
    if conv_stem:
        model.patch_embed.proj = _stem(projection.in_channels, embed_dim, patch_size)
    else:
        nn.init.xavier_uniform_(projection.weight.data.flatten(1))  # as the matrix of a patch's pixels
        nn.init.zeros_(projection.bias)
        projection.requires_grad_(not stop_grad_conv1)
    return model


def sin_cos_positions(
    grid: int,  # patches on a side
    features: int,
) -> Tensor:
    """Position embedding of a class token, zero, and of ``grid`` x ``grid`` patches, row by row.

    With frequencies ``w_i = 10000^(-4 i / features)``, a quarter of the features each: the sine of
    ``row w_i``, its cosine, sine and cosine of ``column w_i``. Source: Vaswani et al. 2017, "Attention Is All
    You Need", section 3.5, in two dimensions.

    Returns:
        (1, 1 + grid * grid, features)

    Raises:
        ValueError: features is not a multiple of 4.
    """
    if features % 4:
        raise ValueError(
            f"embed_dim must be a multiple of 4, for two waves in two dimensions, got {features}"
        )
    quarter = features // 4
    frequencies = WAVELENGTH ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, quarter)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    patches = torch.cat([waves.repeat_interleave(grid, 0), waves.repeat(grid, 1)], dim=1)
    return torch.cat([torch.zeros(1, features, dtype=patches.dtype), patches])[None].to(
        torch.get_default_dtype()
    )


def _stem(channels: int, features: int, patch_size: int) -> nn.Sequential:
    """Convolutions that halve the image until a patch is a pixel, doubling channels up to ``features``."""
    count = patch_size.bit_length() - 1
    layers: list[nn.Module] = []
    for i in range(count):
        out = features >> (count - 1 - i)
        layers += [
            nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        ]
        channels = out
    return nn.Sequential(*layers, nn.Conv2d(channels, features, 1))
