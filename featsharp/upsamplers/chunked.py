"""Sharp features within a given amount of memory.

The low-resolution pass comes first and shows what one pass through the backbone costs. Then the tiles go through it, as
many at a time as fit, straight into the map that is to be returned, and the upsampler turns that map part by part into
the result, in parts as large as fit. What a part costs is predicted from shapes alone (:mod:`featsharp.memory`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featsharp.errors import ConfigError, InputError
from featsharp.memory import PeakMeter, format_memory, predict, return_freed_memory
from featsharp.ops.boxes import Box
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.base import Encode, UpsampleFeatures, Upsampler

# What PyTorch's operators and the allocator take unseen: a part of the memory, and heap for small tensors.
UNSEEN_SHARE, UNSEEN_BYTES = 0.1, 2**24
# Sides of the square parts that are tried in turn. Larger ones only leave the caches; smaller ones compute more cells
# twice, those at their edges.
PART_SIDES = (128, 96, 64, 48, 32, 24, 16, 12, 8)

# (low-resolution features [B, C, h, w], shape [B, C, H, W], dtype) -> room for the high-resolution ones
Allocate = Callable[[Tensor, tuple[int, ...], torch.dtype], Tensor]


def allocate_beside(low_res: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room on the device of the low-resolution features."""
    return low_res.new_empty(shape, dtype=dtype)


@torch.no_grad()
def upsample_within(
    upsampler: Upsampler,
    image: Tensor,
    encode: Encode,
    low_res_size: tuple[int, int],
    max_memory: int,
    *,
    output_size: tuple[int, int] | None = None,
    finish: Callable[[Tensor], Tensor] = lambda features: features,
    allocate: Allocate = allocate_beside,
) -> UpsampleFeatures:
    """What ``upsampler(image, encode, low_res_size, output_size)`` returns, up to rounding, without gradients.

    Args:
        image: [B, 3, H, W], B >= 1; processed one by one.
        max_memory: Bytes that may be taken beside weights, inputs and results.
        output_size: (H, W) of the result in cells; None: by the factor.
        finish: Applied to both maps: [B, C, h, w] to the same shape, every cell on its own.
        allocate: Makes the high-resolution map, for example in a file.

    Raises:
        InputError: When that is too little for this image, with the least that works; without an image.
        ConfigError: When the upsampler cannot work by parts, or is in training.
    """
    if not upsampler.by_parts:
        raise ConfigError(
            f"{type(upsampler).__name__} makes its map in one piece, so its memory cannot be limited; leave out "
            "max_memory or take another upsampler"
        )
    if upsampler.training:
        raise ConfigError("max_memory is for encoders in eval mode; call eval() first, or set max_memory to None")
    if not len(image):
        raise InputError("max_memory needs at least one image; got an empty batch")
    with return_freed_memory():
        return _upsample_within(upsampler, image, encode, low_res_size, output_size, max_memory, finish, allocate)


def _upsample_within(
    upsampler: Upsampler,
    image: Tensor,
    encode: Encode,
    low_res_size: tuple[int, int],
    output_size: tuple[int, int] | None,
    max_memory: int,
    finish: Callable[[Tensor], Tensor],
    allocate: Allocate,
) -> UpsampleFeatures:
    with PeakMeter() as meter:
        features, summary = encode(resize(image[:1], low_res_size))
    grid, size = size_of(features), upsampler.high_res_grid(features, output_size)
    plan = _plan(upsampler, features, image, low_res_size, size, meter.peak, max_memory, finish)
    low_res, summaries = [features], [summary]
    for i in range(1, len(image)):
        features, summary = encode(resize(image[i : i + 1], low_res_size))
        low_res.append(features)
        summaries.append(summary)
    finished = torch.cat([finish(features) for features in low_res])
    out = allocate(finished, (*finished.shape[:2], *size), plan.dtype)
    for i, features in enumerate(low_res):
        one, target = image[i : i + 1], out[i : i + 1]
        if upsampler.halo is not None:
            upsampler.write_tiles(target, one, encode, low_res_size, grid, plan.tile_batch)
        _upsample_parts(upsampler, features, one, target, plan.part, finish)
    found = [summary for summary in summaries if summary is not None]
    return UpsampleFeatures(finished, out, torch.cat(found) if found else None)


@dataclass(frozen=True)
class _Plan:
    tile_batch: int  # images that go through the backbone at once
    part: tuple[int, int]  # (h, w) of the parts of the result
    dtype: torch.dtype  # of the result


