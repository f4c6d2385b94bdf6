"""Resize-convolution: bilinear enlargement, then a correction by a convolution of features and image.

The baseline of FeatUp (arXiv 2403.10516), after Odena et al., "Deconvolution and Checkerboard Artifacts" (2016). Per
level, with x the features and g the image, both resized to the grid of the level:

    y = x + relu(conv([x, g])),   without the relu at the last level

FeatUp has four levels of 2x; here there is one per prime factor, the last one to the requested size. The image is
antialiased where it shrinks, which the published code leaves out.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from featsharp.errors import ConfigError
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.base import GuidedUpsampler, level_factors, level_sizes
from featsharp.upsamplers.registration import register_upsampler

# Factor on PyTorch's initial weights: with "published" an untrained level adds more than half of the features' size,
# with "bilinear" less than a hundredth. Zero would do for the last level only: behind a relu it has no gradient.
START_SCALE = {"bilinear": 0.01, "published": 1.0}

Start = Literal["bilinear", "published"]


@register_upsampler("resize-conv", "bilinear enlargement and a convolution over features and image, level by level")
class ResizeConv(GuidedUpsampler):
    """One level per prime factor of ``factor``, each with its own 1x1 convolution from C + 3 to C channels.

    Args:
        embed_dim: Channels C.
        factor: In each direction, 1 or more; a level of 2 and one of 3 for 6, and for 5.5 too.
        start: "bilinear" starts close to bilinear interpolation, level by level; "published" with PyTorch's
            initialisation.

    Raises:
        ConfigError: For an unknown start.
    """

    factors = "any"
    trainable = True
    needs = "image"
    keeps_space = "nearly"
    paper = "FeatUp, arXiv 2403.10516"
    options = ("start",)

    def __init__(self, embed_dim: int, factor: float, *, start: Start = "bilinear") -> None:
        super().__init__(embed_dim, factor)
        if start not in START_SCALE:
            raise ConfigError(f"unknown start {start!r}; use {' or '.join(map(repr, START_SCALE))}")
        self.levels = nn.ModuleList(nn.Conv2d(embed_dim + 3, embed_dim, 1) for _ in level_factors(self.factor))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(START_SCALE[start])

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        sizes = level_sizes(size_of(features), level_factors(self.factor), size)[: len(self.levels)]
        x = features
        for number, (conv, grid) in enumerate(zip(self.levels, sizes, strict=True), 1):
            x = resize(x, grid)
            correction = conv(torch.cat([x, resize(image, grid).to(x.dtype)], 1))
            x = x + (correction if number == len(self.levels) else correction.relu())
        return resize(x, size).to(features.dtype)
