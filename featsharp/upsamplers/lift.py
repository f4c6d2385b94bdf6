"""LiFT: a small convolutional network that doubles a feature map, and can be applied repeatedly.

LiFT (Suri et al., ECCV 2024, arXiv 2403.14625). One pass doubles the grid. The image is encoded at two scales, the
grid's and twice that; the features are joined with the coarser one, doubled by a transposed convolution, joined with
the finer one, and decoded. Features reach the output through convolutions only, so the distribution of the result is
learned too: :mod:`featsharp.evaluation.drift` measures how far it drifts when passes are repeated.

Two things that the published network leaves open are fixed here, so that any patch size, grid and image works:

- The image is resized to ``image_scale`` pixels per cell of the pass's input. The published network takes the input
  image of the backbone, one patch per cell, so that its filters see another scale when the image is larger.
- The finer scale is pooled to exactly twice the grid (adaptive max-pooling). At 16 pixels per cell that is the
  published max-pooling by 2, at 8 it changes nothing, and in between it works for patches of 14.

Shapes: B images, C channels, (h, w) grid, s pixels per cell.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.base import GuidedUpsampler, level_factors
from featsharp.upsamplers.registration import register_upsampler

IMAGE_DIM = 32
# The stem strides by 4 and must not be coarser than twice the grid.
MIN_IMAGE_SCALE = 8


@register_upsampler("lift", "LiFT: a small convolutional network on features and image, applied once per doubling")
class LiFT(GuidedUpsampler):
    """The same doubling network, applied n times for a factor of 2^n; parameters do not depend on the factor.

    Further passes take the image at twice the size of the pass before, bilinearly enlarged beyond its size, as the
    published repetition does with an image of the published size.

    In training mode batch normalisation needs more than one cell; in eval mode images of a batch do not mix.

    Args:
        embed_dim: Channels C.
        factor: 2, 4, 8, ...
        image_scale: Pixels of the image per cell, at least 8. Published weights need that of their backbone: 16 for
            patches of 16, 8 for patches of 8.

    Parameters: 1,187,280 for C = 384, 4,417,296 for 768.
    """

    factors = "powers of two"
    trainable = True
    needs = "image"
    keeps_space = "nearly"
    paper = "LiFT, arXiv 2403.14625"
    options = ("image_scale",)

    def __init__(self, embed_dim: int, factor: float, *, image_scale: int = 16) -> None:
        super().__init__(embed_dim, factor)
        if self.factor == 1:
            raise ConfigError("LiFT doubles the grid at least once; got factor 1, use 2 (or 'identity' for factor 1)")
        whole = isinstance(image_scale, int) and not isinstance(image_scale, bool)
        if not whole or image_scale < MIN_IMAGE_SCALE:
            raise ConfigError(
                f"image_scale must be a whole number of pixels per cell, at least {MIN_IMAGE_SCALE}; got "
                f"{image_scale!r}, the published ones are 16 and 8"
            )
        self.image_scale = image_scale
        self.doubling = Doubling(embed_dim)

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        out, guide = features, None
        for _ in level_factors(self.factor):
            guide = self._guide(image, guide, size_of(out))
            out = self.doubling(out, guide, self.image_scale)
        return out.to(features.dtype)

    def _guide(self, image: Tensor, previous: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Resize the image to ``image_scale`` pixels per cell of ``grid``; from ``previous`` if that is larger."""
        larger = (
            previous is not None and previous.shape[-2] >= image.shape[-2] and previous.shape[-1] >= image.shape[-1]
        )
        source = previous if previous is not None and larger else image
        return resize(source, (grid[0] * self.image_scale, grid[1] * self.image_scale))


class Doubling(nn.Module):
    """One pass. Its tensors, and their names in the published state dict (maybe after ``module.``).

    ============== =========================
    here           published
    ============== =========================
    image_fine     image_convs_1
    image_coarse   image_convs_2
    expand         up1.up
    fuse           up1.conv_1.double_conv
    project        outc
    ============== =========================

    The numbers inside ``image_fine``, ``image_coarse`` and ``fuse`` are the published ones.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        joined, hidden = (embed_dim + IMAGE_DIM) // 2, -(-embed_dim // 2)
        self.image_fine = nn.Sequential(
            nn.Conv2d(3, IMAGE_DIM, 3, stride=2, padding=1), nn.BatchNorm2d(IMAGE_DIM), nn.ReLU(),
            nn.Conv2d(IMAGE_DIM, IMAGE_DIM, 3, stride=2, padding=1), nn.BatchNorm2d(IMAGE_DIM), nn.ReLU(),
        )  # fmt: skip
        self.image_coarse = nn.Sequential(
            nn.Conv2d(IMAGE_DIM, IMAGE_DIM, 3, stride=2, padding=1), nn.BatchNorm2d(IMAGE_DIM), nn.ReLU()
        )
        self.expand = nn.ConvTranspose2d(embed_dim + IMAGE_DIM, joined, 2, stride=2)
        self.fuse = nn.Sequential(
            nn.Conv2d(joined + IMAGE_DIM, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
        )  # fmt: skip
        self.project = nn.Conv2d(hidden, embed_dim, 1)

    def forward(self, features: Tensor, image: Tensor, image_scale: int) -> Tensor:
        """[B, C, h, w] and an image [B, 3, s h, s w] of ``image_scale`` s, at least 8, to [B, C, 2 h, 2 w]."""
        height, width = size_of(features)
        fine = self.image_fine(image)
        # Of whole steps it is the same pooling, and a compiled graph serves all sizes.
        if image_scale % 8:
            fine = F.adaptive_max_pool2d(fine, (2 * height, 2 * width))
        else:
            fine = F.max_pool2d(fine, image_scale // 8)
        doubled = self.expand(torch.cat([features, self.image_coarse(fine)], 1))
        return self.project(self.fuse(torch.cat([doubled, fine], 1)))
