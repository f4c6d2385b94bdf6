"""FeatSharp: consistent but blurred features and sharp but inconsistent tiles, fused by one local block.

FeatSharp (arXiv 2502.16025). Shapes: B images, C channels, f factor, (h, w) low-resolution grid.

    low_res [B, C, h, w] --JBU, guided by image--> [B, C, fh, fw] -+
    f x f tiles of the image --encode, stitch----> [B, C, fh, fw] -+-> [B, fh, fw, 2C] --LocalBlock--> [B, C, fh, fw]

The first map is the residual path: where the block returns zeros the result is that map, bit for bit. That start learns
slowly, because tiles only enter through gates that have to open first. Our default therefore replaces the first map by
a learned linear mix of all maps, mostly the first one; the paper's residual path is ``start="published"``.

Tiles disagree with the low-resolution map in their coarse structure (each lacks the context of the others, which shows
as seams) and have the better fine structure. The input "details" is the fine structure alone: every tile minus its
blur.

Without attention and SwiGLU the result is a linear map of the inputs. Tiles are then weighted before they are stitched,
so that any number of tile inputs takes one map.
"""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError, unknown_name
from featsharp.layers.local_block import LocalBlock, Position
from featsharp.layers.tiles import Process, compute_details, encode_tile_map, keep_tiles
from featsharp.ops.boxes import Box, whole
from featsharp.ops.resize import resize, size_of
from featsharp.ops.windows import check_window
from featsharp.upsamplers.base import Encode, UpsampleFeatures, Upsampler, check_tile_batch, level_factors
from featsharp.upsamplers.chunked import ChunkedGuidedUpsampler, ComputeChunk, ComputeTiledChunk, TiledUpsampler
from featsharp.upsamplers.registration import build_upsampler, register_upsampler

# Inputs that other upsamplers compute -> names of these upsamplers.
BRANCHES = {"jbu": "featup", "jafar": "jafar", "resfu": "resfu", "bilinear": "bilinear"}
# Inputs stitched from tiles -> function of the features of a tile.
TILE_INPUTS: dict[str, Process] = {"tiles": keep_tiles, "details": compute_details}
INPUTS = (*BRANCHES, "rgb", *TILE_INPUTS)
# Channels of the colour input.
RGB_DIM = 16
# Gates of the block at the start.
LAYER_SCALE = {"published": 1e-6, "mix": 0.1}
# Weight of the tiles in the mixed residual path at the start; 0.3 had the best fidelity of the untrained mixes.
TILE_WEIGHT = 0.3
# Weight of the details that are added to the first map at the start.
DETAIL_WEIGHT = 0.75

Widths = Literal["lean", "published"]
Start = Literal["mix", "published"]


