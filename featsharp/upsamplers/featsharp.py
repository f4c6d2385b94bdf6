"""FeatSharp: consistent but blurred features and sharp but inconsistent tiles, fused by one local block.

FeatSharp (arXiv 2502.16025). Shapes: B images, C channels, f factor, (h, w) low-resolution grid.

    low_res [B, C, h, w] --JBU, guided by image--> [B, C, fh, fw] -+
    f x f tiles of the image --encode, stitch----> [B, C, fh, fw] -+-> [B, fh, fw, 2C] --LocalBlock--> [B, C, fh, fw]

The first map is the residual path: with silent block outputs the result is that map, bit for bit. That start learns
slowly, because tiles only enter through gates that have to open first. Our default therefore puts a learned linear mix
of all maps, mostly the first one, in the place of the first map; the paper's own path is behind ``start="published"``.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError, unknown_name
from featsharp.layers.local_block import LocalBlock
from featsharp.ops.boxes import Box, whole
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.base import Encode, GuidedUpsampler, UpsampleFeatures, Upsampler
from featsharp.upsamplers.featup import FeatUp
from featsharp.upsamplers.interpolate import Bilinear
from featsharp.upsamplers.jafar import JAFAR
from featsharp.upsamplers.registration import register_upsampler
from featsharp.upsamplers.tile import encode_tiles, write_tiles

# Maps computed from the low-resolution features and the image; "tiles" comes beside them.
GUIDED_INPUTS = ("jbu", "jafar", "bilinear")
# Gates of the block at the start.
LAYER_SCALE = {"published": 1e-6, "mix": 0.1}
# Part of the tiles in the mixed residual path at the start; 0.3 had the best fidelity of the untrained mixes.
TILE_SHARE = 0.3

Widths = Literal["lean", "published"]
Start = Literal["mix", "published"]


@register_upsampler("featsharp", "FeatSharp: JBU and tiles fused by local attention and SwiGLU")
class FeatSharp(Upsampler):
    """The paper's upsampler: JBU + tiles, LayerNorm, local attention, SwiGLU, slice.

    Args:
        embed_dim: Channels C, a multiple of 8.
        factor: f; the backbone runs 1 + f^2 times per image.
        inputs: Maps to fuse, from "jbu", "jafar", "bilinear" and "tiles"; the first one is the residual path. The paper
            has JBU and tiles; the published configurations have JAFAR and tiles.
        window: Side of the attention window, odd.
        layer_norm: Whether the block normalises its inputs; off in the published configurations.
        widths: "lean" (exact head dim, SwiGLU of 4 C) or "published" (padded head dim, SwiGLU of 8 C).
        start: "mix" starts close to 0.7 of the bilinear map and 0.3 of the tiles, with a linear mix in the residual
            path and open gates; "published" starts with a broad JBU blur, no mix, and gates at 1e-6.
        max_tile_batch: Most images given to the backbone at once; None: all of them.
    """

    trainable = True
    needs = "image, tiles"

    def __init__(
        self,
        embed_dim: int,
        factor: int,
        *,
        inputs: Sequence[str] = ("jbu", "tiles"),
        window: int = 7,
        layer_norm: bool = True,
        widths: Widths = "lean",
        start: Start = "mix",
        max_tile_batch: int | None = None,
    ) -> None:
        super().__init__(embed_dim, factor)
        if widths not in ("lean", "published"):
            raise ConfigError(f"unknown widths {widths!r}; use 'lean' or 'published'")
        if start not in LAYER_SCALE:
            raise ConfigError(f"unknown start {start!r}; use {' or '.join(map(repr, LAYER_SCALE))}")
        if embed_dim % 8:
            raise ConfigError(f"FeatSharp needs a multiple of 8 channels; this backbone has {embed_dim}")
        self.inputs = tuple(inputs)
        self.max_tile_batch = max_tile_batch
        self.branches = nn.ModuleDict()
        for name in self.inputs:
            if name == "jbu":
                self.branches[name] = FeatUp(
                    embed_dim, factor, start="published" if start == "published" else "bilinear"
                )
            elif name == "jafar":
                self.branches[name] = JAFAR(embed_dim, factor)
            elif name == "bilinear":
                self.branches[name] = Bilinear(embed_dim, factor)
            elif name != "tiles":
                raise unknown_name("FeatSharp input", name, [*GUIDED_INPUTS, "tiles"])
        if not self.inputs or len(set(self.inputs)) != len(self.inputs):
            raise ConfigError(f"the inputs of FeatSharp must be one or more different maps; got {list(self.inputs)}")
        # One vector per tile of the image: a tile may learn where it was cut out.
        self.tile_position = nn.Parameter(torch.zeros(1, embed_dim, factor, factor)) if "tiles" in self.inputs else None
        self.mix = nn.Parameter(self._start_mix()) if start == "mix" else None
        self.block = LocalBlock(
            embed_dim * len(self.inputs),
            embed_dim,
            window=window,
            layer_norm=layer_norm,
            published_widths=widths == "published",
            layer_scale=LAYER_SCALE[start],
        )
        self.by_parts = all(branch.by_parts for branch in self.branches.values())
        self.halo = self.block.halo if "tiles" in self.inputs else None

    @property
    def input_upsample_factor(self) -> int:
        return self.factor if "tiles" in self.inputs else 1

    def forward(self, image: Tensor, encode: Encode, low_res_size: tuple[int, int]) -> UpsampleFeatures:
        maps: dict[str, Tensor] = {}
        if self.tile_position is not None:
            low_res, tiles, summary = encode_tiles(
                image, encode, low_res_size, self.factor, max_tile_batch=self.max_tile_batch
            )
            maps["tiles"] = tiles + self._tile_positions(low_res, whole(size_of(tiles))).to(tiles.dtype)
        else:
            low_res, summary = encode(resize(image, low_res_size))
        for name, branch in self.branches.items():
            assert isinstance(branch, GuidedUpsampler)
            maps[name] = branch.upsample(low_res, image)
        return UpsampleFeatures(low_res, self.block(self._stack(maps)).permute(0, 3, 1, 2), summary)

    def write_tiles(
        self, out: Tensor, image: Tensor, encode: Encode, low_res_size: tuple[int, int], max_tile_batch: int
    ) -> None:
        write_tiles(out, image, encode, low_res_size, self.factor, max_tile_batch=max_tile_batch)

    def prepare(self, low_res: Tensor, image: Tensor) -> dict[str, Any]:
        guides = {}
        for name, branch in self.branches.items():
            assert isinstance(branch, GuidedUpsampler)
            guides[name] = branch.prepare(low_res, image)
        return guides

    def upsample_part(self, low_res: Tensor, guide: dict[str, Any], tiles: Tensor | None, box: Box) -> Tensor:
        seen = box.grow(self.block.halo, self.high_res_grid(low_res))
        maps: dict[str, Tensor] = {}
        for name, branch in self.branches.items():
            assert isinstance(branch, GuidedUpsampler)
            maps[name] = branch.upsample_part(low_res, guide[name], None, seen)
        if tiles is not None:
            maps["tiles"] = tiles + self._tile_positions(low_res, seen).to(tiles.dtype)
        return self.block.part(self._stack(maps), box.relative_to(seen)).permute(0, 3, 1, 2)

    def _stack(self, maps: dict[str, Tensor]) -> Tensor:
        """What the block gets: [B, C, H, W] each to [B, H, W, D]."""
        stacked = torch.cat([maps[name] for name in self.inputs], 1).permute(0, 2, 3, 1)
        if self.mix is None:
            return stacked
        return torch.cat([F.linear(stacked, self.mix), stacked[..., self.embed_dim :]], -1)

    def _start_mix(self) -> Tensor:
        """[C, D]: the first map, with TILE_SHARE of it replaced by the tiles where both are inputs."""
        share = dict.fromkeys(self.inputs, 0.0)
        share[self.inputs[0]] = 1.0
        if "tiles" in share and self.inputs[0] != "tiles":
            share |= {self.inputs[0]: 1 - TILE_SHARE, "tiles": TILE_SHARE}
        return torch.cat([share[name] * torch.eye(self.embed_dim) for name in self.inputs], 1)

    def _tile_positions(self, low_res: Tensor, box: Box) -> Tensor:
        """The position vector of the tile that each cell of ``box`` lies in: [1, C, *box.size]."""
        assert self.tile_position is not None
        height, width = size_of(low_res)
        rows = torch.arange(box.top, box.bottom, device=low_res.device) // height
        cols = torch.arange(box.left, box.right, device=low_res.device) // width
        return self.tile_position[:, :, rows[:, None], cols]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, inputs={self.inputs}"
