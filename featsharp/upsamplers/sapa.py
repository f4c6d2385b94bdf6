"""SAPA: every new cell attends to the old cells around it, by the similarity of image and features.

SAPA (arXiv 2209.12866), here a stack of levels of a whole factor q. Per level, for features x on (h, w) and the image y
averaged over the cells of (q h, q w):

    query = Linear(LayerNorm(y)), 3 -> 64;   key = Linear(LayerNorm(x)), C -> 64
    out(i) = sum_p softmax_p(<query(i), key[i // q + p]>) * x[i // q + p],   p in a 5 x 5 window

Published levels are of 2x only, and a factor that is no power of two is rounded to one; the published border is zeros
that count (see :class:`SAPA`).
"""

from typing import Literal

from torch import Tensor, nn

from featsharp.errors import ConfigError
from featsharp.layers.guidance import pool_guidance
from featsharp.ops.local_attention import local_attention
from featsharp.ops.resize import size_of
from featsharp.upsamplers.base import GuidedUpsampler, level_factors
from featsharp.upsamplers.registration import register_upsampler

DIM = 64
WINDOW = 5
START_STD = 0.02

SAPABorder = Literal["clip", "zeros"]
BORDERS = ("clip", "zeros")


@register_upsampler("sapa", "SAPA: local attention from image queries to keys and values of the features")
class SAPA(GuidedUpsampler):
    """One level per prime factor of ``factor``, each with its own parameters.

    Args:
        embed_dim: Channels C, any number.
        factor: In each direction, whole; 6 means a level of 2 and one of 3.
        border: "clip" makes the window smaller at the edge of the map, so weights of real cells sum to one; "zeros" has
            cells with logit 0 and value 0 there, as published, and results fade towards the edge.
        norm_guidance: Whether the colours of each pixel are normalised by their mean and deviation, as published. That
            leaves only hue; otherwise the guidance includes brightness and contrast.

    Raises:
        ConfigError: For a factor that is not whole, or an unknown border.
    """

    factors = "whole"
    trainable = True
    needs = "image"
    keeps_space = "yes"
    paper = "SAPA, arXiv 2209.12866"
    options = ("border", "norm_guidance")

    def __init__(
        self, embed_dim: int, factor: float, *, border: SAPABorder = "clip", norm_guidance: bool = True
    ) -> None:
        super().__init__(embed_dim, factor)
        if border not in BORDERS:
            raise ConfigError(f"unknown border {border!r}; use {' or '.join(map(repr, BORDERS))}")
        self.levels = nn.ModuleList(
            SAPALevel(embed_dim, factor, border, norm_guidance) for factor in level_factors(self.factor)
        )

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        for level in self.levels:
            features = level(features, image)
        return features


class SAPALevel(nn.Module):
    """One attention [B, C, h, w] -> [B, C, factor * h, factor * w]; the arguments are those of :class:`SAPA`."""

    def __init__(self, embed_dim: int, factor: int, border: SAPABorder, norm_guidance: bool) -> None:
        super().__init__()
        self.factor, self.border = factor, border
        # A bias of the keys adds the same to all scores of a query, which cancels in the softmax, except where
        # published borders stay at 0.
        bias = border == "zeros"
        self.query_norm = nn.LayerNorm(3) if norm_guidance else nn.Identity()
        self.key_norm = nn.LayerNorm(embed_dim, bias=bias)
        self.query_proj, self.key_proj = nn.Linear(3, DIM), nn.Linear(embed_dim, DIM, bias=bias)
        for layer in (self.query_proj, self.key_proj):
            nn.init.trunc_normal_(layer.weight, std=START_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """x [B, C, h, w] and an image [B, 3, H, W] of any size."""
        height, width = size_of(x)
        guidance = pool_guidance(image, (self.factor * height, self.factor * width)).permute(0, 2, 3, 1)
        value = x.permute(0, 2, 3, 1)
        query = self.query_proj(self.query_norm(guidance.to(x.dtype)))
        key = self.key_proj(self.key_norm(value))
        heads = (x[:, :, :, None] for x in (query, key, value))
        return local_attention(*heads, window=WINDOW, border=self.border).squeeze(3).permute(0, 3, 1, 2)
