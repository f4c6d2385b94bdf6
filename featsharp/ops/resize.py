"""Resizing with one convention for the whole package.

Convention:
    Pixel centres at half-integers (``align_corners=False``); an axis that shrinks is antialiased.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import InputError
from featsharp.memory import register_scratch
from featsharp.ops.boxes import Box, whole
from featsharp.ops.recording import is_multiple, is_open, is_same, is_tracing

MAX_SIDE = 10**9  # of a size that is asked for; products of larger ones overflow


def size_of(x: Tensor) -> tuple[int, int]:
    """(h, w) of an image or a map: its last two dimensions."""
    if is_tracing():  # sizes are tensors then, of which most of what is computed from them cannot be
        return int(x.shape[-2]), int(x.shape[-1])
    return x.shape[-2], x.shape[-1]


def check_size(name: str, size: Any, unit: str) -> tuple[int, int]:
    """Return the ``size`` (h, w) that a user gave as ``name`` in ints; InputError unless it is two whole numbers."""
    try:
        if any(side is True or side is False for side in size):
            raise TypeError
        # index() would fix a size that a graph leaves open.
        sides: list[Any] = [x if isinstance(x, int | torch.SymInt) else operator.index(x) for x in size]
        height, width = sides
    except (TypeError, ValueError):
        raise InputError(f"{name} is (height, width), two whole numbers of {unit}; got {size!r}") from None
    if any(type(side) is int and side > MAX_SIDE for side in (height, width)):  # one left open gets no guard
        raise InputError(f"{name} has sides of at most {MAX_SIDE} {unit}; got {height}x{width}")
    return height, width


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize; exactly ``F.interpolate(mode="bilinear")`` when no axis shrinks.

    Args:
        x: [B, C, H, W], floating point.
        size: Target (h, w), at least 1 each.

    Returns:
        [B, C, h, w] in the dtype of ``x``; ``x`` itself when the size is already right.
    """
    if x.ndim != 4 or size[0] < 1 or size[1] < 1:
        raise InputError(f"resize takes a [B, C, H, W] tensor and a size of at least 1x1; got {tuple(x.shape)}, {size}")
    if is_same(size_of(x), size):
        return x
    if not is_open(*size, *size_of(x)):
        shrinks = size[0] < x.shape[-2] or size[1] < x.shape[-1]
        if not shrinks:
            return F.interpolate(x, size, mode="bilinear", align_corners=False)
    return resample(x, size, "bilinear")  # which fits open sizes too: it changes nothing where no axis shrinks


