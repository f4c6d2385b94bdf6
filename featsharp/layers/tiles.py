"""Tile maps: the image is cut into tiles, each is encoded at the low-resolution size, the features are stitched.

A factor f that is whole gives f x f tiles side by side. For other factors and sizes the fewest tiles that cover the map
are spread evenly over it, and their overlap absorbs the remainder.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from featsharp.ops.boxes import Box
from featsharp.ops.recording import is_recording
from featsharp.ops.resize import average, enlarge_chunk, resize, size_of, source_box
from featsharp.ops.tiling import add_windows, blend_windows, join_tiles, split_tiles, window_starts

# Whitened images [N, 3, h*p, w*p] -> features [N, C, h, w] and a summary [N, C_s] or None.
EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor | None]]
# Applied to the features of tiles [N, C, h, w] before they are stitched.
Process = Callable[[Tensor], Tensor]


def keep_tiles(tiles: Tensor) -> Tensor:
    """Return the features of tiles as they are."""
    return tiles


def compute_details(tiles: Tensor) -> Tensor:
    """Subtract from every tile [N, C, h, w] its blur: the means of 2 x 2 cells, enlarged again."""
    half = (tiles.shape[-2] + 1) // 2, (tiles.shape[-1] + 1) // 2  # ONNX rounds a negative quotient up
    return tiles - resize(average(tiles, half), size_of(tiles))


def encode_with_tiles(
    image: Tensor,
    encode: EncodeImages,
    low_res_size: tuple[int, int],
    factor: int | float | None,
    map_size: Callable[[Tensor], tuple[int, int]],
    *,
    overlap: int = 0,
    max_tile_batch: int | None = None,
    process: Process = keep_tiles,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Encode an image and its tiles, with as few calls of ``encode`` as the batch limit allows.

    Args:
        image: [B, 3, height, width], whitened, any size.
        encode: See :data:`EncodeImages`.
        low_res_size: (h, w) of the low-resolution pass and of a tile, in pixels.
        factor: Of the map over the low-resolution grid; None for a map of another size.
        map_size: Returns the (H, W) of the map for low-resolution features.
        overlap: Least number of tokens that neighbours share.
        max_tile_batch: Most images given to ``encode`` at once; None: all of them.
        process: Applied to the features of the tiles before they are stitched.

    Returns:
        Low-resolution features [B, C, h, w], the tile map [B, C, H, W], and the summary of the low-resolution pass.
    """
    small = resize(image, low_res_size)
    if factor == 1:
        low_res, summary = encode_in_batches(small, encode, max_tile_batch)
        # The one tile is the whole image.
        return low_res, process(low_res), summary
    if overlap == 0 and isinstance(factor, int):
        # All at once: the grid need not be known before.
        large = resize(image, (factor * low_res_size[0], factor * low_res_size[1]))
        tiles = split_tiles(large, (factor, factor))
        features, summary = encode_in_batches(torch.cat([small, tiles]), encode, max_tile_batch)
        low_res, high_res = features.split([small.shape[0], tiles.shape[0]])
        summary = None if summary is None else summary[: small.shape[0]]
        return low_res, join_tiles(process(high_res), (factor, factor)), summary
    low_res, summary = encode_in_batches(small, encode, max_tile_batch)
    tile_map = encode_tile_map(
        image,
        encode,
        low_res_size,
        size_of(low_res),
        map_size(low_res),
        overlap=overlap,
        max_tile_batch=max_tile_batch,
        process=process,
    )
    return low_res, tile_map, summary


def encode_tile_map(
    image: Tensor,
    encode: EncodeImages,
    low_res_size: tuple[int, int],
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    overlap: int = 0,
    max_tile_batch: int | None = None,
    process: Process = keep_tiles,
) -> Tensor:
    """Encode the fewest tiles that cover a map of ``size``, blended where they overlap.

    Args:
        image: [B, 3, height, width], whitened, any size.
        encode: See :data:`EncodeImages`.
        low_res_size: (h, w) of a tile in pixels.
        grid: (h, w) of a tile in tokens.
        size: (H, W) of the map in tokens, at least ``grid``.
        overlap: Least number of tokens that neighbours share.
        max_tile_batch: Most images given to ``encode`` at once; None: all of them.
        process: Applied to the features of the tiles before they are blended.

    Returns:
        [B, C, H, W].
    """
    boxes, large_size, starts = _place_windows(low_res_size, grid, size, overlap)
    large = resize(image, large_size)
    windows = [box.cut(large) for box in boxes]
    tiles, _ = encode_in_batches(torch.stack(windows, 1).flatten(0, 1), encode, max_tile_batch)
    return blend_windows(process(tiles), starts, size)


def write_tile_map(
    out: Tensor,
    image: Tensor,
    encode: EncodeImages,
    low_res_size: tuple[int, int],
    grid: tuple[int, int],
    *,
    overlap: int = 0,
    max_tile_batch: int,
    process: Process = keep_tiles,
) -> None:
    """Write the :func:`encode_tile_map` of one image [1, 3, height, width] into ``out`` [1, C, H, W].

    Tiles of an enlarged image are enlarged one by one: a map with a cell per pixel needs p x p times its pixels.
    """
    boxes, large, starts = _place_windows(low_res_size, grid, size_of(out), overlap)
    if shrinks(image, large):
        image = resize(image, large)
    out.zero_()
    for first in range(0, len(boxes), max_tile_batch):
        some = boxes[first : first + max_tile_batch]
        windows = image.new_empty(len(some), image.shape[1], *low_res_size)
        for number, box in enumerate(some):
            source = source_box(box, size_of(image), large)
            windows[number] = enlarge_chunk(source.cut(image), source, size_of(image), large, box)[0]
        features, _ = encode(windows)
        add_windows(out, process(features)[None].to(out.dtype), starts, first)


def shrinks(image: Tensor, size: tuple[int, int]) -> bool:
    """Return whether an image is larger than ``size`` (h, w) along an axis."""
    return image.shape[-2] > size[0] or image.shape[-1] > size[1]


def _place_windows(
    window: tuple[int, int], grid: tuple[int, int], size: tuple[int, int], overlap: int
) -> tuple[list[Box], tuple[int, int], tuple[list[int], list[int]]]:
    """Place views of ``window`` pixels that cover the large image, row by row.

    Windows start at whole tokens, of which each has ``grid`` (h, w).

    Returns:
        The windows, the (h, w) of the large image, and the tokens that windows start at.
    """
    pixels = window[0] // grid[0], window[1] // grid[1]
    starts = window_starts(size[0], grid[0], overlap), window_starts(size[1], grid[1], overlap)
    corners = [(y * pixels[0], x * pixels[1]) for y in starts[0] for x in starts[1]]
    boxes = [Box(y, y + window[0], x, x + window[1]) for y, x in corners]
    return boxes, (size[0] * pixels[0], size[1] * pixels[1]), starts


def encode_in_batches(images: Tensor, encode: EncodeImages, limit: int | None) -> tuple[Tensor, Tensor | None]:
    """Encode at most ``limit`` images at a time; all at once without one, or in a recorded graph."""
    if limit is None or is_recording():
        return encode(images)
    outputs = [encode(batch) for batch in images.split(limit)]
    summaries = [summary for _, summary in outputs if summary is not None]
    return torch.cat([features for features, _ in outputs]), torch.cat(summaries) if summaries else None
