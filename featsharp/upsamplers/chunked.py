"""Upsamplers that compute their map chunk by chunk, and the planning that keeps them within a given amount of memory.

A method implements ``prepare_chunks`` and says its ``halo``; without a limit the whole map is one chunk. With one,
the low-resolution pass comes first, and its memory is that of a pass through the backbone. Then the tiles are encoded,
as many at a time as fit, into the map that is to be returned, and the upsampler overwrites that map chunk by chunk with
the result, in chunks as large as fit. The memory of a chunk is predicted from shapes alone (:mod:`featsharp.memory`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from featsharp.errors import ConfigError, InputError
from featsharp.layers.tiles import Process, encode_in_batches, encode_with_tiles, shrinks, write_tile_map
from featsharp.memory import PeakMeter, format_memory, predict, return_freed_memory
from featsharp.ops.boxes import Box, whole
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.base import (
    Encode,
    GuidedUpsampler,
    UpsampleFeatures,
    Upsampler,
    check_tile_batch,
    check_whole,
    weight_dtype,
)

# Memory of PyTorch's operators and the allocator that is not counted: a fraction, and heap for small tensors.
UNCOUNTED_FRACTION, UNCOUNTED_BYTES = 0.1, 2**24
# Sides of the square chunks that are tried in turn. Larger ones only leave the caches; smaller ones compute more cells
# at their edges twice.
CHUNK_SIDES = (128, 96, 64, 48, 32, 24, 16, 12, 8)

# Cells of the result -> their features [B, C, *box.size].
ComputeChunk = Callable[[Box], Tensor]
# The same from the tile map of these cells and the halo around them; None for options that use no tiles.
ComputeTiledChunk = Callable[[Box, Tensor | None], Tensor]
# Cells of the result -> the tile map of these and the halo around them; None without tiles.
ReadTiles = Callable[[Box], Tensor | None]
# (low-resolution features [B, C, h, w], shape [B, C, H, W], dtype) -> tensor to write the high-resolution ones to
Allocate = Callable[[Tensor, tuple[int, ...], torch.dtype], Tensor]


class ChunkedUpsampler(Upsampler):
    """Base of methods that can compute their map chunk by chunk, such as the two kinds below.

    Attributes:
        halo: Cells of the tile map around a chunk, in each direction, that the chunk depends on (0 without tiles). None
            for options with which a method needs all of the map at once: the whole map is then its only chunk.
        uses_tiles: Whether chunks depend on a tile map.
    """

    halo: int | None = 0
    uses_tiles: bool = False

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> Callable[..., Tensor]:
        """Compute all that chunks of a map share, and return the function that computes a chunk.

        Args:
            low_res: [B, C, h, w], or what :meth:`encode_rest` made of it.
            image: [B, 3, height, width], whitened, any size.
            size: (H, W) of the whole map.

        Returns:
            A function of a box of cells that returns their features [B, C, *box.size]. That of a
            :class:`TiledUpsampler` is a function of the box and of the tile map of this box and ``halo`` cells around
            it, as far as they exist (None for options that use no tiles).
        """
        raise NotImplementedError

    def encode_rest(
        self, low_res: Tensor, image: Tensor, encode: Encode, low_res_size: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        """Encode what all chunks share beside the low-resolution pass, for methods with passes that are no tiles.

        Its memory is predicted: shapes must not depend on values.

        Args:
            low_res: [B, C, h, w].
            image: [B, 3, height, width], any size.
            encode: See :class:`Encode`.
            low_res_size: (h, w) in pixels of the low-resolution pass.
            size: (H, W) of the whole map.

        Returns:
            A tensor in place of ``low_res`` for :meth:`prepare_chunks`.
        """
        return low_res


class ChunkedGuidedUpsampler(ChunkedUpsampler, GuidedUpsampler):
    """A guided upsampler that works in chunks; subclasses implement ``prepare_chunks`` instead of ``upsample_to``."""

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        return self.prepare_chunks(features, image, size)(whole(size))


class TiledUpsampler(ChunkedUpsampler):
    """An upsampler that encodes tiles; subclasses implement ``prepare_chunks`` and, where needed, ``process_tiles``.

    Args:
        embed_dim: Channels C.
        factor: In each direction.
        overlap: Least number of tokens that neighbouring tiles share; more tiles are then encoded, and where they
            overlap they are blended linearly. 0 gives factor x factor tiles, side by side.
        max_tile_batch: Most images given to ``encode`` at once; None: all of them, the fastest.
    """

    uses_tiles = True

    def __init__(self, embed_dim: int, factor: float, *, overlap: int = 0, max_tile_batch: int | None = None) -> None:
        super().__init__(embed_dim, factor)
        self.overlap = check_whole("overlap", overlap, 0)
        self.max_tile_batch = check_tile_batch(max_tile_batch)

    @property
    def input_upsample_factor(self) -> float:
        return self.factor if self.uses_tiles else 1

    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        if self.uses_tiles:
            low_res, tiles, summary = self.encode_tiles(image, encode, low_res_size, output_size)
        else:
            (low_res, summary), tiles = encode(resize(image, low_res_size)), None
        size = self.high_res_grid(low_res, output_size)
        return UpsampleFeatures(low_res, self.fuse(low_res, image, tiles, size), summary)

    def fuse(self, low_res: Tensor, image: Tensor, tiles: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Compute the whole map from low-resolution features and the tile map.

        Args:
            low_res: [B, C, h, w].
            image: [B, 3, height, width], any size.
            tiles: The tile map [B, ..., *size] after :meth:`process_tiles`; None without tiles.
            size: (H, W) of the result.

        Returns:
            [B, C, H, W] in the dtype of ``low_res``.
        """
        dtype = weight_dtype(self) or low_res.dtype
        tiles = None if tiles is None else tiles.to(dtype)
        chunk = self.prepare_chunks(low_res.to(dtype), image.to(dtype), size)(whole(size), tiles)
        return chunk.to(low_res.dtype)

    def process_tiles(self, tiles: Tensor) -> Tensor:
        """Process the features of tiles [N, C, h, w] before they are stitched: [N, ..., h, w]."""
        return tiles

    def encode_tiles(
        self,
        image: Tensor,
        encode: Encode,
        low_res_size: tuple[int, int],
        output_size: tuple[int, int] | None = None,
        *,
        process: Process | None = None,
    ) -> UpsampleFeatures:
        """Encode low-resolution features and, as ``high_res``, the tile map.

        Args:
            image: [B, 3, height, width], any size.
            encode: See :class:`Encode`.
            low_res_size: (h, w) in pixels of the low-resolution pass and of a tile.
            output_size: (H, W) of the tile map; None: by the factor.
            process: Used instead of :meth:`process_tiles`.
        """
        return UpsampleFeatures(
            *encode_with_tiles(
                image,
                encode,
                low_res_size,
                self.factor if output_size is None else None,
                lambda low_res: self.high_res_grid(low_res, output_size),
                overlap=self.overlap,
                max_tile_batch=self.max_tile_batch,
                process=process or self.process_tiles,
            )
        )

    def write_tiles(
        self,
        out: Tensor,
        image: Tensor,
        encode: Encode,
        low_res_size: tuple[int, int],
        grid: tuple[int, int],
        batch: int,
    ) -> None:
        """Write the tile map of one image into ``out`` [1, C, H, W], ``batch`` tiles at a time.

        ``grid`` is the (h, w) of the low-resolution map.
        """
        write_tile_map(
            out,
            image,
            encode,
            low_res_size,
            grid,
            overlap=self.overlap,
            max_tile_batch=batch,
            process=self.process_tiles,
        )