def resample(x: Tensor, size: tuple[int, int], mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """Resize [B, C, H, W] with antialias: [B, C, h, w] in the dtype of ``x``."""
    full = x.float() if x.dtype.itemsize < 4 else x  # on a CPU there is no kernel for half types
    if is_tracing() or full.device.type == "mps":  # nor an operator of ONNX, nor in every torch one for MPS
        return _weigh_axes(full, size, partial(_antialias_weights, mode=mode)).to(x.dtype)
    return F.interpolate(full, size, mode=mode, align_corners=False, antialias=True).to(x.dtype)


def average(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average [B, C, H, W] over the cells of a grid (h, w), as ``F.adaptive_avg_pool2d`` does: [B, C, h, w]."""
    # ONNX and MPS have no operator for sides that do not divide; torch unrolls one for those of recorded images.
    if is_tracing() or x.device.type == "mps":
        fits = size_of(x) == tuple(size)
    else:
        fits = not is_open(*size, *size_of(x)) or is_multiple(size_of(x), size)
    return F.adaptive_avg_pool2d(x, size) if fits else _weigh_axes(x, size, _average_weights)


def _weigh_axes(x: Tensor, size: tuple[int, int], weights: Callable[[int, int], Tensor]) -> Tensor:
    """Multiply both axes of [B, C, H, W] by matrices, of ``weights(source, target)``: [B, C, *size]."""
    rows, columns = (weights(*sides).to(x) for sides in zip(size_of(x), size, strict=True))
    if is_tracing():
        return rows @ x @ columns.T
    maps = x.flatten(0, 1)
    # Not @, which reshapes by rules that depend on lengths that a graph of torch.export may leave open.
    rows, columns = (matrix.expand(maps.shape[0], -1, -1) for matrix in (rows, columns.T))
    return torch.bmm(torch.bmm(rows, maps), columns).unflatten(0, x.shape[:2])


def _average_weights(source: int, target: int) -> Tensor:
    """Matrix [target, source] of means over the cells of an axis, parts of which overlap where they do not divide."""
    cell, position = torch.arange(target, device="cpu")[:, None], torch.arange(source, device="cpu")
    inside = ((position + 1) * target > cell * source) & (position * target < (cell + 1) * source)
    weights = inside.double()
    return weights / weights.sum(1, keepdim=True)


def _antialias_weights(source: int, target: int, mode: str) -> Tensor:
    """Matrix [target, source] of antialiased resizing along one axis."""
    import numpy as np

    step = source / target
    centres = (np.arange(target)[:, None] + 0.5) * step
    x = np.abs(np.arange(source) + 0.5 - centres) / max(step, 1)
    if mode == "bilinear":
        weights = np.clip(1 - x, 0, None)
    else:  # Keys' cubic with a = -0.5
        weights = np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))
    return torch.from_numpy(weights / weights.sum(1, keepdims=True))


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


def enlarge_aligned(x: Tensor, chunk: Box, source_size: tuple[int, int], size: tuple[int, int], box: Box) -> Tensor:
    """Compute cells ``box`` of a bilinear enlargement with ``align_corners=True``; arguments as :func:`enlarge_chunk`.

    Only where weights were trained with it: it moves cells against the features of the image.
    """
    if box.covers(size):
        return F.interpolate(x, size, mode="bilinear", align_corners=True)
    lines = ((2, box.top, box.bottom, chunk.top), (3, box.left, box.right, chunk.left))
    for (dim, start, stop, first), source, target in zip(lines, source_size, size, strict=True):
        step = (source - 1) / max(target - 1, 1)
        position = torch.arange(start, stop, dtype=torch.float32, device=x.device) * step
        before = position.long().clamp(max=source - 1)
        after = (before + 1).clamp(max=source - 1)
        weight = (position - before).to(x.dtype).unflatten(0, (-1, *(3 - dim) * [1]))
        x = torch.lerp(x.index_select(dim, before - first), x.index_select(dim, after - first), weight)
    return x


def resample_chunk(x: Tensor, chunk: Box, source_size: tuple[int, int], size: tuple[int, int], box: Box) -> Tensor:
    """Compute cells ``box`` of ``resize(whole map, size)``, shrinking or not, from a chunk of the map.

    Args:
        x: [B, C, *chunk.size].
        chunk: Cells of the map that ``x`` holds, at least :func:`resample_box` of ``box``.
        source_size: (h, w) of the whole map.
        size: (H, W) of the whole result.
        box: Cells of it.

    Returns:
        [B, C, *box.size], up to rounding.
    """
    if source_size == size:
        return box.relative_to(chunk).cut(x)
    if box.covers(size):
        return resize(x, size)
    lines = ((chunk.top, chunk.bottom, box.top, box.bottom), (chunk.left, chunk.right, box.left, box.right))
    rows, cols = (
        _bilinear_weights(source, target, *line).to(x)
        for source, target, line in zip(source_size, size, lines, strict=True)
    )
    return rows @ x @ cols.T


def resample_box(box: Box, source_size: tuple[int, int], size: tuple[int, int]) -> Box:
    """Compute the cells of a map of ``source_size`` that the cells ``box`` of it, resized to ``size``, depend on."""
    if source_size == size:
        return box
    if box.covers(size):
        return whole(source_size)
    spans: list[int] = []
    for source, target, start, stop in zip(source_size, size, box[::2], box[1::2], strict=True):
        reach = math.ceil(max(source / target, 1)) + 1
        spans += [max(0, start * source // target - reach), min(source, stop * source // target + 1 + reach)]
    return Box(*spans)


def _bilinear_weights(source: int, target: int, first: int, last: int, start: int, stop: int) -> Tensor:
    """Matrix [start..stop, first..last] of antialiased resizing of an axis of ``source`` cells to ``target``."""
    step = source / target
    centres = (torch.arange(start, stop, dtype=torch.float64, device="cpu")[:, None] + 0.5) * step
    places = torch.arange(first, last, dtype=torch.float64, device="cpu") + 0.5
    weights = (1 - (places - centres).abs() / max(step, 1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def find_neighbours(source: int, target: int, cells: range, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Locate some of ``target`` cells of an axis among ``source`` cells: those before and after, distance to before."""
    centres = torch.arange(cells.start, cells.stop, dtype=torch.float32, device=device) + 0.5
    position = (centres * (source / target) - 0.5).clamp(min=0)
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