def _plan(
    upsampler: Upsampler,
    low_res: Tensor,
    images: Tensor,
    low_res_size: tuple[int, int],
    size: tuple[int, int],
    pass_bytes: int,
    max_memory: int,
    finish: Callable[[Tensor], Tensor],
) -> _Plan:
    # Low-resolution features of all images, and once more while they are put together.
    held = 2 * len(images) * low_res.nbytes
    large_bytes = 0  # the image that tiles are cut from, where it has to be resized
    height, width = size_of(low_res)
    large = size[0] * (low_res_size[0] // height), size[1] * (low_res_size[1] // width)
    if upsampler.halo is not None and size_of(images) != large:
        large_bytes = images.shape[1] * large[0] * large[1] * images.element_size()
    held_for_passes = held + large_bytes

    available = int((1 - UNSEEN_SHARE) * max_memory) - UNSEEN_BYTES
    for side in PART_SIDES:
        part = _even_share(size[0], side), _even_share(size[1], side)
        part_bytes, result = predict(_prepare_and_make_part, upsampler, finish, low_res, images[:1], size, part)
        part_bytes += held
        if part_bytes <= available:
            break
    pass_needs = held_for_passes + pass_bytes
    if max(pass_needs, part_bytes) > available:
        least = int((max(pass_needs, part_bytes) + UNSEEN_BYTES) / (1 - UNSEEN_SHARE)) + 1
        raise InputError(
            f"max_memory={format_memory(max_memory)} is too little: one pass through the backbone takes "
            f"{format_memory(pass_needs)}, {part[0]}x{part[1]} features {format_memory(part_bytes)}; the least that "
            f"works for this image is {format_memory(least)}"
        )
    # A backbone outside of PyTorch shows no memory at all.
    return _Plan(max(1, (available - held_for_passes) // max(1, pass_bytes)), part, result.dtype)


def _even_share(length: int, side: int) -> int:
    """The largest of the fewest parts of at most ``side`` cells."""
    return -(-length // -(-length // side))


def _prepare_and_make_part(
    upsampler: Upsampler,
    finish: Callable[[Tensor], Tensor],
    low_res: Tensor,
    image: Tensor,
    size: tuple[int, int],
    part: tuple[int, int],
) -> Tensor:
    """All that lives while a part in the middle of the map is made."""
    top, left = (size[0] - part[0]) // 2, (size[1] - part[1]) // 2
    box = Box(top, top + part[0], left, left + part[1])
    guide = upsampler.prepare(low_res, image, size)
    tiles = kept = None
    if upsampler.halo is not None:
        # What _KeptTiles holds: two times the rows above, and the columns to the left.
        seen = box.grow(upsampler.halo, size).size
        kept = low_res.new_empty(1, upsampler.embed_dim, upsampler.halo, 2 * size[1] + seen[0])
        below = low_res.new_empty(1, upsampler.embed_dim, *seen)
        tiles = torch.cat([below])
        del below
    result = finish(upsampler.upsample_part(low_res, guide, tiles, box, size))
    del tiles, kept
    return result


def _upsample_parts(
    upsampler: Upsampler,
    low_res: Tensor,
    image: Tensor,
    out: Tensor,
    part: tuple[int, int],
    finish: Callable[[Tensor], Tensor],
) -> None:
    """Turn ``out`` from the tile map, where there is one, into the result."""
    size = size_of(out)
    guide: Any = upsampler.prepare(low_res, image, size)
    kept = None if upsampler.halo is None else _KeptTiles(out, upsampler.halo, low_res)
    for top in range(0, size[0], part[0]):
        for left in range(0, size[1], part[1]):
            box = Box(top, min(size[0], top + part[0]), left, min(size[1], left + part[1]))
            tiles = None if kept is None else kept.read(box)
            box.cut(out).copy_(finish(upsampler.upsample_part(low_res, guide, tiles, box, size)))


class _KeptTiles:
    """A tile map that is overwritten part by part, in row-major order; keeps what later parts still have to see."""

    def __init__(self, out: Tensor, halo: int, like: Tensor) -> None:
        self._out, self._halo, self._like = out, halo, like
        # Rows above the current band of parts, and those above the next one.
        self._above = self._next_above = like.new_empty(*out.shape[:2], 0, out.shape[3])
        # Columns to the left of the next part, from its first row downwards.
        self._left = self._above

    def read(self, box: Box) -> Tensor:
        """The tile map of ``box`` and ``halo`` cells around it; ``box`` may be overwritten afterwards."""
        seen = box.grow(self._halo, size_of(self._out))
        if box.left == 0:
            self._above = self._next_above
            new = min(self._halo, box.bottom - box.top)
            old = self._above[:, :, max(0, self._above.shape[2] + new - self._halo) :]
            last = self._fetch(Box(box.bottom - new, box.bottom, 0, self._out.shape[3]))
            self._next_above = torch.cat([old, last], 2)
        below = self._fetch(Box(box.top, seen.bottom, box.left, seen.right))
        if box.left > 0:
            below = torch.cat([self._left, below], 3)
        first = max(0, box.right - self._halo)
        self._left = below[..., first - seen.left : box.right - seen.left].clone()
        return torch.cat([self._above[..., seen.left : seen.right], below], 2)

    def _fetch(self, box: Box) -> Tensor:
        return box.cut(self._out).to(self._like)
