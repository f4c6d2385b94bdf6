"""Tile: the image is cut into tiles, each is encoded at the low-resolution size, the features are stitched.

No parameters. It sees real detail, at the price of seams, repeated position artefacts and no context across tiles.
FeatSharp (arXiv 2502.16025) has it as an input and as a baseline.

A factor f that is whole gives f x f tiles side by side. For other factors and sizes the fewest tiles that cover the map
are spread evenly over it, and their overlap absorbs the remainder.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.ops.boxes import Box
from featsharp.ops.resize import resize, size_of
from featsharp.ops.tiling import add_windows, blend_windows, join_tiles, split_tiles, window_starts
from featsharp.upsamplers.base import Encode, UpsampleFeatures, Upsampler, check_whole
from featsharp.upsamplers.registration import register_upsampler

# Of the features of tiles [N, C, h, w], before they are stitched.
Process = Callable[[Tensor], Tensor]


def unchanged(tiles: Tensor) -> Tensor:
    """Tiles are stitched as they are."""
    return tiles


def fine_part(tiles: Tensor) -> Tensor:
    """Every tile [N, C, h, w] minus its own blur: the means of 2 x 2 cells, enlarged again."""
    half = -(-tiles.shape[-2] // 2), -(-tiles.shape[-1] // 2)
    return tiles - resize(F.adaptive_avg_pool2d(tiles, half), size_of(tiles))


@register_upsampler("tile", "tiles of the image, encoded one by one and stitched")
class Tile(Upsampler):
    """Stitched tile features.

    Args:
        embed_dim: Channels C.
        factor: Tiles per axis, where whole.
        overlap: Least number of tokens that neighbouring tiles share; more tiles are then encoded, and where they
            overlap they are blended linearly, which hides the seams. 0 gives factor x factor tiles, side by side.
        max_tile_batch: Most images given to ``encode`` at once; None: all of them, the fastest.
    """

    needs = "image, tiles"
    keeps_space = "nearly"
    by_parts = True
    halo = 0

    def __init__(self, embed_dim: int, factor: float, *, overlap: int = 0, max_tile_batch: int | None = None) -> None:
        super().__init__(embed_dim, factor)
        self.overlap = check_whole("overlap", overlap, 0)
        self.max_tile_batch = check_tile_batch(max_tile_batch)

    @property
    def input_upsample_factor(self) -> float:
        return self.factor

    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        return encode_tiles(
            self, image, encode, low_res_size, output_size, overlap=self.overlap, max_tile_batch=self.max_tile_batch
        )

    def write_tiles(
        self,
        out: Tensor,
        image: Tensor,
        encode: Encode,
        low_res_size: tuple[int, int],
        grid: tuple[int, int],
        max_tile_batch: int,
    ) -> None:
        write_tiles(out, image, encode, low_res_size, grid, overlap=self.overlap, max_tile_batch=max_tile_batch)

    def upsample_part(
        self, low_res: Tensor, guide: None, tiles: Tensor | None, box: Box, size: tuple[int, int]
    ) -> Tensor:
        assert tiles is not None
        return tiles


def check_tile_batch(limit: int | None) -> int | None:
    """``limit`` itself; ConfigError for one that lets nothing through."""
    return None if limit is None else check_whole("max_tile_batch", limit, 1)


def encode_tiles(
    upsampler: Upsampler,
    image: Tensor,
    encode: Encode,
    low_res_size: tuple[int, int],
    output_size: tuple[int, int] | None = None,
    *,
    overlap: int = 0,
    max_tile_batch: int | None = None,
    process: Process = unchanged,
) -> UpsampleFeatures:
    """Low-resolution features and the stitched tile map, with as few calls of ``encode`` as the batch limit allows.

    The size of the map is what ``upsampler`` makes of the low-resolution grid. ``process`` is what happens to the
    features of the tiles before they are stitched.
    """
    small = resize(image, low_res_size)
    factor = upsampler.factor
    if factor == 1 and output_size is None:
        low_res, summary = _encode_in_batches(small, encode, max_tile_batch)
        # The one tile is the whole image.
        return UpsampleFeatures(low_res, process(low_res), summary)
    if overlap == 0 and output_size is None and isinstance(factor, int):
        # All at once: the grid need not be known before.
        large = resize(image, (factor * low_res_size[0], factor * low_res_size[1]))
        tiles = split_tiles(large, (factor, factor))
        features, summary = _encode_in_batches(torch.cat([small, tiles]), encode, max_tile_batch)
        low_res, high_res = features.split([len(small), len(tiles)])
        summary = None if summary is None else summary[: len(small)]
        return UpsampleFeatures(low_res, join_tiles(process(high_res), (factor, factor)), summary)
    low_res, summary = _encode_in_batches(small, encode, max_tile_batch)
    size = upsampler.high_res_grid(low_res, output_size)
    tiles = tile_map(
        image,
        encode,
        low_res_size,
        size_of(low_res),
        size,
        overlap=overlap,
        max_tile_batch=max_tile_batch,
        process=process,
    )
    return UpsampleFeatures(low_res, tiles, summary)


def tile_map(
    image: Tensor,
    encode: Encode,
    low_res_size: tuple[int, int],
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    overlap: int = 0,
    max_tile_batch: int | None = None,
    process: Process = unchanged,
) -> Tensor:
    """The features of the fewest tiles that cover a map of ``size``, blended where they overlap.

    Args:
        image: [B, 3, height, width], whitened, any size.
        encode: See :class:`featsharp.upsamplers.base.Encode`.
        low_res_size: (h, w) of a tile in pixels.
        grid: (h, w) of a tile in tokens.
        size: (H, W) of the map in tokens, at least ``grid``.
        overlap: Least number of tokens that neighbours share.
        max_tile_batch: Most images given to ``encode`` at once; None: all of them.
        process: What happens to the features of the tiles before they are blended.

    Returns:
        [B, C, H, W].
    """
    windows, starts = _cut_windows(image, low_res_size, grid, size, overlap)
    tiles, _ = _encode_in_batches(torch.stack(windows, 1).flatten(0, 1), encode, max_tile_batch)
    return blend_windows(process(tiles), starts, size)


def write_tiles(
    out: Tensor,
    image: Tensor,
    encode: Encode,
    low_res_size: tuple[int, int],
    grid: tuple[int, int],
    *,
    overlap: int = 0,
    max_tile_batch: int,
    process: Process = unchanged,
) -> None:
    """:func:`tile_map` of one image [1, 3, height, width], written to ``out`` [1, C, H, W]."""
    windows, starts = _cut_windows(image, low_res_size, grid, size_of(out), overlap)
    out.zero_()
    for first in range(0, len(windows), max_tile_batch):
        features, _ = encode(torch.cat(windows[first : first + max_tile_batch]))
        add_windows(out, process(features)[None].to(out.dtype), starts, first)


def _cut_windows(
    image: Tensor, window: tuple[int, int], grid: tuple[int, int], size: tuple[int, int], overlap: int
) -> tuple[list[Tensor], tuple[list[int], list[int]]]:
    """Views of the windows of ``window`` pixels that cover the large image, row by row, and the tokens they start at.

    Windows start at whole tokens, of which each has ``grid`` (h, w).
    """
    pixels = window[0] // grid[0], window[1] // grid[1]
    large = resize(image, (size[0] * pixels[0], size[1] * pixels[1]))
    starts = window_starts(size[0], grid[0], overlap), window_starts(size[1], grid[1], overlap)
    corners = [(y * pixels[0], x * pixels[1]) for y in starts[0] for x in starts[1]]
    return [large[..., y : y + window[0], x : x + window[1]] for y, x in corners], starts


def _encode_in_batches(images: Tensor, encode: Encode, limit: int | None) -> tuple[Tensor, Tensor | None]:
    """``encode`` of at most ``limit`` images at a time."""
    parts = [encode(batch) for batch in images.split(limit or len(images))]
    summaries = [summary for _, summary in parts if summary is not None]
    return torch.cat([features for features, _ in parts]), torch.cat(summaries) if summaries else None
