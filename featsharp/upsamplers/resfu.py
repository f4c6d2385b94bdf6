"""ReSFU: every new cell is a weighted mean of nine samples around it, weighted by similarity after a learned contrast.

ReSFU (arXiv 2407.02283); direct, at any factor and output size. For features x on (h, w) and guidance y (the image
averaged over the cells of the output) on (H, W), with d = 32:

    q = conv(y),  k = bilinear(conv(x))                            1x1 convolutions to d channels, at (H, W)
    scores = semantic(k, guided filter of k by q) + detail(blur(q), q)                         nine per new cell
    out(i) = sum_o softmax_o(scores(i)) * x(i + o),                o in the 3 x 3 steps of one low-resolution cell

Each of ``semantic`` and ``detail`` is a :class:`PairedContrast`. x(i + o) is the bilinear sample of x at the exact
position of new cell i, o low-resolution cells away, clamped at the border; a sample whose centre lies outside of the
image is left out of the softmax.

The paper leaves some things open, which are read here as follows: the two contrasts have separate parameters; the
grouped convolution has d output channels; the guided filter is the fast one of He and Sun (arXiv 1505.00996), which
also averages its coefficients; the dilation, at factors that are not whole, is the nearest whole number. Parameters
that cancel are left out: the offsets of the norms before a difference. FeatSharp (arXiv 2502.16025) compares with a
variant guided by the tile map beside the image: "resfu-tiled".
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featsharp.device import without_autocast
from featsharp.errors import ConfigError
from featsharp.layers.guidance import pool_guidance
from featsharp.ops.boxes import Box, whole
from featsharp.ops.padding import pad_border
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.chunked import ChunkedGuidedUpsampler, ComputeChunk, ComputeTiledChunk, TiledUpsampler
from featsharp.upsamplers.registration import register_upsampler

DIM = 32
HIDDEN = 128
CONV_GROUPS = 4
NORM_GROUPS = 8
START_STD = 0.02

# The nine samples, row by row; the middle one is at the new cell.
OFFSETS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
CENTRE = OFFSETS.index((0, 0))

# Guided filter: half the side of its box at half the resolution, and the variance that counts as flat.
BOX_RADIUS = 4
FLAT = 1e-3
# A Gaussian of sigma 1 on three cells.
BLUR_SIDE = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))

# The score of the middle at the start: "published" is the mean of all nine, a broad blur; "bilinear" has 92 % of the
# weight there.
START_SCORE = {"bilinear": math.log(8 * 0.92 / 0.08), "published": 0.0}

Start = Literal["bilinear", "published"]


@register_upsampler("resfu", "ReSFU: nine bilinear samples, weighted by guided similarity")
class ReSFU(ChunkedGuidedUpsampler):
    """ReSFU with the image as guidance.

    Under a limit on memory only the weighted samples are computed in chunks: the weights are normalised over the whole
    image, and need several hundred numbers per new cell.

    Args:
        embed_dim: Channels C.
        factor: In each direction, 1 or more.
        start: "bilinear" starts close to the bilinear map, "published" at a mean over three low-resolution cells.

    Raises:
        ConfigError: For an unknown start.
    """

    factors = "any"
    trainable = True
    needs = "image"
    keeps_space = "yes"
    paper = "ReSFU, arXiv 2407.02283"
    options = ("start",)

    def __init__(self, embed_dim: int, factor: float, *, start: Start = "bilinear") -> None:
        super().__init__(embed_dim, factor)
        self.similarity = Similarity(embed_dim, guidance_channels=3, start=start)

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        weights = self.similarity(low_res, pool_guidance(image, size))
        return lambda box: weighted_samples(low_res, weights, box)


@register_upsampler("resfu-tiled", "ReSFU, guided by the tile map beside the image")
class TiledReSFU(TiledUpsampler):
    """ReSFU whose guidance is the image and, stacked on it, the tile map.

    The result still consists of low-resolution features: tiles only guide.

    Args:
        embed_dim: Channels C.
        factor: In each direction, 1 or more.
        start: As in :class:`ReSFU`.
        max_tile_batch: Most images given to ``encode`` at once; None: all of them, the fastest.

    Raises:
        ConfigError: For an unknown start, or a batch below 1.
    """

    factors = "any"
    trainable = True
    needs = "image, tiles"
    keeps_space = "yes"
    paper = "ReSFU, arXiv 2407.02283, with tiles as in FeatSharp, arXiv 2502.16025"
    halo = None  # norms are over the whole tile map
    options = ("start", "max_tile_batch")

    def __init__(
        self, embed_dim: int, factor: float, *, start: Start = "bilinear", max_tile_batch: int | None = None
    ) -> None:
        super().__init__(embed_dim, factor, max_tile_batch=max_tile_batch)
        self.similarity = Similarity(embed_dim, guidance_channels=3 + embed_dim, start=start)

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeTiledChunk:
        colours = pool_guidance(image, size)

        def compute(box: Box, tiles: Tensor | None) -> Tensor:
            assert tiles is not None
            weights = self.similarity(low_res, torch.cat([colours.to(tiles.dtype), tiles], 1))
            return weighted_samples(low_res, weights, box)

        return compute


class Similarity(nn.Module):
    """Weights of the nine samples of each new cell, from features and guidance; has all parameters of ReSFU."""

    def __init__(self, embed_dim: int, guidance_channels: int, start: Start) -> None:
        super().__init__()
        if start not in START_SCORE:
            raise ConfigError(f"unknown start {start!r}; use {' or '.join(map(repr, START_SCORE))}")
        self.query = _start(nn.Conv2d(guidance_channels, DIM, 1))
        self.key = _start(nn.Conv2d(embed_dim, DIM, 1))
        self.semantic, self.detail = PairedContrast(), PairedContrast()
        with torch.no_grad():
            self.semantic.scores.bias[CENTRE] = START_SCORE[start]  # type: ignore[index]

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        """Features [B, C, h, w] and guidance [B, G, H, W] to [B, 9, H, W], at least float32, with a sum of one."""
        grid, size = size_of(features), size_of(guidance)
        dilation = max(1, _round(size[0] / grid[0])), max(1, _round(size[1] / grid[1]))
        query = self.query(guidance.to(features.dtype))
        key = resize(self.key(features), size)
        scores = self.semantic(key, guided_filter(query, key), dilation) + self.detail(blur(query), query, dilation)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.masked_fill(~inside_image(grid, size, scores.device), -torch.inf).softmax(1)


class PairedContrast(nn.Module):
    """Nine scores of the differences between the surroundings of each cell in one map and that cell in another.

    The published "paired central difference convolution": both maps under one group norm, then a dilated 3x3
    convolution of the first minus, at each of its nine taps, the second. 10,793 parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        # A group norm without an offset, which would cancel in the difference.
        self.norm_weight = nn.Parameter(torch.ones(DIM))
        self.contrast = nn.Conv2d(DIM, HIDDEN, 3, groups=CONV_GROUPS)
        nn.init.kaiming_normal_(self.contrast.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.contrast.bias)  # type: ignore[arg-type]
        self.mix = _start(nn.Conv2d(HIDDEN, DIM, 1, groups=CONV_GROUPS))
        self.norm = nn.GroupNorm(NORM_GROUPS, DIM)
        self.scores = _start(nn.Conv2d(DIM, len(OFFSETS), 1))

    def forward(self, surroundings: Tensor, centre: Tensor, dilation: tuple[int, int]) -> Tensor:
        """Compute scores [B, 9, H, W] of maps [B, d, H, W]; the dilation (y, x) is in their cells."""
        first, second = (F.group_norm(x, NORM_GROUPS, self.norm_weight.to(x.dtype)) for x in (surroundings, centre))
        conv, (y, x) = self.contrast, dilation
        padded = pad_border(first, (x, x, y, y), "replicate")
        around = F.conv2d(padded, conv.weight, conv.bias, dilation=dilation, groups=CONV_GROUPS)
        at_centre = F.conv2d(second, conv.weight.sum((2, 3), keepdim=True), groups=CONV_GROUPS)
        hidden = self.mix((around - at_centre).relu()).relu()
        return self.scores(self.norm(hidden))


