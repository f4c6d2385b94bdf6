"""S2, "Scaling on Scales" (arXiv 2403.13043): the features of several scales, one after the other on the channel axis.

At scale k the image is enlarged to k times the low-resolution pass and cut into tiles of that pass's size; scale 1 is
the low-resolution pass itself. The published method pools every scale back to the low-resolution grid, so that it adds
channels and no cells (``s2-pooled``); without the pooling (``s2``) the grid grows, and it can be compared with the
other upsamplers.

Differences from the published code: any aspect ratio and fractional scales, with tiles that overlap where they do not
fit exactly; images are resized bilinearly with antialiasing, as everywhere here, not bicubically; and the summary is
that of the low-resolution pass, not a mean over tiles.

Shapes:
    high_res [B, C * scales, H, W], the scales in the order given.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from featsharp.errors import ConfigError
from featsharp.layers.tiles import encode_tile_map
from featsharp.ops.resize import average, resize, size_of
from featsharp.upsamplers.base import (
    Encode,
    UpsampleFeatures,
    Upsampler,
    check_tile_batch,
    check_whole,
    scale_length,
)
from featsharp.upsamplers.registration import register_upsampler


@register_upsampler("s2", "features of several scales concatenated: bilinear and tiles")
class S2(Upsampler):
    """S2 without its pooling: every scale is resized to the output grid bilinearly.

    With the default scales that is the bilinear map on top of the tile map.

    Args:
        embed_dim: Channels C of the features; the result has C for every scale.
        factor: In each direction.
        scales: Of the image, distinct numbers of at least 1. Default: 1 and the factor.
        overlap, max_tile_batch: As for ``tile``.
    """

    needs = "image, tiles"
    keeps_space = "no"  # though each group of C channels does
    paper = "S2, arXiv 2403.13043"
    options = ("scales", "overlap", "max_tile_batch")

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        scales: Sequence[float] | None = None,
        overlap: int = 0,
        max_tile_batch: int | None = None,
    ) -> None:
        super().__init__(embed_dim, factor)
        self.scales = _check_scales(sorted({1, self.factor}) if scales is None else scales)
        self.num_maps = len(self.scales)
        self.overlap = check_whole("overlap", overlap, 0)
        self.max_tile_batch = check_tile_batch(max_tile_batch)

    @property
    def input_upsample_factor(self) -> float:
        return max(self.scales)

    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        low_res, summary = encode(resize(image, low_res_size))
        grid, size = size_of(low_res), self.high_res_grid(low_res, output_size)
        maps = []
        for scale in self.scales:
            features = low_res
            if scale > 1:
                cells = scale_length(grid[0], scale), scale_length(grid[1], scale)
                features = encode_tile_map(
                    image,
                    encode,
                    low_res_size,
                    grid,
                    cells,
                    overlap=self.overlap,
                    max_tile_batch=self.max_tile_batch,
                )
            maps.append(self.fit(features, size))
        return UpsampleFeatures(low_res, torch.cat(maps, 1), summary)

    def fit(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize the features of one scale to the grid of the result."""
        return resize(features, size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scales={self.scales}"


@register_upsampler("s2-pooled", "S2 as published: several scales pooled to the low-resolution grid (factor 1)")
class S2Pooled(S2):
    """S2 as published: every scale is pooled to the low-resolution grid by the mean of the area of each cell.

    Args:
        embed_dim: As for :class:`S2`.
        factor: 1; the scales do not change the grid.
        scales, overlap, max_tile_batch: As for :class:`S2`.
    """

    factors = "one"

    def __init__(
        self,
        embed_dim: int,
        factor: float = 1,
        *,
        scales: Sequence[float] = (1, 2),
        overlap: int = 0,
        max_tile_batch: int | None = None,
    ) -> None:
        super().__init__(embed_dim, factor, scales=scales, overlap=overlap, max_tile_batch=max_tile_batch)

    def fit(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        full = features.float() if features.dtype.itemsize < 4 else features  # means in half precision are inexact
        return average(full, size).to(features.dtype)


def _check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    valid = isinstance(scales, Sequence) and all(isinstance(k, int | float) and 1 <= k < math.inf for k in scales)
    if not valid or not scales or len(set(scales)) < len(scales):
        raise ConfigError(f"scales are distinct numbers of at least 1, such as [1, 2]; got {scales!r}")
    return tuple(scales)