@register_upsampler("featsharp", "FeatSharp: JBU and tiles fused by local attention and SwiGLU")
class FeatSharp(TiledUpsampler):
    """The paper's upsampler: JBU + tiles, LayerNorm, local attention, SwiGLU, slice.

    Args:
        embed_dim: Channels C, a multiple of 8.
        factor: f; the backbone runs 1 + f^2 times per image (f rounded up).
        inputs: Maps to fuse, from "jbu", "jafar", "resfu", "bilinear", "rgb" (16 channels), "tiles" and "details"
            (tiles without their coarse structure; with both, attention or SwiGLU cannot work in chunks). The first is
            the residual path and must have C channels. The paper has JBU and tiles, the default; the published
            configurations have JAFAR and tiles.
        window: Side of the attention window, odd.
        attention, ffn: Whether the block has them; without both it is one linear layer (which the published code meant
            to have but cannot build).
        layer_norm: Whether the block normalises its inputs; off in the published configurations.
        position: "alibi" (a bias on scores, falling with the distance), "rope" or "xpos" (rotary embeddings, options of
            the published code that no published configuration uses) or "none".
        widths: "lean" (exact head dim, SwiGLU of 4 C) or "published" (padded head dim, SwiGLU of 8 C).
        start: "mix" starts close to 0.7 of the bilinear map and 0.3 of the tiles (the bilinear map and 0.75 of the
            details), with a linear mix in the residual path and open gates; "published" starts with a broad JBU blur
            (and ReSFU as published), no mix, and gates at 1e-6 (none where attention or SwiGLU is missing).
        max_tile_batch: Most images given to the backbone at once; None: all of them.

    Raises:
        ConfigError: For channels, inputs or options that do not go together.
    """

    trainable = True
    needs = "image, tiles"
    keeps_space = "nearly"
    paper = "FeatSharp, arXiv 2502.16025"
    options = ("inputs", "window", "attention", "ffn", "layer_norm", "position", "widths", "start", "max_tile_batch")

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        inputs: Sequence[str] = ("jbu", "tiles"),
        window: int = 7,
        attention: bool = True,
        ffn: bool = True,
        layer_norm: bool = True,
        position: Position = "alibi",
        widths: Widths = "lean",
        start: Start = "mix",
        max_tile_batch: int | None = None,
    ) -> None:
        super().__init__(embed_dim, factor, max_tile_batch=max_tile_batch)
        if widths not in ("lean", "published"):
            raise ConfigError(f"unknown widths {widths!r}; use 'lean' or 'published'")
        if start not in LAYER_SCALE:
            raise ConfigError(f"unknown start {start!r}; use {' or '.join(map(repr, LAYER_SCALE))}")
        if embed_dim % 8:
            raise ConfigError(
                f"FeatSharp needs a multiple of 8 channels; this backbone has {embed_dim}, the nearest that works is "
                f"{max(8, 8 * round(embed_dim / 8))}"
            )
        check_window(window)
        self.inputs = _check_inputs(inputs)
        self.window = window if attention else None
        self.branches = nn.ModuleDict(
            {name: _build_branch(name, embed_dim, factor, start) for name in self.inputs if name not in TILE_INPUTS}
        )
        self.tile_inputs = [name for name in self.inputs if name in TILE_INPUTS]
        # One vector per tile of the image: a tile may learn where it was cut out.
        tiles = math.ceil(factor)
        self.tile_position = nn.Parameter(torch.zeros(1, embed_dim, tiles, tiles)) if "tiles" in self.inputs else None
        self.input_dims = {name: RGB_DIM if name == "rgb" else embed_dim for name in self.inputs}
        in_dim = sum(self.input_dims.values())
        self.mix: nn.Parameter | None = None
        self.block: LocalBlock | nn.Linear
        if attention or ffn:
            self.mix = nn.Parameter(_start_mix(self.input_dims)) if start == "mix" else None
            self.block = LocalBlock(
                in_dim,
                embed_dim,
                window=window,
                layer_norm=layer_norm,
                published_widths=widths == "published",
                attention=attention,
                mlp=ffn,
                position=position,
                layer_scale=None if start == "published" and not (attention and ffn) else LAYER_SCALE[start],
            )
        else:
            self.block = nn.Linear(in_dim, embed_dim)
            if start == "mix":
                nn.init.zeros_(self.block.bias)
                self.block.weight.data.copy_(_start_mix(self.input_dims))
        self.uses_tiles = bool(self.tile_inputs)
        self._reach = self.block.halo if isinstance(self.block, LocalBlock) else 0
        # The output tensor has room for one tile map.
        one_map = isinstance(self.block, nn.Linear) or len(self.tile_inputs) <= 1
        self.halo = (self._reach if self.uses_tiles else 0) if one_map else None

    @property
    def variant(self) -> str:
        return "linear" if isinstance(self.block, nn.Linear) else ""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Group the parameters of JBU, which may have a different learning rate."""
        jbu = list(self.branches["jbu"].parameters()) if "jbu" in self.branches else []
        return super().parameter_groups() | {"jbu": jbu}

    def spectral_modules(self) -> list[nn.Module]:
        """Return the local block alone, as published in effect: elsewhere a norm of 1 would undo the start."""
        return [self.block] if isinstance(self.block, LocalBlock) else []

    def linear_maps(self, image: Tensor, encode: Encode, low_res_size: tuple[int, int]) -> Tensor:
        """Compute all inputs [B, D, H, W], the maps that :attr:`linear_weight` is applied to."""
        tiles = None
        if self.uses_tiles:
            low_res, tiles, _ = self.encode_tiles(image, encode, low_res_size, process=self._stack_tile_inputs)
        else:
            low_res, _ = encode(resize(image, low_res_size))
        size = self.high_res_grid(low_res)
        maps = {name: branch.upsample_to(low_res, image, size) for name, branch in self._branches()}
        return self._join(maps | self._tile_maps(tiles, whole(size), size))

    @property
    def linear_weight(self) -> Tensor | None:
        """Linear map [C, D] from all inputs to the result, or to the residual path where there is a block.

        None for the published start, which has no such map beside its block.
        """
        return self.block.weight if isinstance(self.block, nn.Linear) else self.mix

    def process_tiles(self, tiles: Tensor) -> Tensor:
        """Compute the tile inputs from the features of tiles [N, C, h, w].

        Returns:
            The tile inputs one after the other, [N, n C, h, w]; with a linear block their weighted sum, [N, C, h, w].
        """
        if isinstance(self.block, LocalBlock):
            return self._stack_tile_inputs(tiles)
        tiles = tiles.to(self.block.weight.dtype)
        return reduce(operator.add, [self._weigh(name, TILE_INPUTS[name](tiles)) for name in self.tile_inputs])

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeTiledChunk:
        branches = {name: branch.prepare_chunks(low_res, image, size) for name, branch in self._branches()}

        def compute(box: Box, tiles: Tensor | None) -> Tensor:
            seen = box.grow(self._reach, size)
            maps = {name: compute_branch(seen) for name, compute_branch in branches.items()}
            if isinstance(self.block, nn.Linear):
                return self._weighted_sum(maps, tiles, box, size)
            x = self._stack(maps | self._tile_maps(tiles, seen, size))
            out = self.block(x) if box.covers(size) else self.block.compute_chunk(x, box.relative_to(seen))
            return out.permute(0, 3, 1, 2)

        return compute

    def _stack_tile_inputs(self, tiles: Tensor) -> Tensor:
        """Concatenate all tile inputs of features [N, C, h, w]: [N, n C, h, w]."""
        inputs = [TILE_INPUTS[name](tiles) for name in self.tile_inputs]
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)

    def _tile_maps(self, tiles: Tensor | None, box: Box, size: tuple[int, int]) -> dict[str, Tensor]:
        """Split the tile map of the cells ``box`` into the tile inputs, [B, C, *box.size] each."""
        if tiles is None:
            return {}
        maps = dict(zip(self.tile_inputs, tiles.split(self.embed_dim, 1), strict=True))
        if self.tile_position is not None:
            maps["tiles"] = maps["tiles"] + self._tile_positions(box, size).to(tiles.dtype)
        return maps

    def _weighted_sum(self, maps: dict[str, Tensor], tiles: Tensor | None, box: Box, size: tuple[int, int]) -> Tensor:
        """Apply a linear block to maps [B, c, *box.size], and add tiles that are weighted already."""
        assert isinstance(self.block, nn.Linear)
        terms = [self._weigh(name, x) for name, x in maps.items()]
        if tiles is not None:
            terms.append(tiles)
        if self.tile_position is not None:
            terms.append(self._weigh("tiles", self._tile_positions(box, size)))
        return reduce(operator.add, terms) + self.block.bias[:, None, None]

    def _weigh(self, name: str, x: Tensor) -> Tensor:
        """Compute the term of a linear block for an input [B, c, H, W]: [B, C, H, W]."""
        assert isinstance(self.block, nn.Linear)
        weights = dict(zip(self.inputs, self.block.weight.split(list(self.input_dims.values()), 1), strict=True))
        return F.conv2d(x, weights[name][..., None, None])

    def _branches(self) -> Iterator[tuple[str, ChunkedGuidedUpsampler]]:
        return ((name, cast(ChunkedGuidedUpsampler, branch)) for name, branch in self.branches.items())

    def _join(self, maps: dict[str, Tensor]) -> Tensor:
        """Concatenate all inputs in their order: [B, D, H, W]."""
        return torch.cat([maps[name] for name in self.inputs], 1)

    def _stack(self, maps: dict[str, Tensor]) -> Tensor:
        """Make the input of the block: [B, c, H, W] each to [B, H, W, D]."""
        stacked = self._join(maps).permute(0, 2, 3, 1)
        if self.mix is None:
            return stacked
        return torch.cat([F.linear(stacked, self.mix), stacked[..., self.embed_dim :]], -1)

    def _tile_positions(self, box: Box, size: tuple[int, int]) -> Tensor:
        """Look up the position vector of each cell's tile: [1, C, *box.size]."""
        assert self.tile_position is not None
        tiles = self.tile_position.shape[-1]
        rows = torch.arange(box.top, box.bottom, device=self.tile_position.device) * tiles // size[0]
        cols = torch.arange(box.left, box.right, device=self.tile_position.device) * tiles // size[1]
        return self.tile_position[:, :, rows[:, None], cols]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, inputs={self.inputs}"


