"""Tile: the image is cut into factor x factor tiles, each is encoded at the low-resolution size, features are stitched.

No parameters. It sees real detail, at the price of seams, repeated position artefacts and no context across tiles.
"""

import torch
from torch import Tensor

from featsharp.ops.resize import resize
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
    """Low-resolution features and the stitched tile map, from as few calls of ``encode`` as ``max_tile_batch`` allows."""
    batch = image.shape[0]
    height, width = low_res_size
    low_res_image = resize(image, low_res_size)
    large = resize(image, (factor * height, factor * width))
    if overlap == 0:
        low_res, tiles, summary = _encode_together(low_res_image, split_tiles(large, (factor, factor)), encode, max_tile_batch)
        return UpsampleFeatures(low_res, join_tiles(tiles, (factor, factor)), summary)
    # Where tiles start depends on the token grid, which the patch size of the backbone decides.
    low_res, _, summary = _encode_together(low_res_image, low_res_image[:0], encode, max_tile_batch)
    grid = tuple(low_res.shape[-2:])
    patch = (height // grid[0], width // grid[1])
    starts = tuple(window_starts(factor * n, n, overlap) for n in grid)
    windows = [
        large[..., y * patch[0] : y * patch[0] + height, x * patch[1] : x * patch[1] + width]
        for y in starts[0]
        for x in starts[1]
    ]
    tiles, _ = _encode_chunks(torch.stack(windows, 1).flatten(0, 1), encode, max_tile_batch)
    high_res = blend_windows(tiles, (starts[0], starts[1]), (factor * grid[0], factor * grid[1]))
    assert high_res.shape[0] == batch
    return UpsampleFeatures(low_res, high_res, summary)


def _encode_together(
    low_res_image: Tensor, tiles: Tensor, encode: Encode, max_tile_batch: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One batch of the low-resolution images and all tiles; features of each, and the summary of the former."""
    batch = low_res_image.shape[0]
    features, summary = _encode_chunks(torch.cat([low_res_image, tiles]), encode, max_tile_batch)
    return features[:batch], features[batch:], None if summary is None else summary[:batch]


def _encode_chunks(images: Tensor, encode: Encode, max_batch: int | None) -> tuple[Tensor, Tensor | None]:
    chunks = [encode(chunk) for chunk in images.split(max_batch or len(images))]
    summaries = [summary for _, summary in chunks if summary is not None]
    return torch.cat([features for features, _ in chunks]), torch.cat(summaries) if summaries else None
