"""Resizing with one convention for the whole package.

Convention:
    Pixel centres at half-integers (``align_corners=False``); an axis that shrinks is antialiased.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import InputError
from featsharp.ops.boxes import Box
from featsharp.ops.peak import register_scratch


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


def enlarge(x: Tensor, factor: int, box: Box) -> Tensor:
    """The cells ``box`` of ``x`` [B, C, h, w] enlarged bilinearly by a whole factor: [B, C, *box.size].

    Equal to those cells of :func:`resize` up to rounding; looks only at what they depend on.
    """
    return _enlarge_axis(_enlarge_axis(x, factor, box.top, box.bottom, 2), factor, box.left, box.right, 3)


def source_box(box: Box, factor: int, size: tuple[int, int]) -> Box:
    """The cells of a map of ``size`` (h, w) that the cells ``box`` of the enlarged one depend on."""
    inner = Box(box.top // factor, (box.bottom - 1) // factor + 1, box.left // factor, (box.right - 1) // factor + 1)
    return inner.grow(1, size)


def _enlarge_axis(x: Tensor, factor: int, start: int, stop: int, dim: int) -> Tensor:
    position = ((torch.arange(start, stop, device=x.device) + 0.5) / factor - 0.5).clamp(min=0)
    before = position.long().clamp(max=x.shape[dim] - 1)
    after = (before + 1).clamp(max=x.shape[dim] - 1)
    share = (position - before).to(x.dtype).unflatten(0, (-1, *(3 - dim) * [1]))
    return torch.lerp(x.index_select(dim, before), x.index_select(dim, after), share)


def _antialias_scratch(x: Tensor, size: list[int], *rest: object) -> int:
    """Antialiased resizing shrinks one axis after the other, with a map in between."""
    return x[..., 0].numel() * size[1] * x.itemsize


register_scratch(torch.ops.aten._upsample_bilinear2d_aa.default, _antialias_scratch)