@register_upsampler(
    "featsharp-progressive", "FeatSharp level by level, one per prime factor, with tiles at every scale"
)
class ProgressiveFeatSharp(Upsampler):
    """A FeatSharp level per prime factor: each one sharpens the map of the one before with tiles of its scale.

    Factor 4 takes 1 + 4 + 16 passes through the backbone, 8 takes 85. The option ``prog`` of the published code.

    Args:
        embed_dim: Channels C, a multiple of 8.
        factor: A whole number above 1; 4 is two levels.
        max_tile_batch: Most images given to the backbone at once; None: all tiles of a scale.
        level: Keyword arguments of every level's :class:`FeatSharp`.
    """

    factors = "whole"
    trainable = True
    needs = "image, tiles"
    keeps_space = "nearly"
    paper = "FeatSharp, arXiv 2502.16025"
    options = FeatSharp.options

    def __init__(self, embed_dim: int, factor: float, *, max_tile_batch: int | None = None, **level: Any) -> None:
        super().__init__(embed_dim, factor)
        self.max_tile_batch = check_tile_batch(max_tile_batch)
        steps = level_factors(self.factor) or [1]
        self.levels = nn.ModuleList(FeatSharp(embed_dim, step, **level) for step in steps)
        self.window = self._levels()[0].window

    @property
    def input_upsample_factor(self) -> float:
        return self.factor

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        jbu = [p for level in self._levels() for p in level.parameter_groups()["jbu"]]
        return super().parameter_groups() | {"jbu": jbu}

    def spectral_modules(self) -> list[nn.Module]:
        return [module for level in self._levels() for module in level.spectral_modules()]

    def _levels(self) -> list[FeatSharp]:
        return [cast(FeatSharp, level) for level in self.levels]

    @property
    def variant(self) -> str:
        return self._levels()[0].variant

    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        low_res, summary = encode(resize(image, low_res_size))
        self.high_res_grid(low_res, output_size)  # refuses another size
        features = low_res
        for level in self._levels():
            size = level.high_res_grid(features)
            tiles = None
            if level.uses_tiles:
                tiles = encode_tile_map(
                    image,
                    encode,
                    low_res_size,
                    size_of(low_res),
                    size,
                    max_tile_batch=self.max_tile_batch,
                    process=level.process_tiles,
                )
            features = level.fuse(features, image, tiles, size)
        return UpsampleFeatures(low_res, features, summary)


