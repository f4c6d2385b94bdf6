"""Tile: the image is cut into factor x factor tiles, each is encoded at the low-resolution size, features are stitched.

No parameters. It sees real detail, at the price of seams, repeated position artefacts and no context across tiles.
"""

import torch
from torch import Tensor

from featsharp.errors import ConfigError
from featsharp.ops.resize import resize, size_of
from featsharp.ops.tiling import blend_windows, join_tiles, split_tiles, window_starts
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
    # Tiles start at whole tokens, and how many pixels these have shows only in the low-resolution features.
    low_res, summary = _encode_in_batches(small, encode, max_tile_batch)
    rows, cols = size_of(low_res)
    starts = window_starts(factor * rows, rows, overlap), window_starts(factor * cols, cols, overlap)
    tops, lefts = [y * (height // rows) for y in starts[0]], [x * (width // cols) for x in starts[1]]
    windows = [large[..., top : top + height, left : left + width] for top in tops for left in lefts]
    tiles, _ = _encode_in_batches(torch.stack(windows, 1).flatten(0, 1), encode, max_tile_batch)
    return UpsampleFeatures(low_res, blend_windows(tiles, starts, (factor * rows, factor * cols)), summary)


def _encode_in_batches(images: Tensor, encode: Encode, limit: int | None) -> tuple[Tensor, Tensor | None]:
    """``encode`` of at most ``limit`` images at a time."""
    parts = [encode(batch) for batch in images.split(limit or len(images))]
    summaries = [summary for _, summary in parts if summary is not None]
    return torch.cat([features for features, _ in parts]), torch.cat(summaries) if summaries else None
