"""Sharp features within a given amount of memory.

The low-resolution pass comes first and shows what one pass through the backbone costs. Then the tiles go through it, as
many at a time as fit, straight into the map that is to be returned, and the upsampler turns that map part by part into
the result, in parts as large as fit. What a part costs is predicted from shapes alone (:mod:`featsharp.ops.peak`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box
from featsharp.ops.memory import return_freed_memory
from featsharp.ops.peak import PeakMeter, format_memory, predict_peak
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.base import Encode, UpsampleFeatures, Upsampler

# What PyTorch's operators and the allocator take unseen: a part of the memory, and heap for small tensors.
UNSEEN_SHARE, UNSEEN_BYTES = 0.1, 2**24
# Cells of a part that are enough for speed; larger ones only leave the caches.
PART_CELLS = 2**14
# Sides of the square parts that are tried in turn where so many cells do not fit. Smaller parts compute more cells
# twice, those at their edges.
PART_SIDES = (128, 96, 64, 48, 32, 24, 16, 12, 8)

# (low-resolution features [B, C, h, w], shape [B, C, H, W]) -> room for the high-resolution ones
Allocate = Callable[[Tensor, tuple[int, ...]], Tensor]


@torch.compiler.disable  # it looks at what it computes, which a graph cannot
@torch.no_grad()
def upsample_within(
    upsampler: Upsampler,
    image: Tensor,
    encode: Encode,
    low_res_size: tuple[int, int],
    max_memory: int,
    *,
    finish: Callable[[Tensor], Tensor] = lambda features: features,
    allocate: Allocate = Tensor.new_empty,
) -> UpsampleFeatures:
    """What ``upsampler(image, encode, low_res_size)`` returns, up to rounding, without gradients.

    Args:
        image: [B, 3, H, W]; processed one by one.
        max_memory: Bytes that may be taken beside weights, inputs and results.
        finish: Applied to both maps: [B, C, h, w] to the same shape, every cell on its own.
        allocate: Makes the high-resolution map, for example in a file.

    Raises:
        ConfigError: When that is too little, with the least that works, or the upsampler cannot work by parts.
    """
    if not upsampler.by_parts:
        raise ConfigError(
            f"{type(upsampler).__name__} makes its map in one piece, so its memory cannot be limited; leave out "
            "max_memory or take another upsampler"
        )
    with return_freed_memory():
        return _upsample_within(upsampler, image, encode, low_res_size, max_memory, finish, allocate)


def _upsample_within(
    upsampler: Upsampler,
    image: Tensor,
    encode: Encode,
    low_res_size: tuple[int, int],
    max_memory: int,
    finish: Callable[[Tensor], Tensor],
    allocate: Allocate,
) -> UpsampleFeatures:
    with PeakMeter() as meter:
        first, summary = encode(resize(image[:1], low_res_size))
    plan = _plan(upsampler, first, image[:1], low_res_size, meter.peak, max_memory, finish)
    passes = [(first, summary), *(encode(resize(one, low_res_size)) for one in image[1:].split(1))]
    low_res = torch.cat([features for features, _ in passes])
    summaries = [summary for _, summary in passes if summary is not None]
    del first, passes
    finished = finish(low_res)
    shape = (*low_res.shape[:2], *(side * upsampler.factor for side in size_of(low_res)))
    out = allocate(finished, shape)
    for one, features, target in zip(image.split(1), low_res.split(1), out.split(1), strict=True):
        if upsampler.halo is not None:
            upsampler.write_tiles(target, one, encode, low_res_size, plan.tile_batch)
        _upsample_parts(upsampler, features, one, target, plan.part, finish)
    return UpsampleFeatures(finished, out, torch.cat(summaries) if summaries else None)


@dataclass(frozen=True)
class _Plan:
    tile_batch: int  # images that go through the backbone at once
    part: tuple[int, int]  # (h, w) of the parts of the result


def _plan(
    upsampler: Upsampler,
    low_res: Tensor,
    image: Tensor,
    low_res_size: tuple[int, int],
    pass_bytes: int,
    max_memory: int,
    finish: Callable[[Tensor], Tensor],
) -> _Plan:
    height, width = upsampler.high_res_grid(low_res)
    large_bytes = 0  # the resized image that tiles are cut from
    if upsampler.halo is not None:
        pixels = low_res_size[0] * low_res_size[1] * upsampler.factor**2
        large_bytes = pixels * image.shape[1] * image.element_size()
    pass_bytes += large_bytes

    available = int((1 - UNSEEN_SHARE) * max_memory) - UNSEEN_BYTES
    rows = max(PART_SIDES[0], PART_CELLS // width)
    for part in ((rows, width), *((side, side) for side in PART_SIDES)):
        part = min(part[0], height), min(part[1], width)
        part_bytes = predict_peak(_prepare_and_make_part, upsampler, finish, low_res, image, part)
        if part_bytes <= available:
            break
    least = max(pass_bytes, part_bytes)
    if least > available:
        raise ConfigError(
            f"max_memory={format_memory(max_memory)} is too little: one pass through the backbone takes "
            f"{format_memory(pass_bytes)}, {part[0]}x{part[1]} features {format_memory(part_bytes)}; the least that "
            f"works for this image is {format_memory(int((least + UNSEEN_BYTES) / (1 - UNSEEN_SHARE)) + 1)}"
        )
    return _Plan(max(1, (available - large_bytes) // (pass_bytes - large_bytes)), part)


def _prepare_and_make_part(
    upsampler: Upsampler,
    finish: Callable[[Tensor], Tensor],
    low_res: Tensor,
    image: Tensor,
    part: tuple[int, int],
) -> None:
    """All that lives while a part in the middle of the map is made."""
    size = upsampler.high_res_grid(low_res)
    top, left = (size[0] - part[0]) // 2, (size[1] - part[1]) // 2
    box = Box(top, top + part[0], left, left + part[1])
    guide = upsampler.prepare(low_res, image)
    tiles = kept = None
    if upsampler.halo is not None:
        seen = box.grow(upsampler.halo, size).size
        tiles = low_res.new_empty(1, upsampler.embed_dim, *seen)
        # What _upsample_parts keeps: two times the rows above, and the columns to the left.
        kept = low_res.new_empty(1, upsampler.embed_dim, upsampler.halo, 2 * size[1] + seen[0])
    finish(upsampler.upsample_part(low_res, guide, tiles, box))
    del tiles, kept


def _upsample_parts(
    upsampler: Upsampler,
    low_res: Tensor,
    image: Tensor,
    out: Tensor,
    part: tuple[int, int],
    finish: Callable[[Tensor], Tensor],
) -> None:
    """Turn ``out`` from the tile map, where there is one, into the result."""
    guide: Any = upsampler.prepare(low_res, image)
    size = size_of(out)
    kept = None if upsampler.halo is None else _KeptTiles(out, upsampler.halo, low_res.device)
    for top in range(0, size[0], part[0]):
        for left in range(0, size[1], part[1]):
            box = Box(top, min(size[0], top + part[0]), left, min(size[1], left + part[1]))
            tiles = None if kept is None else kept.read(box)
            box.cut(out).copy_(finish(upsampler.upsample_part(low_res, guide, tiles, box)))


class _KeptTiles:
    """A tile map that is overwritten part by part, in row-major order; keeps what later parts still have to see."""

    def __init__(self, out: Tensor, halo: int, device: torch.device) -> None:
        self._out, self._halo, self._device = out, halo, device
        # Rows above the current band of parts, and those above the next one.
        self._above = self._next_above = out.new_empty(*out.shape[:2], 0, out.shape[3], device=device)
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
        return box.cut(self._out).to(self._device)
