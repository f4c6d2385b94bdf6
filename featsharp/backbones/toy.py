"""Tiny seeded backbones for tests and examples: milliseconds on a CPU, no download, the same weights everywhere.

They see image content (colour and coarse structure of a patch) and, like real ones, show where a token sits: the ViTs
through an interpolated position embedding, the CNN through its zero padding.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.ops.recording import is_open
from featsharp.ops.resize import resample, size_of

PATCH_SIZE, INPUT_SIZE, EMBED_DIM = 8, (64, 64), 32


class ToyViT(Backbone):
    """Two pre-norm blocks of width 32 on 8-pixel patches, native at 64x64, with a class token as its summary.

    Args:
        name: A label.
        flexible: False gives a backbone that takes 64x64 only.
        seed: Of the weights.
    """

    embeds_patches = True

    def __init__(self, name: str = "toy-vit", *, flexible: bool = True, seed: int = 0) -> None:
        super().__init__(
            name,
            patch_size=PATCH_SIZE,
            embed_dim=EMBED_DIM,
            input_size=INPUT_SIZE,
            summary_dim=EMBED_DIM,
            flexible=flexible,
        )
        rows, columns = self.grid_size(INPUT_SIZE)
        with torch.device("meta"):  # _fill_seeded draws the values, so the global random state stays as it is
            self.patch_embed = nn.Conv2d(3, EMBED_DIM, PATCH_SIZE, PATCH_SIZE)
            self.cls_token = nn.Parameter(torch.empty(1, 1, EMBED_DIM))
            self.pos_embed = nn.Parameter(torch.empty(1, EMBED_DIM, rows, columns))
            self.blocks = nn.ModuleList(_Block(EMBED_DIM, num_heads=4) for _ in range(2))
            self.norm = nn.LayerNorm(EMBED_DIM)
        _fill_seeded(self, seed)
        self.pos_embed.data.copy_(_smooth_positions(EMBED_DIM, rows, columns, seed))
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        patches = self.patch_embed(images)  # [B, C, h, w]
        grid = size_of(patches)
        positions: Tensor = self.pos_embed
        if is_open(*grid) or grid != size_of(positions):
            positions = resample(positions, grid, "bicubic")
        patches = (patches + positions).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return BackboneOutput(tokens[:, 1:].transpose(1, 2).unflatten(2, grid), tokens[:, 0])


class ToyCNN(Backbone):
    """Three stride-2 convolutions to width 32 (stride 8); takes any multiple of 8 pixels; no summary.

    Args:
        name: A label.
        seed: Of the weights.
    """

    def __init__(self, name: str = "toy-cnn", *, seed: int = 0) -> None:
        super().__init__(name, patch_size=PATCH_SIZE, embed_dim=EMBED_DIM, input_size=INPUT_SIZE)
        widths = (3, 16, 32, EMBED_DIM)
        with torch.device("meta"):
            # Kernel 4 with padding 1 keeps token (y, x) centred on its own pixels; kernel 3 would shift the map.
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise(widths))
            self.norm = nn.LayerNorm(EMBED_DIM)
        _fill_seeded(self, seed)
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        maps = images
        for conv in self.convs:
            maps = F.gelu(conv(maps))
        return BackboneOutput(self.norm(maps.movedim(1, -1)).movedim(-1, 1), None)


def create_toy_vit_fixed() -> Backbone:
    """Build a :class:`ToyViT` that takes 64x64 pixels only."""
    return ToyViT("toy-vit-fixed", flexible=False)


class _Block(nn.Module):
    """Pre-norm attention and MLP, tokens [B, N, C] to the same."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.proj(attended)
        return tokens + self.mlp(self.norm2(tokens))


def _fill_seeded(module: nn.Module, seed: int) -> None:
    """Draw the weights of a module on the meta device: norms at identity, the rest scaled by the fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            if isinstance(part, nn.LayerNorm):
                drawn = torch.full(value.shape, float(name == "weight"), device="cpu")
            elif isinstance(part, nn.Conv2d) and name == "weight":
                drawn = _smooth_filters(value.shape, generator)
            else:
                fan_in = value[0].numel() if name == "weight" else EMBED_DIM
                drawn = torch.randn(value.shape, generator=generator, device="cpu") / math.sqrt(fan_in)
            # Not Module.to_empty: its first call on the meta device imports SymPy, half a second.
            setattr(part, name, nn.Parameter(drawn.to(value.dtype)))


def _smooth_filters(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Half white noise, half 2x2 blocks of it: photographs are smooth, and white filters would hardly respond."""
    fine = torch.randn(shape, generator=generator)
    coarse = F.interpolate(torch.randn(*shape[:2], 2, 2, generator=generator), shape[-2:])
    return (fine + coarse) / math.sqrt(2 * shape[1:].numel())


def _smooth_positions(dim: int, rows: int, columns: int, seed: int) -> Tensor:
    """[1, dim, rows, columns]: one plane wave of random direction, phase and length per channel, amplitude 0.5."""
    generator = torch.Generator().manual_seed(seed + 1)
    waves = torch.randn(dim, 2, generator=generator) * 2
    phases = torch.rand(dim, generator=generator) * 2 * math.pi
    y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    angles = waves[:, 0, None, None] * y[:, None] + waves[:, 1, None, None] * x + phases[:, None, None]
    return 0.5 * torch.sin(angles)[None]