def weighted_samples(x: Tensor, weights: Tensor, box: Box | None = None) -> Tensor:
    """Compute the weighted sum of nine bilinear samples around each new cell, one low-resolution cell apart.

    Args:
        x: [B, C, h, w].
        weights: [B, 9, H, W], in the order of ``OFFSETS``.
        box: Cells to compute; None: all.

    Returns:
        [B, C, *box.size] in the dtype of ``x``; sums are at least float32. At most two samples are held at a time, also
        for the backward pass, which computes them again.
    """
    size = size_of(weights)
    box = box or whole(size)
    with without_autocast(x):  # sums are float32, as those of autocast's own softmax
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = {dy: _sampler(x.shape[2], size[0], dy, full)[box.top : box.bottom] @ full for dy in (-1, 0, 1)}
        columns = {dx: _sampler(x.shape[3], size[1], dx, full)[box.left : box.right].T for dx in (-1, 0, 1)}
        out: Tensor | None = None
        for (dy, dx), weight in zip(OFFSETS, box.cut(weights).to(full.dtype).split(1, 1), strict=True):
            if torch.is_grad_enabled():
                term = checkpoint(_weighted_sample, rows[dy], columns[dx], weight, use_reentrant=False)
                out = term if out is None else out + term
            else:
                term = _weighted_sample(rows[dy], columns[dx], weight)
                out = term if out is None else out.add_(term)
            del term  # before the next one is made
    assert out is not None
    return out.to(x.dtype)


