"""JAFAR: every high-resolution place attends to the low-resolution features, guided by the image.

JAFAR (arXiv 2506.11136). Queries come from the image at the output's grid, keys from the image and the features at the
low-resolution grid; the values are the raw features, so the output stays in their convex hull. The branch beside tiles
in the published FeatSharp configurations. Projections of the original that never reach the output are left out.

Queries and keys are normalised (RMS) before their projections, as torch's attention layer projects what it is given;
that order, the epsilon of the normalisation (that of the dtype) and the padding of the 3 x 3 query convolution are not
stated in the paper and could not be checked against the authors' results.

Shapes: B images, C channels, (h, w) low-resolution grid, (H, W) output grid, d = 128 query and key channels.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box, whole
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.base import GuidedUpsampler, check_whole
from featsharp.upsamplers.registration import register_upsampler

DIM = 128
NUM_HEADS = 4
GROUPS = 8
# Scores that are held at once: 64 MiB in float32.
MAX_BAND_SCORES = 2**24

Padding = Literal["reflect", "zeros"]


@register_upsampler("jafar", "JAFAR: global cross-attention from image queries to the low-resolution features")
class JAFAR(GuidedUpsampler):
    """Cross-attention upsampling with raw features as values.

    Under a limit on memory only the attention works by parts: the encoder of the image normalises over all of it, and
    needs several times the memory of the output.

    Args:
        embed_dim: Channels C.
        factor: Gain in each direction.
        image_kernel: Side of the first convolution on the image, odd: 3 in FeatSharp's copy, 1 in the published JAFAR.
        guidance_scale: An image larger than this many times the output grid is shrunk to that before it is encoded,
            which bounds memory: 2 in FeatSharp's copy; None takes it as it is, as the published JAFAR does.
        query_padding: What the 3 x 3 convolution of the queries finds beyond the border, "zeros" or "reflect".
    """

    trainable = True
    needs = "image"
    paper = "JAFAR, arXiv 2506.11136"
    by_parts = True

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        image_kernel: int = 3,
        guidance_scale: float | None = 2.0,
        query_padding: Padding = "zeros",
    ) -> None:
        super().__init__(embed_dim, factor)
        if check_whole("image_kernel", image_kernel, 1) % 2 == 0:
            raise ConfigError(f"image_kernel must be odd; got {image_kernel}, use 1 (published JAFAR) or 3 (FeatSharp)")
        self.guidance_scale = check_guidance_scale(guidance_scale)
        self.image_encoder = residual_encoder(3, kernel_size=image_kernel)
        self.rope = AxialRope()
        self.query_encoder = residual_encoder(DIM)
        self.query_conv = PaddedConv2d(DIM, DIM, 3, query_padding)
        self.key_encoder = residual_encoder(DIM)
        self.feature_encoder = residual_encoder(embed_dim)
        self.gamma, self.beta = (nn.Conv2d(DIM, DIM, 1, bias=False) for _ in range(2))
        self.query_norm, self.key_norm = (nn.RMSNorm(DIM) for _ in range(2))
        self.query_proj, self.key_proj = (nn.Linear(DIM, DIM) for _ in range(2))

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        return self.upsample_part(features, self.prepare(features, image, size), None, whole(size), size)

    def prepare(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Queries [B, H, W, d] and keys [B, h w, d]; group normalisation needs the whole image."""
        encoded = self.rope(self.image_encoder(scaled_guidance(image, size, self.guidance_scale)))
        query = F.group_norm(F.adaptive_avg_pool2d(self.query_encoder(encoded), size), GROUPS)
        query = self.query_conv(query)
        key = F.group_norm(F.adaptive_avg_pool2d(self.key_encoder(encoded), size_of(low_res)), GROUPS)
        # In float32: the least norm that is divided by is zero in float16.
        modulation = self.feature_encoder(F.normalize(low_res.float(), dim=1).to(low_res.dtype))
        key = self.gamma(modulation) * key + self.beta(modulation)
        # Autocast leaves normalisation alone, which has no fused kernel for two dtypes.
        dtype = self.query_norm.weight.dtype
        query = self.query_proj(self.query_norm(query.permute(0, 2, 3, 1).to(dtype)))
        return query, self.key_proj(self.key_norm(key.flatten(2).transpose(1, 2).to(dtype)))

    def upsample_part(
        self, low_res: Tensor, guide: tuple[Tensor, Tensor], tiles: Tensor | None, box: Box, size: tuple[int, int]
    ) -> Tensor:
        query, key = box.cut_channels_last(guide[0]), guide[1]
        out = _attention_in_bands(query.flatten(1, 2), key, low_res.flatten(2).transpose(1, 2))
        return out.transpose(1, 2).unflatten(2, query.shape[1:3])


