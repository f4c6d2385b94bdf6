"""JAFAR: every high-resolution place attends to the low-resolution features, guided by the image.

JAFAR (arXiv 2506.11136). Queries come from the image at the output's grid, keys from the image and the features at the
low-resolution grid; the values are the raw features, so the output stays in their convex hull. The branch beside tiles
in the published FeatSharp configurations. Projections of the original that never reach the output are left out.

Shapes: B images, C channels, (h, w) low-resolution grid, (H, W) output grid, d = 128 query and key channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featsharp.ops.boxes import Box, whole
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.base import GuidedUpsampler
from featsharp.upsamplers.registration import register_upsampler

DIM = 128
NUM_HEADS = 4
GROUPS = 8
# Scores that are held at once: 64 MiB in float32.
MAX_BAND_SCORES = 2**24


@register_upsampler("jafar", "JAFAR: global cross-attention from image queries to the low-resolution features")
class JAFAR(GuidedUpsampler):
    """Cross-attention upsampling with raw features as values.

    Under a limit on memory only the attention works by parts: the encoder of the image normalises over all of it, and
    needs several times the memory of the output.

    Args:
        embed_dim: Channels C.
        factor: Gain in each direction.
    """

    trainable = True
    needs = "image"
    by_parts = True

    def __init__(self, embed_dim: int, factor: int) -> None:
        super().__init__(embed_dim, factor)
        self.image_encoder = _encoder(3, kernel_size=3)
        self.rope = AxialRope()
        self.query_encoder = _encoder(DIM)
        self.query_conv = nn.Conv2d(DIM, DIM, 3, padding=1, padding_mode="reflect", bias=False)
        self.key_encoder = _encoder(DIM)
        self.feature_encoder = _encoder(embed_dim)
        self.gamma, self.beta = (nn.Conv2d(DIM, DIM, 1, bias=False) for _ in range(2))
        self.query_norm, self.key_norm = (nn.RMSNorm(DIM) for _ in range(2))
        self.query_proj, self.key_proj = (nn.Linear(DIM, DIM) for _ in range(2))

    def upsample(self, features: Tensor, image: Tensor) -> Tensor:
        return self.upsample_part(features, self.prepare(features, image), None, whole(self.high_res_grid(features)))

    def prepare(self, low_res: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, W, d] and keys [B, h w, d]; group normalisation needs the whole image."""
        size = self.high_res_grid(low_res)
        # More guidance than twice the output grid only costs memory.
        encoded = self.rope(self.image_encoder(resize(image, (2 * size[0], 2 * size[1]))))
        query = F.group_norm(F.adaptive_avg_pool2d(self.query_encoder(encoded), size), GROUPS)
        # Reflection needs two cells; a smaller map is its own border.
        query = self.query_conv(query) if min(size) > 1 else F.conv2d(query, self.query_conv.weight, padding=1)
        key = F.group_norm(F.adaptive_avg_pool2d(self.key_encoder(encoded), size_of(low_res)), GROUPS)
        modulation = self.feature_encoder(F.normalize(low_res, dim=1))
        key = self.gamma(modulation) * key + self.beta(modulation)
        # Autocast leaves normalisation alone, which has no fused kernel for two dtypes.
        dtype = self.query_norm.weight.dtype
        query = self.query_proj(self.query_norm(query.permute(0, 2, 3, 1).to(dtype)))
        return query, self.key_proj(self.key_norm(key.flatten(2).transpose(1, 2).to(dtype)))

    def upsample_part(self, low_res: Tensor, guide: tuple[Tensor, Tensor], tiles: Tensor | None, box: Box) -> Tensor:
        query, key = box.cut_channels_last(guide[0]), guide[1]
        out = _averaged_attention(query.flatten(1, 2), key, low_res.flatten(2).transpose(1, 2))
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
            nn.GroupNorm(GROUPS, DIM), nn.SiLU(), nn.Conv2d(DIM, DIM, 1, bias=False),
            nn.GroupNorm(GROUPS, DIM), nn.SiLU(), nn.Conv2d(DIM, DIM, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _encoder(channels: int, *, kernel_size: int = 1) -> nn.Sequential:
    first = nn.Conv2d(channels, DIM, kernel_size, padding=kernel_size // 2, padding_mode="reflect", bias=False)
    return nn.Sequential(first, _ResidualBlock(), _ResidualBlock())


def _averaged_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention whose weights are averaged over heads: [B, Q, d], [B, K, d], [B, K, C] to [B, Q, C].

    Queries are processed in bands, recomputed in the backward pass, so that memory stays bounded.
    """
    heads = key.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)

    def attend(band: Tensor) -> Tensor:
        q = band.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
        scores = (q @ heads.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        return scores.softmax(-1).mean(1).to(value.dtype) @ value

    rows = max(1, MAX_BAND_SCORES // (query.shape[0] * NUM_HEADS * key.shape[1]))
    bands = query.split(rows, 1)
    if len(bands) == 1:
        return attend(query)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(attend, band, use_reentrant=False) for band in bands], 1)
    return torch.cat([attend(band) for band in bands], 1)