def _weighted_sample(rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    return (rows @ columns).mul(weight)


def guided_filter(guide: Tensor, x: Tensor) -> Tensor:
    """Fit ``x`` [B, d, H, W] by a locally linear function of ``guide`` [B, d, H, W], channel by channel.

    The function is fitted in boxes at half the resolution (fast guided filter, arXiv 1505.00996). Variances of half
    types would be noise, so it computes in float32 at least; the result has the dtype of ``x``.
    """
    size = size_of(x)
    half = (size[0] + 1) // 2, (size[1] + 1) // 2
    compute = torch.promote_types(x.dtype, torch.float32)
    full_guide = guide.to(compute)
    small_guide, small = resize(full_guide, half), resize(x.to(compute), half)
    mean_guide, mean = _box_mean(small_guide), _box_mean(small)
    variance = (_box_mean(small_guide.square()) - mean_guide.square()).clamp(min=0)
    slope = (_box_mean(small_guide * small) - mean_guide * mean) / (variance + FLAT)
    level = mean - slope * mean_guide
    return (resize(_box_mean(slope), size) * full_guide + resize(_box_mean(level), size)).to(x.dtype)


def _box_mean(x: Tensor) -> Tensor:
    """Average over those cells of the box that lie on the map."""
    return F.avg_pool2d(x, 2 * BOX_RADIUS + 1, stride=1, padding=BOX_RADIUS, count_include_pad=False)


def blur(x: Tensor) -> Tensor:
    """Blur [B, d, H, W] by a 3x3 Gaussian of sigma 1, borders replicated."""
    for padding, dim in (((0, 0, 1, 1), 2), ((1, 1, 0, 0), 3)):
        padded, length = pad_border(x, padding, "replicate"), x.shape[dim]
        sides = padded.narrow(dim, 0, length) + padded.narrow(dim, 2, length)
        x = BLUR_SIDE * sides + (1 - 2 * BLUR_SIDE) * x
    return x


def inside_image(grid: tuple[int, int], size: tuple[int, int], device: torch.device) -> Tensor:
    """Mask of the nine samples of each cell of ``size`` centred inside of the image or on its edge: [9, H, W]."""
    rows, columns = (
        torch.stack([_ticks(cells, length, offset, device) for offset in (-1, 0, 1)])
        for cells, length in zip(grid, size, strict=True)
    )
    rows = (rows >= 0) & (rows <= 2 * grid[0] * size[0])
    columns = (columns >= 0) & (columns <= 2 * grid[1] * size[1])
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1)


def _sampler(cells: int, length: int, offset: int, like: Tensor) -> Tensor:
    """Matrix [length, cells] of linear interpolation at the samples along an axis, clamped at the border."""
    positions = (_ticks(cells, length, offset, like.device).to(like.dtype) / (2 * length) - 0.5).clamp(0, cells - 1)
    distance = (positions[:, None] - torch.arange(cells, device=like.device)).abs()
    return (1 - distance).clamp(min=0)


def _ticks(cells: int, length: int, offset: int, device: torch.device) -> Tensor:
    """Positions of the samples of ``length`` new cells on an axis of ``cells`` old ones, from its start.

    In whole numbers, of which an old cell has 2 * length, so that samples on the edge are exact.
    """
    return (2 * torch.arange(length, device=device) + 1) * cells + 2 * length * offset


def _start(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.normal_(conv.weight, std=START_STD)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _round(x: float) -> int:
    return math.floor(x + 0.5)