class AxialRope(nn.Module):
    """Rotary position embedding of a map [B, d, H, W] with learned frequencies.

    Convention:
        Coordinates run from 0 to 1 over the cells, both ends included; the first half of the channels turns with the
        row, the second with the column, and channel i is paired with channel i + d / 2 as in the original.
    """

    def __init__(self) -> None:
        super().__init__()
        frequencies = 2 * math.pi * 100 ** torch.linspace(0, -1, DIM // 4)
        half = torch.cat([frequencies, frequencies])
        self.frequencies = nn.Parameter(
            torch.stack([torch.cat([half, torch.zeros_like(half)]), torch.cat([torch.zeros_like(half), half])])
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = torch.linspace(0, 1, height, device=x.device)[:, None, None] * self.frequencies[0].float()
        cols = torch.linspace(0, 1, width, device=x.device)[None, :, None] * self.frequencies[1].float()
        angle = (rows + cols).permute(2, 0, 1)
        first, second = x.chunk(2, 1)
        turned = torch.cat([-second, first], 1)
        return (x * angle.cos() + turned * angle.sin()).to(x.dtype)


class _ResidualBlock(nn.Module):
    """x + Conv1x1(SiLU(GN(Conv1x1(SiLU(GN(x))))))."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _GroupNorm(GROUPS, DIM), nn.SiLU(), nn.Conv2d(DIM, DIM, 1, bias=False),
            _GroupNorm(GROUPS, DIM), nn.SiLU(), nn.Conv2d(DIM, DIM, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class _GroupNorm(nn.GroupNorm):
    """Takes a map that is more precise than the weights; what comes out is as precise as they are."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype.itemsize <= self.weight.dtype.itemsize:
            return super().forward(x)
        out = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return out.to(self.weight.dtype)


class PaddedConv2d(nn.Conv2d):
    """A convolution that keeps the size, mirrors the map at its border or finds zeros there, and has no bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: Padding = "reflect") -> None:
        if padding not in ("reflect", "zeros"):
            raise ConfigError(f"unknown query_padding {padding!r}; use 'reflect' or 'zeros'")
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, padding_mode=padding, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        # A map that is too small to be mirrored gets zeros.
        if min(size_of(x)) > self.kernel_size[0] // 2:
            return super().forward(x)
        return F.conv2d(x, self.weight, padding=self.kernel_size[0] // 2)


def residual_encoder(channels: int, *, kernel_size: int = 1) -> nn.Sequential:
    """[B, channels, H, W] to [B, d, H, W]."""
    return nn.Sequential(PaddedConv2d(channels, DIM, kernel_size), _ResidualBlock(), _ResidualBlock())


def check_guidance_scale(scale: float | None) -> float | None:
    """``scale`` itself; raises ConfigError for what is none."""
    if scale is not None and not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise ConfigError(f"guidance_scale must be a positive number, or None for the image as it is; got {scale!r}")
    return scale


def scaled_guidance(image: Tensor, size: tuple[int, int], scale: float | None) -> Tensor:
    """The image, shrunk where it is larger than ``scale`` times a grid ``size`` (h, w); None: as it is."""
    if scale is None:
        return image
    height, width = (max(1, round(scale * side)) for side in size)
    return resize(image, (min(image.shape[2], height), min(image.shape[3], width)))


def averaged_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention whose weights are averaged over heads: [B, Q, d], [B, K, d], [B, K, C] to [B, Q, C].

    Args:
        allowed: [Q, K], True where a query sees a key, at least one each; None: it sees all.
    """
    query, key = (x.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for x in (query, key))
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return scores.softmax(-1).mean(1).to(value.dtype) @ value


def _attention_in_bands(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """:func:`averaged_attention` with a bounded number of scores held at once."""
    rows = max(1, MAX_BAND_SCORES // (query.shape[0] * NUM_HEADS * key.shape[1]))
    bands = query.split(rows, 1)
    if len(bands) == 1:
        return averaged_attention(query, key, value)
    return torch.cat([recomputed(averaged_attention, band, key, value) for band in bands], 1)


def recomputed(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """``function(*arguments)``, computed again in a backward pass instead of holding what is in between."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)
