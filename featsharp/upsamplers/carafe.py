"""CARAFE: every new cell is a weighted mean of the old cells around it, with weights that the features predict.

CARAFE (arXiv 1905.02188), here a stack of levels of a whole factor q. Per level, for the features x [B, C, h, w]:

    logits = pixel_shuffle(encoder(compressor(x)), q)            [B, k k, q h, q w]
    out(i) = sum_p softmax_p(logits(i)) * x[i // q + p],         p in a k x k window

The image is not used. Each level reads the result of the one before; in FeatUp's port all of them read the first
features, so that its result is a single level whatever the factor.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError
from featsharp.ops.local_filter import local_filter
from featsharp.upsamplers.base import GuidedUpsampler, check_whole, level_factors
from featsharp.upsamplers.registration import register_upsampler

ENCODER_STD = 0.001
# Added to the bilinear weights at the start, so that a gradient reaches the other cells of the window.
LEAST_WEIGHT = 1e-3

CARAFEBorder = Literal["replicate", "zeros"]
Start = Literal["bilinear", "published"]
BORDERS = ("replicate", "zeros")
STARTS = ("bilinear", "published")


@register_upsampler("carafe", "CARAFE: reassembly with weights predicted from the features")
class CARAFE(GuidedUpsampler):
    """One level per prime factor of ``factor``, each with its own parameters.

    Args:
        embed_dim: Channels C.
        factor: In each direction, whole; 6 means a level of 2 and one of 3.
        kernel_size: k, odd and at least 3 (a softmax over one cell is always 1): 5 in the paper, 3 in FeatUp.
        encoder_kernel: Side of the encoder's convolution, odd.
        compressed: Channels of the encoder's input.
        border: "replicate" repeats the cells at the edge of the map, so constant maps stay constant; "zeros" has zeros
            there, as published, and results fade towards the edge.
        start: "bilinear" starts close to bilinear interpolation, "published" at the mean of the window.

    Raises:
        ConfigError: For a factor that is not whole, or an option out of its range.
    """

    factors = "whole"
    trainable = True
    needs = "nothing"
    keeps_space = "yes"
    paper = "CARAFE, arXiv 1905.02188"
    options = ("kernel_size", "encoder_kernel", "compressed", "border", "start")

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        kernel_size: int = 5,
        encoder_kernel: int = 3,
        compressed: int = 64,
        border: CARAFEBorder = "replicate",
        start: Start = "bilinear",
    ) -> None:
        super().__init__(embed_dim, factor)
        _check_odd("kernel_size", kernel_size, least=3)
        _check_odd("encoder_kernel", encoder_kernel, least=1)
        check_whole("compressed", compressed, 1)
        if border not in BORDERS:
            raise ConfigError(f"unknown border {border!r}; use {' or '.join(map(repr, BORDERS))}")
        if start not in STARTS:
            raise ConfigError(f"unknown start {start!r}; use {' or '.join(map(repr, STARTS))}")
        self.window = kernel_size
        self.levels = nn.ModuleList(
            CARAFELevel(embed_dim, factor, kernel_size, encoder_kernel, compressed, border, start)
            for factor in level_factors(self.factor)
        )

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        for level in self.levels:
            features = level(features)
        return features


class CARAFELevel(nn.Module):
    """One reassembly [B, C, h, w] -> [B, C, factor * h, factor * w]; the arguments are those of :class:`CARAFE`."""

    def __init__(
        self,
        embed_dim: int,
        factor: int,
        kernel_size: int,
        encoder_kernel: int,
        compressed: int,
        border: CARAFEBorder,
        start: Start,
    ) -> None:
        super().__init__()
        self.factor, self.kernel_size, self.border = factor, kernel_size, border
        self.compressor = nn.Conv2d(embed_dim, compressed, 1)
        self.encoder = nn.Conv2d(compressed, (factor * kernel_size) ** 2, encoder_kernel, padding=encoder_kernel // 2)
        nn.init.xavier_uniform_(self.compressor.weight)
        nn.init.normal_(self.encoder.weight, std=ENCODER_STD)
        nn.init.zeros_(self.compressor.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.encoder.bias)  # type: ignore[arg-type]
        if start == "bilinear":
            with torch.no_grad():
                self.encoder.bias.copy_(_bilinear_logits(factor, kernel_size).flatten())  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        value = x.permute(0, 2, 3, 1)[:, :, :, None]
        out = local_filter(self.weights(x)[:, :, :, None], value, border=self.border)
        return out.squeeze(3).permute(0, 3, 1, 2)

    def weights(self, x: Tensor) -> Tensor:
        """[B, factor * h, factor * w, k, k], at least float32; entry (i, j) is the cell at (i - k // 2, j - k // 2)."""
        logits = F.pixel_shuffle(self.encoder(self.compressor(x)), self.factor)
        weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
        return weights.permute(0, 2, 3, 1).unflatten(3, (self.kernel_size, self.kernel_size))


def _bilinear_logits(factor: int, kernel_size: int) -> Tensor:
    """Logarithms of bilinear weights, in the order that the pixel shuffle reads: [k k, factor, factor]."""
    # Positions of the new cells in one old cell, and of the old cells around it, in old cells from its centre.
    new = (torch.arange(factor) + 0.5) / factor - 0.5
    old = torch.arange(kernel_size) - kernel_size // 2
    axis = (1 - (new - old[:, None]).abs()).clamp(min=0)  # [k, factor]
    weights = axis[:, None, :, None] * axis[None, :, None, :]
    return (weights + LEAST_WEIGHT).log().flatten(0, 1)


def _check_odd(option: str, value: int, least: int) -> None:
    if value >= least and value % 2 == 1:
        return
    nearest = [least] if value < least else [value - 1, value + 1]
    raise ConfigError(f"{option} must be odd and at least {least}; got {value}, use {' or '.join(map(str, nearest))}")
