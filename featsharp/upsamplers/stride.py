"""A smaller stride of the patch embedding: the backbone has overlapping patches, and so more tokens.

"Deep ViT Features as Dense Visual Descriptors" (arXiv 2112.05814); a baseline of FeatSharp (arXiv 2502.16025), figure
5.

Shapes:
    An image of H x W pixels and patches of p make ``1 + (H - p) // s`` by ``1 + (W - p) // s`` tokens at stride s.

Convention:
    Token j is centred at pixel ``j * s + p / 2``, so the map does not cover the whole image. Published code stretches
    it over the image all the same, which moves features by up to half a patch at the border. Here every cell of the
    result is interpolated between the tokens around its centre; cells beyond the outermost tokens take their value.
"""

import math
from functools import reduce

import torch
from torch import Tensor

from featsharp.errors import ConfigError
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.base import Encode, UpsampleFeatures, Upsampler
from featsharp.upsamplers.registration import register_upsampler


@register_upsampler("stride", "a smaller stride of the patch embedding, for vision transformers")
class Stride(Upsampler):
    """Features at stride ``round(p / factor)``, read bilinearly at the cells of the result.

    The factor goes up to the patch size p, yet cost limits it before: the second pass has about ``factor ** 2`` as many
    tokens, so activations grow with ``factor ** 2`` and attention with ``factor ** 4``. For a ViT-S/14 (6 heads) in
    float32, an explicit attention map of one layer and image takes:

    ======  ======  ====================  ====================
    factor  stride  224 pixels            518 pixels
    ======  ======  ====================  ====================
    1       14      257 tokens, 1.5 MiB   1370 tokens, 43 MiB
    2       7       962 tokens, 21 MiB    5330 tokens, 650 MiB
    4       3       5042 tokens, 582 MiB  28562 tokens, 18 GiB
    8       2       11237 tokens, 2.8 GiB 64010 tokens, 92 GiB
    ======  ======  ====================  ====================

    Fused attention never holds that map, but its time grows alike. At 8x, tiles are cheaper.

    Raises:
        ConfigError: When used with a factor above the patch size, or a backbone without patches that can overlap.
    """

    needs = "backbone's patch embedding"
    keeps_space = "nearly"
    paper = "Dense ViT descriptors, arXiv 2112.05814"

    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        small = resize(image, low_res_size)
        low_res, summary = encode(small)
        grid, size = size_of(low_res), self.high_res_grid(low_res, output_size)
        if size == grid:
            return UpsampleFeatures(low_res, low_res, summary)
        factor = self.factor if output_size is None else max(size[0] / grid[0], size[1] / grid[1])
        patch = int(low_res_size[0] // grid[0])  # a number, also where a recorded graph leaves sizes open
        stride = compute_stride(patch, factor)
        tokens, _ = encode(small, patch_stride=stride)
        return UpsampleFeatures(low_res, read_tokens(tokens, patch, stride, low_res_size, size), summary)


def compute_stride(patch_size: int, factor: float) -> int:
    """Compute the stride nearest to ``factor`` times as many tokens per axis; of two, the smaller one."""
    if factor > patch_size:
        raise ConfigError(
            f"the smallest stride, one pixel, makes {patch_size} tokens per axis of a {patch_size}-pixel patch; got a "
            f"factor of {factor:g}, use at most {patch_size}"
        )
    return max(1, math.ceil(patch_size / factor - 0.5))


def read_tokens(
    tokens: Tensor, patch_size: int, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Read the map [B, C, H, W] that covers the image from tokens [B, C, h, w] of overlapping patches.

    ``size`` is (H, W); patch size, stride and the size of the image are in pixels.
    """
    full = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    for axis, dim in enumerate((2, 3)):
        step = image_size[axis] / size[axis]  # pixels from cell to cell
        centres = (torch.arange(size[axis], device=full.device, dtype=full.dtype) + 0.5) * step
        full = _read_axis(full, (centres - patch_size / 2) / stride, max(1, math.floor(step / stride)), dim)
    return full.to(tokens.dtype)


def _read_axis(x: Tensor, positions: Tensor, spread: int, dim: int) -> Tensor:
    """Average values along one axis around ``positions``, with weights that reach 0 at a distance of ``spread``.

    A spread of 1 is linear interpolation; a larger one is for cells that are further apart than the values.
    """
    last = x.shape[dim] - 1
    positions = positions.clamp(0, last)
    taps = positions.floor().long() + torch.arange(1 - spread, spread + 1, device=x.device)[:, None]  # [taps, cells]
    weights = (1 - (positions - taps).abs() / spread).clamp(min=0) * ((taps >= 0) & (taps <= last))
    weights = (weights / weights.sum(0)).unflatten(1, (-1, *(3 - dim) * [1]))
    terms = (x.index_select(dim, index) * weight for index, weight in zip(taps.clamp(0, last), weights, strict=True))
    return reduce(torch.add, terms)
