"""Tile: the image is cut into tiles, each is encoded at the low-resolution size, the features are stitched.

No parameters. It has real detail, at the price of seams, repeated position artefacts and no context across tiles.
FeatSharp (arXiv 2502.16025) has it as an input and as a baseline. For how tiles are cut, see
:mod:`featsharp.layers.tiles`.
"""

from torch import Tensor

from featsharp.ops.boxes import Box
from featsharp.upsamplers.chunked import ComputeTiledChunk, TiledUpsampler
from featsharp.upsamplers.registration import register_upsampler


@register_upsampler("tile", "tiles of the image, encoded one by one and stitched")
class Tile(TiledUpsampler):
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
    options = ("overlap", "max_tile_batch")

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeTiledChunk:
        def compute(box: Box, tiles: Tensor | None) -> Tensor:
            assert tiles is not None
            return tiles

        return compute
