"""Resizing with one convention for the whole package.

Convention:
    Pixel centres at half-integers (``align_corners=False``); an axis that shrinks is antialiased.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import InputError
from featsharp.memory import register_scratch
from featsharp.ops.boxes import Box, whole


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


def enlarge(x: Tensor, size: tuple[int, int], box: Box) -> Tensor:
    """Compute the cells ``box`` of ``resize(x, size)``, for a ``size`` not below that of ``x`` [B, C, h, w].

    They equal those of ``resize`` up to rounding and are computed from no more than they depend on.
    """
    return enlarge_chunk(x, whole(size_of(x)), size_of(x), size, box)


def enlarge_chunk(x: Tensor, chunk: Box, source_size: tuple[int, int], size: tuple[int, int], box: Box) -> Tensor:
    """:func:`enlarge` a map of which only a chunk is given.

    Args:
        x: [B, C, *chunk.size].
        chunk: Cells of the map that ``x`` holds, at least :func:`source_box` of ``box``.
        source_size: (h, w) of the whole map.
        size: (H, W) of the whole enlarged map.
        box: Cells of it.

    Returns:
        [B, C, *box.size].
    """
    if box.covers(size):
        return resize(x, size)
    if source_size == size:
        return box.relative_to(chunk).cut(x)
    x = _enlarge_axis(x, chunk.top, source_size[0], size[0], box.top, box.bottom, 2)
    return _enlarge_axis(x, chunk.left, source_size[1], size[1], box.left, box.right, 3)


def source_box(box: Box, source_size: tuple[int, int], size: tuple[int, int]) -> Box:
    """Compute the cells of a map of ``source_size`` that the cells ``box`` of it, enlarged to ``size``, depend on."""
    (h, w), (height, width) = source_size, size
    inner = Box(
        box.top * h // height,
        (box.bottom * h - 1) // height + 1,
        box.left * w // width,
        (box.right * w - 1) // width + 1,
    )
    return inner.grow(1, source_size)


def find_neighbours(source: int, target: int, cells: range, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Locate some of ``target`` cells of an axis among ``source`` cells: those before and after, distance to before."""
    position = ((torch.arange(cells.start, cells.stop, device=device) + 0.5) * (source / target) - 0.5).clamp(min=0)
    before = position.long().clamp(max=source - 1)
    return before, (before + 1).clamp(max=source - 1), position - before


def _enlarge_axis(x: Tensor, first: int, source: int, target: int, start: int, stop: int, dim: int) -> Tensor:
    """Along one axis: the cells start..stop of a line of ``source`` cells, of which ``x`` has those from ``first``."""
    before, after, distance = find_neighbours(source, target, range(start, stop), x.device)
    weight = distance.to(x.dtype).unflatten(0, (-1, *(3 - dim) * [1]))
    return torch.lerp(x.index_select(dim, before - first), x.index_select(dim, after - first), weight)


def _antialias_scratch(x: Tensor, size: list[int], *rest: object) -> int:
    """Bytes of the map between the two axes, which antialiased resizing shrinks one after the other."""
    return x[..., 0].numel() * size[1] * x.itemsize


register_scratch(torch.ops.aten._upsample_bilinear2d_aa.default, _antialias_scratch)
