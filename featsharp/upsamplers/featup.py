"""FeatUp's joint bilateral upsampling (JBU): a stack of learned, image-guided filters.

FeatUp (arXiv 2403.10516). Per level, with keys k = MLP(guidance) and offsets p in a 7 x 7 window:

    w_p(i) = softmax_p( exp(theta) <k[i + p], k[i]> - |t_p|^2 / (2 sigma^2) ),   t_p in linspace(-1, 1, 7)^2
    out(i) = sum_p w_p(i) * bilinear(source)[i + p],                             borders mirrored

which equals the published product of a range and a spatial kernel wherever that product's floor of 1e-7 is not active
(always for |sigma| >= 0.249). The published scalars range_alpha and spatial_alpha cancel and are left out.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box
from featsharp.ops.local_attention import local_attention
from featsharp.ops.resize import enlarge, resize, size_of, source_box
from featsharp.upsamplers.base import GuidedUpsampler, prime_factors
from featsharp.upsamplers.registration import register_upsampler

KEY_DIM = 32
WINDOW = 7
MAX_LOG_TEMPERATURE = 9.21  # exp() of it is 1e4, the published clamp

# Width of the spatial kernel at the start, in units of half the window: "published" is a broad blur of the bilinear
# map, "bilinear" puts 92 % of the weight on the centre and still has a gradient to widen or narrow.
START_SIGMA = {"published": 1.0, "bilinear": 0.12}

Start = Literal["bilinear", "published"]


@register_upsampler("featup", "FeatUp: a stack of learned joint bilateral filters guided by the image")
class FeatUp(GuidedUpsampler):
    """One JBU level per prime factor of ``factor``, each with its own parameters.

    Args:
        embed_dim: Channels C.
        factor: Gain; 6 means a level of 2 and one of 3.
        start: "bilinear" starts close to the bilinear map, "published" as the authors' code does.
    """

    trainable = True
    needs = "image"
    by_parts = True

    def __init__(self, embed_dim: int, factor: int, *, start: Start = "bilinear") -> None:
        super().__init__(embed_dim, factor)
        self.levels = nn.ModuleList(JBULevel(prime, start=start) for prime in prime_factors(factor))

    def upsample(self, features: Tensor, image: Tensor) -> Tensor:
        for level in self.levels:
            features = level(features, image)
        return features

    def prepare(self, low_res: Tensor, image: Tensor) -> list[Tensor]:
        """The guidance of every level: the image, averaged over the cells of its output."""
        guides, size = [], size_of(low_res)
        for level in self.levels:
            assert isinstance(level, JBULevel)
            size = size[0] * level.factor, size[1] * level.factor
            guides.append(pool_guidance(image, size))
        return guides

    def upsample_part(self, low_res: Tensor, guide: list[Tensor], tiles: Tensor | None, box: Box) -> Tensor:
        if not guide:
            return box.cut(low_res)
        *guides, last = guide
        level = self.levels[len(guides)]
        assert isinstance(level, JBULevel)
        # The cells that this level reads, and those of the level before that they come from.
        height, width = size_of(last)
        seen = box.grow(WINDOW // 2, (height, width))
        below = source_box(seen, level.factor, (height // level.factor, width // level.factor))
        source = self.upsample_part(low_res, guides, None, below)
        corner = Box(*(level.factor * edge for edge in below))
        value = enlarge(source, level.factor, seen.relative_to(corner))
        return box.relative_to(seen).cut(level.filter(value, seen.cut(last)))


class JBULevel(nn.Module):
    """One joint bilateral filter after a bilinear enlargement by ``factor``; 1186 parameters."""

    offsets: Tensor

    def __init__(self, factor: int, *, start: Start = "bilinear") -> None:
        super().__init__()
        if start not in START_SIGMA:
            raise ConfigError(f"unknown start {start!r}; use {' or '.join(map(repr, START_SIGMA))}")
        self.factor = factor
        self.keys = nn.Sequential(nn.Conv2d(3, KEY_DIM, 1), nn.GELU(), nn.Conv2d(KEY_DIM, KEY_DIM, 1))
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.sigma = nn.Parameter(torch.tensor(START_SIGMA[start]))
        axis = torch.linspace(-1, 1, WINDOW)
        self.register_buffer("offsets", axis[:, None] ** 2 + axis**2, persistent=False)

    def forward(self, source: Tensor, image: Tensor) -> Tensor:
        """[B, C, h, w] and an image [B, 3, H, W] of any size to [B, C, factor * h, factor * w]."""
        size = (self.factor * source.shape[-2], self.factor * source.shape[-1])
        return self.filter(resize(source, size), pool_guidance(image, size))

    def filter(self, x: Tensor, guidance: Tensor) -> Tensor:
        """The bilateral filter of a map [B, C, H, W] under guidance [B, 3, H, W]: [B, C, H, W]."""
        key = self.keys(guidance).permute(0, 2, 3, 1)[:, :, :, None]
        value = x.permute(0, 2, 3, 1)[:, :, :, None]
        out = local_attention(
            key,
            key,
            value,
            window=WINDOW,
            bias=self.spatial_bias()[None],
            scale=self.log_temperature.clamp(-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE).exp(),
            border="reflect",
        )
        return out.squeeze(3).permute(0, 3, 1, 2)

    def spatial_bias(self) -> Tensor:
        """-|t|^2 / (2 sigma^2), [7, 7]."""
        # The small number keeps 0 / 0 away from the centre when sigma has shrunk to nothing.
        return -self.offsets / (2 * self.sigma**2 + 1e-12)


def pool_guidance(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Average the image over the cells of a (h, w) grid, or enlarge it where it is the smaller one."""
    if image.shape[-2] >= size[0] and image.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(image, size)
    return resize(image, size)