def works_in_chunks(upsampler: Upsampler) -> bool:
    """Return whether the memory of an upsampler can be limited."""
    return isinstance(upsampler, ChunkedUpsampler) and upsampler.halo is not None


def allocate_beside(low_res: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate the high-resolution map on the device of the low-resolution features."""
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
    """Compute ``upsampler(image, encode, low_res_size, output_size)``, up to rounding, within ``max_memory``.

    Without gradients.

    Args:
        upsampler: In eval mode.
        image: [B, 3, H, W], B >= 1; processed one by one.
        encode: See :class:`Encode`.
        low_res_size: (h, w) in pixels of the low-resolution pass.
        max_memory: Bytes that may be taken beside weights, inputs and results.
        output_size: (H, W) of the result in cells; None: by the factor.
        finish: Applied to both maps: [B, C, h, w] to the same shape, every cell independently.
        allocate: Makes the high-resolution map, for example in a file.

    Raises:
        InputError: When the limit is too low for this image, with the least that works; without an image.
        ConfigError: When the upsampler cannot work in chunks, or is in training.
    """
    if not isinstance(upsampler, ChunkedUpsampler) or upsampler.halo is None:
        raise ConfigError(
            f"{type(upsampler).__name__} makes its map in one piece, so its memory cannot be limited; leave out "
            "max_memory or take another upsampler"
        )
    if upsampler.training:
        raise ConfigError("max_memory is for encoders in eval mode; call eval() first, or set max_memory to None")
    if image.shape[0] == 0:
        raise InputError("max_memory needs at least one image; got an empty batch")
    with return_freed_memory():
        with PeakMeter() as meter:
            first = encode(resize(image[:1], low_res_size))
        plan = _make_plan(
            upsampler, image, first[0], meter.peak, max_memory, low_res_size, output_size=output_size, finish=finish
        )
        return upsample_in_chunks(
            upsampler,
            image,
            encode,
            low_res_size,
            first,
            plan,
            output_size=output_size,
            finish=finish,
            allocate=allocate,
        )


@dataclass(frozen=True)
class Plan:
    """Sizes of chunks and batches for one map.

    Attributes:
        tile_batch: Tiles that the backbone encodes at once.
        chunk: (h, w) in cells of the chunks of the result.
        dtype: Of the result.
    """

    tile_batch: int
    chunk: tuple[int, int]
    dtype: torch.dtype


@torch.no_grad()
def upsample_in_chunks(
    upsampler: ChunkedUpsampler,
    image: Tensor,
    encode: Encode,
    low_res_size: tuple[int, int],
    first: tuple[Tensor, Tensor | None],
    plan: Plan,
    *,
    output_size: tuple[int, int] | None = None,
    finish: Callable[[Tensor], Tensor] = lambda features: features,
    allocate: Allocate = allocate_beside,
) -> UpsampleFeatures:
    """Compute a map by a plan; the other arguments are those of :func:`upsample_within`.

    ``first`` is what ``encode`` returned for the low-resolution pass of the first image.
    """
    features, summary = first
    grid, size = size_of(features), upsampler.high_res_grid(features, output_size)
    low_res, summaries = [features], [summary]
    for i in range(1, image.shape[0]):
        features, summary = encode(resize(image[i : i + 1], low_res_size))
        low_res.append(features)
        summaries.append(summary)
    finished = torch.cat([finish(features) for features in low_res])
    out = allocate(finished, (*finished.shape[:2], *size), plan.dtype)
    for i, features in enumerate(low_res):
        one, target = image[i : i + 1], out[i : i + 1]
        read_tiles: ReadTiles = _read_no_tiles
        if isinstance(upsampler, TiledUpsampler) and upsampler.uses_tiles:
            upsampler.write_tiles(target, one, encode, low_res_size, grid, plan.tile_batch)
            read_tiles = _OverwrittenTiles(target, upsampler.halo or 0, features).read
        features = upsampler.encode_rest(features, one, _split_batches(encode, plan.tile_batch), low_res_size, size)
        compute = _bind_tiles(upsampler, features, one, size, read_tiles)
        for box in _split(size, plan.chunk):
            box.cut(target).copy_(finish(compute(box)))
    some = [summary for summary in summaries if summary is not None]
    return UpsampleFeatures(finished, out, torch.cat(some) if some else None)


def _split(size: tuple[int, int], chunk: tuple[int, int]) -> list[Box]:
    """Split a map into chunks, row by row."""
    return [
        Box(top, min(size[0], top + chunk[0]), left, min(size[1], left + chunk[1]))
        for top in range(0, size[0], chunk[0])
        for left in range(0, size[1], chunk[1])
    ]


def _read_no_tiles(box: Box) -> None:
    return None


def _bind_tiles(
    upsampler: ChunkedUpsampler, low_res: Tensor, image: Tensor, size: tuple[int, int], read_tiles: ReadTiles
) -> ComputeChunk:
    """Prepare chunks of cells alone, whose tiles are read by ``read_tiles`` where the method takes them."""
    compute = upsampler.prepare_chunks(low_res, image, size)
    return (lambda box: compute(box, read_tiles(box))) if isinstance(upsampler, TiledUpsampler) else compute


def _split_batches(encode: Encode, limit: int) -> Encode:
    """Wrap ``encode`` so that it is given at most ``limit`` images at once."""

    def encode_some(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, Tensor | None]:
        return encode_in_batches(images, partial(encode, patch_stride=patch_stride), limit)

    return encode_some


def _predict_rest(
    upsampler: ChunkedUpsampler, low_res: Tensor, image: Tensor, low_res_size: tuple[int, int], size: tuple[int, int]
) -> tuple[int, float]:
    """Predict the bytes that :meth:`encode_rest` takes beside its passes, and its largest pass in small ones."""
    patch, largest = low_res_size[0] // low_res.shape[2], 1.0

    def encode(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, None]:
        nonlocal largest
        largest = max(largest, prod(size_of(images)) / prod(low_res_size))
        grid = (1 + (side - patch) // (patch_stride or patch) for side in size_of(images))
        return images.new_empty(len(images), low_res.shape[1], *grid, dtype=low_res.dtype), None

    taken, _ = predict(upsampler.encode_rest, low_res, image, _split_batches(encode, 1), low_res_size, size)
    return taken, largest


def _make_plan(
    upsampler: ChunkedUpsampler,
    images: Tensor,
    low_res: Tensor,
    pass_bytes: int,
    max_memory: int,
    low_res_size: tuple[int, int],
    *,
    output_size: tuple[int, int] | None,
    finish: Callable[[Tensor], Tensor],
) -> Plan:
    """Plan the largest chunks and tile batches that fit, for the arguments of :func:`upsample_within`.

    ``low_res`` are the features [1, C, h, w] of the first image, ``pass_bytes`` what their pass took.
    """
    grid, size = size_of(low_res), upsampler.high_res_grid(low_res, output_size)
    # Low-resolution features of all images, twice while they are concatenated.
    held = 2 * images.shape[0] * low_res.nbytes
    large_bytes = 0  # the image that tiles are cut from, where it has to be made smaller
    large = size[0] * (low_res_size[0] // grid[0]), size[1] * (low_res_size[1] // grid[1])
    if upsampler.uses_tiles and shrinks(images, large):
        large_bytes = images.shape[1] * large[0] * large[1] * images.element_size()
    rest_bytes, largest_pass = _predict_rest(upsampler, low_res, images[:1], low_res_size, size)
    held_for_passes = held + large_bytes + rest_bytes

    available = int((1 - UNCOUNTED_FRACTION) * max_memory) - UNCOUNTED_BYTES
    for side in CHUNK_SIDES:
        chunk = _even_length(size[0], side), _even_length(size[1], side)
        chunk_bytes, result = predict(_make_one_chunk, upsampler, finish, low_res, images[:1], size, chunk)
        chunk_bytes += held + rest_bytes
        if chunk_bytes <= available:
            break
    pass_needs = held_for_passes + int(largest_pass * pass_bytes)
    if max(pass_needs, chunk_bytes) > available:
        least = int((max(pass_needs, chunk_bytes) + UNCOUNTED_BYTES) / (1 - UNCOUNTED_FRACTION)) + 1
        raise InputError(
            f"max_memory={format_memory(max_memory)} is too little: one pass through the backbone takes "
            f"{format_memory(pass_needs)}, {chunk[0]}x{chunk[1]} features {format_memory(chunk_bytes)}; the least that "
            f"works for this image is {format_memory(least)}"
        )
    # The memory of a backbone outside of PyTorch is measured as 0.
    return Plan(max(1, (available - held_for_passes) // max(1, pass_bytes)), chunk, result.dtype)


def _even_length(length: int, side: int) -> int:
    """Split a length evenly into the fewest chunks of at most ``side`` cells; return the largest."""
    return -(-length // -(-length // side))


def _make_one_chunk(
    upsampler: ChunkedUpsampler,
    finish: Callable[[Tensor], Tensor],
    low_res: Tensor,
    image: Tensor,
    size: tuple[int, int],
    chunk: tuple[int, int],
) -> Tensor:
    """Compute a chunk in the middle of the map, with all tensors that are alive at that time."""
    top, left = (size[0] - chunk[0]) // 2, (size[1] - chunk[1]) // 2
    box = Box(top, top + chunk[0], left, left + chunk[1])
    tiles: Tensor | None = None
    cached = None
    compute = _bind_tiles(upsampler, low_res, image, size, lambda box: tiles)
    if upsampler.uses_tiles:
        # _OverwrittenTiles caches two times the rows above, and the columns to the left.
        halo = upsampler.halo or 0
        seen = box.grow(halo, size).size
        cached = low_res.new_empty(1, upsampler.embed_dim, halo, 2 * size[1] + seen[0])
        below = low_res.new_empty(1, upsampler.embed_dim, *seen)
        tiles = torch.cat([below])
        del below
    result = finish(compute(box))
    del cached
    return result


class _OverwrittenTiles:
    """A tile map that is overwritten chunk by chunk, in row-major order; caches the cells that later chunks read."""

    def __init__(self, out: Tensor, halo: int, like: Tensor) -> None:
        self._out, self._halo, self._like = out, halo, like
        # Rows above the current row of chunks, and those above the next one.
        self._above = self._next_above = like.new_empty(*out.shape[:2], 0, out.shape[3])
        # Columns to the left of the next chunk, from its first row downwards.
        self._left = self._above

    def read(self, box: Box) -> Tensor:
        """Read the tile map of ``box`` and ``halo`` cells around it; ``box`` may be overwritten afterwards."""
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
