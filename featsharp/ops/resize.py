"""Resizing with one convention for the whole package.

Convention:
    Pixel centres at half-integers (``align_corners=False``); an axis that shrinks is antialiased.
"""

import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import InputError


def size_of(x: Tensor) -> tuple[int, int]:
    """(h, w) of an image or a map: its last two dimensions."""
    return x.shape[-2], x.shape[-1]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize; exactly ``F.interpolate(mode="bilinear")`` when no axis shrinks.

    Args:
        x: [B, C, H, W], floating point.
        size: Target (h, w), at least 1 each.

    Returns:
        [B, C, h, w] in the dtype of ``x``; ``x`` itself when the size is already right.
    """
    if x.ndim != 4 or min(size) < 1:
        raise InputError(f"resize takes a [B, C, H, W] tensor and a size of at least 1x1; got {tuple(x.shape)}, {size}")
    if size_of(x) == tuple(size):
        return x
    shrinks = size[0] < x.shape[-2] or size[1] < x.shape[-1]
    if not shrinks:
        return F.interpolate(x, size, mode="bilinear", align_corners=False)
    # The antialiased kernel has no half-precision CPU version.
    full = x.float() if x.dtype.itemsize < 4 else x
    return F.interpolate(full, size, mode="bilinear", align_corners=False, antialias=True).to(x.dtype)
