"""Tile: the image is cut into factor x factor tiles, each is encoded at the low-resolution size, features are stitched.

No parameters. It sees real detail, at the price of seams, repeated position artefacts and no context across tiles.
"""

import torch
from torch import Tensor

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box
from featsharp.ops.resize import resize, size_of
from featsharp.ops.tiling import add_windows, blend_windows, join_tiles, split_tiles, window_starts
from featsharp.upsamplers.base import Encode, UpsampleFeatures, Upsampler
from featsharp.upsamplers.registration import register_upsampler


@register_upsampler("tile", "factor x factor tiles of the image, encoded one by one and stitched")
class Tile(Upsampler):
    """Stitched tile features.

    Args:
        embed_dim: Channels C.
        factor: Tiles per axis.
        overlap: Least number of tokens that neighbouring tiles share; more tiles are then encoded, and where they
            overlap they are blended linearly, which hides the seams. 0 gives factor x factor tiles, side by side.
        max_tile_batch: Most images given to ``encode`` at once; None: all of them, the fastest.
    """

    needs = "image, tiles"
    by_parts = True
    halo = 0

    def __init__(self, embed_dim: int, factor: int, *, overlap: int = 0, max_tile_batch: int | None = None) -> None:
        super().__init__(embed_dim, factor)
        self.overlap = overlap
        self.max_tile_batch = max_tile_batch

    @property
    def input_upsample_factor(self) -> int:
        return self.factor

    def forward(self, image: Tensor, encode: Encode, low_res_size: tuple[int, int]) -> UpsampleFeatures:
        return encode_tiles(
            image, encode, low_res_size, self.factor, overlap=self.overlap, max_tile_batch=self.max_tile_batch
        )

    def write_tiles(
        self, out: Tensor, image: Tensor, encode: Encode, low_res_size: tuple[int, int], max_tile_batch: int
    ) -> None:
        write_tiles(out, image, encode, low_res_size, self.factor, overlap=self.overlap, max_tile_batch=max_tile_batch)

    def upsample_part(self, low_res: Tensor, guide: None, tiles: Tensor | None, box: Box) -> Tensor:
        assert tiles is not None
        return tiles


def encode_tiles(
    image: Tensor,
    encode: Encode,
    low_res_size: tuple[int, int],
    factor: int,
    *,
    overlap: int = 0,
    max_tile_batch: int | None = None,
) -> UpsampleFeatures:
    """Low-resolution features and the stitched tile map, with as few calls of ``encode`` as the batch limit allows."""
    if max_tile_batch is not None and max_tile_batch < 1:
        raise ConfigError(f"max_tile_batch must be at least 1, or None for no limit; got {max_tile_batch}")
    height, width = low_res_size
    small, large = resize(image, low_res_size), resize(image, (factor * height, factor * width))
    if overlap == 0:
        tiles = split_tiles(large, (factor, factor))
        features, summary = _encode_in_batches(torch.cat([small, tiles]), encode, max_tile_batch)
        low_res, high_res = features.split([len(small), len(tiles)])
        summary = None if summary is None else summary[: len(small)]
        return UpsampleFeatures(low_res, join_tiles(high_res, (factor, factor)), summary)
    low_res, summary = _encode_in_batches(small, encode, max_tile_batch)
    grid = size_of(low_res)
    windows, starts = _cut_windows(large, low_res_size, grid, overlap)
    tiles, _ = _encode_in_batches(torch.stack(windows, 1).flatten(0, 1), encode, max_tile_batch)
    return UpsampleFeatures(low_res, blend_windows(tiles, starts, (factor * grid[0], factor * grid[1])), summary)


def write_tiles(
    out: Tensor,
    image: Tensor,
    encode: Encode,
    low_res_size: tuple[int, int],
    factor: int,
    *,
    overlap: int = 0,
    max_tile_batch: int,
) -> None:
    """The tile map of :func:`encode_tiles` for one image [1, 3, H, W], written to ``out`` [1, C, fh, fw]."""
    large = resize(image, (factor * low_res_size[0], factor * low_res_size[1]))
    windows, starts = _cut_windows(large, low_res_size, (out.shape[2] // factor, out.shape[3] // factor), overlap)
    out.zero_()
    for first in range(0, len(windows), max_tile_batch):
        features, _ = encode(torch.cat(windows[first : first + max_tile_batch]))
        add_windows(out, features[None].to(out.dtype), starts, first)


def _cut_windows(
    image: Tensor, size: tuple[int, int], grid: tuple[int, int], overlap: int
) -> tuple[list[Tensor], tuple[list[int], list[int]]]:
    """Views of the windows of ``size`` pixels that cover an image, row by row, and the tokens that they start at.

    Windows start at whole tokens, of which each has ``grid`` (h, w).
    """
    pixels = size[0] // grid[0], size[1] // grid[1]
    tokens = image.shape[2] // pixels[0], image.shape[3] // pixels[1]
    starts = window_starts(tokens[0], grid[0], overlap), window_starts(tokens[1], grid[1], overlap)
    corners = [(y * pixels[0], x * pixels[1]) for y in starts[0] for x in starts[1]]
    return [image[..., y : y + size[0], x : x + size[1]] for y, x in corners], starts


def _encode_in_batches(images: Tensor, encode: Encode, limit: int | None) -> tuple[Tensor, Tensor | None]:
    """``encode`` of at most ``limit`` images at a time."""
    parts = [encode(batch) for batch in images.split(limit or len(images))]
    summaries = [summary for _, summary in parts if summary is not None]
    return torch.cat([features for features, _ in parts]), torch.cat(summaries) if summaries else None