class ColourMap(ChunkedGuidedUpsampler):
    """The input "rgb": the image at the grid of the result, projected to 16 channels."""

    def __init__(self, embed_dim: int, factor: float) -> None:
        super().__init__(embed_dim, factor)
        self.proj = nn.Conv2d(3, RGB_DIM, 1)

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        guidance = resize(image, size)
        return lambda box: self.proj(box.cut(guidance)).to(low_res.dtype)


def _check_inputs(inputs: Sequence[str]) -> tuple[str, ...]:
    if isinstance(inputs, str):
        raise ConfigError(f"the inputs of FeatSharp are a list; got {inputs!r}, use [{inputs}, tiles] or the like")
    for name in inputs:
        if name not in INPUTS:
            raise unknown_name("FeatSharp input", name, INPUTS)
    if not inputs or len(set(inputs)) != len(inputs):
        raise ConfigError(f"the inputs of FeatSharp must be one or more different maps; got {list(inputs)}")
    if inputs[0] == "rgb":
        raise ConfigError("the first input of FeatSharp is its residual path and needs features; put 'rgb' behind it")
    return tuple(inputs)


def _build_branch(name: str, embed_dim: int, factor: float, start: Start) -> Upsampler:
    """Build the upsampler that computes an input."""
    if name == "rgb":
        return ColourMap(embed_dim, factor)
    options = {"start": "published" if start == "published" else "bilinear"} if name in ("jbu", "resfu") else {}
    return build_upsampler(BRANCHES[name], embed_dim, factor, options)


def _start_mix(dims: Mapping[str, int]) -> Tensor:
    """Mix [C, D] of the maps at the start: the first, with details added or else mixed with tiles."""
    first = next(iter(dims))
    weights = dict.fromkeys(dims, 0.0) | {first: 1.0}
    if "details" in dims and first != "details":
        weights["details"] = DETAIL_WEIGHT
    elif "tiles" in dims and first != "tiles":
        weights |= {first: 1 - TILE_WEIGHT, "tiles": TILE_WEIGHT}
    return torch.cat([weights[name] * torch.eye(dims[first], channels) for name, channels in dims.items()], 1)
