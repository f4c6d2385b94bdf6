"""FeatSharp: consistent but blurred features and sharp but inconsistent tiles, fused by one local block.

FeatSharp (arXiv 2502.16025). Shapes: B images, C channels, f factor, (h, w) low-resolution grid.

    low_res [B, C, h, w] --JBU, guided by the image--> [B, C, fh, fw] --+
    f x f tiles of the image --encode, stitch--------> [B, C, fh, fw] --+--> [B, fh, fw, 2C] --LocalBlock--> [B, C, fh, fw]

The first map is the residual path: with silent block outputs the result is that map, bit for bit.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from featsharp.errors import ConfigError, unknown_name
from featsharp.layers.local_block import LocalBlock
from featsharp.ops.resize import resize
from featsharp.upsamplers.base import Encode, UpsampleFeatures, Upsampler
from featsharp.upsamplers.featup import FeatUp, Start
from featsharp.upsamplers.interpolate import Bilinear
from featsharp.upsamplers.registration import register_upsampler
from featsharp.upsamplers.tile import encode_tiles

# Maps computed from the low-resolution features and the image; "tiles" comes beside them.
GUIDED_INPUTS = {"jbu": FeatUp, "bilinear": Bilinear}
LAYER_SCALE = {"published": 1e-6, "bilinear": 0.1}

Widths = Literal["lean", "published"]


@register_upsampler("featsharp", "FeatSharp: JBU and tiles fused by local attention and SwiGLU")
class FeatSharp(Upsampler):
    """The paper's upsampler: JBU + tiles, LayerNorm, local attention, SwiGLU, slice.

    Args:
        embed_dim: Channels C, a multiple of 8.
        factor: f; the backbone runs 1 + f^2 times per image.
        inputs: Maps to fuse, from "jbu", "bilinear" and "tiles"; the first one is the residual path.
        window: Side of the attention window, odd.
        widths: "lean" (exact head dim, SwiGLU of 4 C) or "published" (padded head dim, SwiGLU of 8 C).
        start: "bilinear" starts at the bilinear map with open gates, "published" with a broad JBU blur and gates at
            1e-6, which take thousands of steps to open.
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
        widths: Widths = "lean",
        start: Start = "bilinear",
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
                self.branches[name] = FeatUp(embed_dim, factor, start=start)
            elif name == "bilinear":
                self.branches[name] = Bilinear(embed_dim, factor)
            elif name != "tiles":
                raise unknown_name("FeatSharp input", name, [*GUIDED_INPUTS, "tiles"])
        if not self.inputs or len(set(self.inputs)) != len(self.inputs):
            raise ConfigError(f"the inputs of FeatSharp must be one or more different maps; got {list(self.inputs)}")
        # One vector per tile of the image: a tile may learn where it was cut out.
        self.tile_position = nn.Parameter(torch.zeros(1, embed_dim, factor, factor)) if "tiles" in self.inputs else None
        self.block = LocalBlock(
            embed_dim * len(self.inputs),
            embed_dim,
            window=window,
            published_widths=widths == "published",
            layer_scale=LAYER_SCALE[start],
        )

    @property
    def input_upsample_factor(self) -> int:
        return self.factor if "tiles" in self.inputs else 1

    def forward(self, image: Tensor, encode: Encode, low_res_size: tuple[int, int]) -> UpsampleFeatures:
        maps: dict[str, Tensor] = {}
        if self.tile_position is not None:
            low_res, tiles, summary = encode_tiles(
                image, encode, low_res_size, self.factor, max_tile_batch=self.max_tile_batch
            )
            maps["tiles"] = tiles + self._tile_positions(low_res).to(tiles.dtype)
        else:
            low_res, summary = encode(resize(image, low_res_size))
        for name, branch in self.branches.items():
            maps[name] = branch.upsample(low_res, image)
        stacked = torch.cat([maps[name] for name in self.inputs], 1).permute(0, 2, 3, 1)
        return UpsampleFeatures(low_res, self.block(stacked).permute(0, 3, 1, 2), summary)

    def _tile_positions(self, low_res: Tensor) -> Tensor:
        height, width = low_res.shape[-2:]
        return self.tile_position.repeat_interleave(height, 2).repeat_interleave(width, 3)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, inputs={self.inputs}"
