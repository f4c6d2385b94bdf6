"""AnyUp: one upsampler for the features of any backbone, without training for it.

AnyUp (arXiv 2510.12764). JAFAR with three changes: the features are encoded by a layer whose weights do not depend on
the number of channels; the keys are computed from that code and the image; and a high-resolution cell attends only to
the low-resolution cells around it. The values are raw features, so the output stays in their convex hull. Projections
of the original that never reach the output are left out.

The order of normalisation and projection, its epsilon, the unit length of the features before they are encoded, and
zeros as the padding of the query convolution are those of JAFAR and could not be checked against the authors' results.
Edges of windows that fall on the border of a cell are exact here, where float32 may round them either way.

Shapes: B images, C channels, (h, w) low-resolution grid, (H, W) output grid, d = 128 query and key channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.device import without_autocast
from featsharp.layers.cross_attention import (
    DIM,
    MAX_SCORES,
    NUM_HEADS,
    AxialRope,
    PaddedConv2d,
    Padding,
    RMSNorm,
    attend,
    build_encoder,
    recompute,
)
from featsharp.layers.guidance import check_guidance_scale, shrink_guidance
from featsharp.ops.boxes import Box
from featsharp.ops.recording import is_open, is_recording, split_length
from featsharp.ops.resize import average, size_of
from featsharp.upsamplers.chunked import ChunkedGuidedUpsampler, ComputeChunk
from featsharp.upsamplers.registration import register_upsampler

NUM_FILTERS = 128
FILTER_SIDE = 5
# A cell sees 1 / INVERSE_REACH of the image to each side; whole, so that windows are exact.
INVERSE_REACH = 10
# Blocks of queries that attend together, per side of the map: few enough keys, large enough products.
BLOCKS_PER_SIDE = 8
# Numbers that the feature layer holds at once: 32 MiB in float32.
MAX_CODE_NUMBERS = 2**23


@register_upsampler("anyup", "AnyUp: attention to raw features nearby, one set of weights for every backbone")
class AnyUp(ChunkedGuidedUpsampler):
    """Windowed cross-attention with weights that do not depend on the backbone: 845,056 parameters for any C.

    Args:
        embed_dim: Channels C; no parameter depends on it.
        factor: In each direction.
        guidance_scale: An image larger than this many times the output grid is shrunk to that before it is encoded,
            which bounds memory; None, as published, takes it as it is.
        query_padding: Of the 3 x 3 convolution of the queries, "reflect" or "zeros".
    """

    trainable = True
    needs = "image"
    paper = "AnyUp, arXiv 2510.12764"
    options = ("guidance_scale", "query_padding")

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        guidance_scale: float | None = None,
        query_padding: Padding = "zeros",
    ) -> None:
        super().__init__(embed_dim, factor)
        self.guidance_scale = check_guidance_scale(guidance_scale)
        self.image_encoder = build_encoder(3)
        self.rope = AxialRope()
        self.query_encoder = build_encoder(DIM)
        self.query_conv = PaddedConv2d(DIM, DIM, 3, query_padding)
        self.key_encoder = build_encoder(DIM)
        self.feature_encoder = nn.Sequential(FeatureCode(), *build_encoder(DIM)[1:])
        self.aggregation = build_encoder(2 * DIM, kernel_size=3)
        self.query_norm, self.key_norm = (RMSNorm(DIM) for _ in range(2))
        self.query_proj, self.key_proj = (nn.Linear(DIM, DIM) for _ in range(2))

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        query, key = self.project(low_res, image, size)
        value = low_res.permute(0, 2, 3, 1)
        return lambda box: attend_nearby(query, key, value, box).permute(0, 3, 1, 2)

    def project(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Compute queries [B, H, W, d] and keys [B, h, w, d]; group normalisation needs the whole image."""
        encoded = self.rope(self.image_encoder(shrink_guidance(image, size, self.guidance_scale)))
        query = self.query_conv(average(self.query_encoder(encoded), size))
        key = average(self.key_encoder(encoded), size_of(low_res))
        code = self.feature_encoder(F.normalize(low_res.float(), dim=1).to(low_res.dtype))
        key = self.aggregation(torch.cat([key, code.to(key.dtype)], 1))
        # Autocast leaves normalisation alone, which has no fused kernel for two dtypes.
        dtype = self.query_norm.weight.dtype
        query = self.query_proj(self.query_norm(query.permute(0, 2, 3, 1).to(dtype)))
        return query, self.key_proj(self.key_norm(key.permute(0, 2, 3, 1).to(dtype)))


def attend_nearby(query: Tensor, key: Tensor, value: Tensor, box: Box, *, max_scores: int = MAX_SCORES) -> Tensor:
    """Attend from each cell to the low-resolution cells of its :class:`Windows`.

    Args:
        query: [B, H, W, d].
        key: [B, h, w, d].
        value: [B, h, w, C].
        box: Cells of the output grid to compute.
        max_scores: Most scores that are held at once, if not those of one query.

    Returns:
        [B, *box.size, C].
    """
    # Its blocks and windows would make a graph for every size. As a decorator this would import the compiler, which
    # takes seconds, at the start of every program.
    attend = torch.compiler.disable(_attend_nearby) if torch.compiler.is_compiling() else _attend_nearby
    return attend(query, key, value, box, max_scores)


def _attend_nearby(query: Tensor, key: Tensor, value: Tensor, box: Box, max_scores: int) -> Tensor:
    rows, cols = Windows(query.shape[1], key.shape[1]), Windows(query.shape[2], key.shape[2])
    side = _block_side(query.shape[0], rows, cols, max_scores)
    lines = []
    for top, bottom in _steps(box.top, box.bottom, side):
        line = []
        for left, right in _steps(box.left, box.right, side):
            block = Box(top, bottom, left, right)
            seen = Box(*rows.seen(top, bottom), *cols.seen(left, right))
            allowed = (
                rows.mask(top, bottom, query.device)[:, None, :, None]
                & cols.mask(left, right, query.device)[None, :, None, :]
            )
            out = recompute(
                attend,
                block.cut_channels_last(query).flatten(1, 2),
                seen.cut_channels_last(key).flatten(1, 2),
                seen.cut_channels_last(value).flatten(1, 2),
                allowed.flatten(2).flatten(0, 1),
            )
            line.append(out.unflatten(1, block.size))
        lines.append(torch.cat(line, 2))
    return torch.cat(lines, 1)


class FeatureCode(nn.Module):
    """Encoder of a map by the responses of its channels, of any number, to 128 filters: [B, C, h, w] to [B, 128, h, w].

        out = mean_c softmax_m( (filter_m * x_c) / taps )

    with ``taps`` the number of cells under the filter, fewer at the border.
    """

    def __init__(self, *, max_numbers: int = MAX_CODE_NUMBERS) -> None:
        super().__init__()
        self.max_numbers = max_numbers  # that are held at once
        self.basis = nn.Parameter(torch.empty(NUM_FILTERS, 1, FILTER_SIDE, FILTER_SIDE))
        nn.init.kaiming_uniform_(self.basis, math.sqrt(5))  # as convolutions start

    def forward(self, x: Tensor) -> Tensor:
        """Encode; the result is at least float32, as it hardly differs from 1 / 128."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            taps = F.conv2d(
                x.new_ones(1, 1, *size_of(x), dtype=dtype),
                x.new_ones(1, 1, FILTER_SIDE, FILTER_SIDE, dtype=dtype),
                padding=FILTER_SIDE // 2,
            )
            # A few channels at a time: all of them would take a map of 128 C channels.
            cells = x.shape[2] * x.shape[3]
            pieces = split_length(x.shape[1], x.shape[0], NUM_FILTERS * cells, self.max_numbers)
            total = sum(recompute(self._code, x[:, piece].to(dtype), taps) for piece in pieces)
        assert isinstance(total, Tensor)
        return total / x.shape[1]

    def _code(self, x: Tensor, taps: Tensor) -> Tensor:
        """Sum over channels instead of the mean."""
        responses = F.conv2d(x.flatten(0, 1)[:, None], self.basis.to(x.dtype), padding=FILTER_SIDE // 2) / taps
        return responses.softmax(1).unflatten(0, (-1, x.shape[1])).sum(1)


class Windows:
    """Windows on one axis: the key cells that queries see, computed in whole numbers.

    Query i of n, at r = (i + 0.5) / n, sees the cells floor(m max(0, r - 0.1)) to ceil(m min(1, r + 0.1)) of m, the
    last one excluded.
    """

    def __init__(self, queries: int, cells: int) -> None:
        self.queries, self.cells = queries, cells

    def seen(self, start: int, stop: int) -> tuple[int, int]:
        """Range [first, last) of the cells that any of the queries [start, stop) sees."""
        return self._first(start), self._last(stop - 1)

    def mask(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Mask of the cells ``seen`` that each query sees: bool [queries, cells]."""
        first, last = self.seen(start, stop)
        cell = torch.arange(first, last, device=device)
        centre = (2 * torch.arange(start, stop, device=device)[:, None] + 1) * INVERSE_REACH
        before = (centre - 2 * self.queries).clamp(min=0) * self.cells // self._unit
        after = ((centre + 2 * self.queries).clamp(max=self._unit) * self.cells + self._unit - 1) // self._unit
        return (before <= cell) & (cell < after)

    def _first(self, query: int) -> int:
        return max(0, (2 * query + 1) * INVERSE_REACH - 2 * self.queries) * self.cells // self._unit

    def _last(self, query: int) -> int:
        edge = min(self._unit, (2 * query + 1) * INVERSE_REACH + 2 * self.queries)
        return -(-edge * self.cells // self._unit)

    @property
    def _unit(self) -> int:
        return 2 * INVERSE_REACH * self.queries


def _block_side(images: int, rows: Windows, cols: Windows, max_scores: int) -> int:
    """Compute the side of the square blocks of queries that attend together, so that their scores fit.

    A recorded graph, in which each block is recorded, has as few as fit for one image, one where it leaves sizes open.
    """
    side = max(rows.queries, cols.queries)
    if is_open(rows.queries, cols.queries):
        return side
    if is_recording():
        images = 1
    else:
        side = -(-side // BLOCKS_PER_SIDE)
    while side > 1 and images * NUM_HEADS * _pairs(side, rows) * _pairs(side, cols) > max_scores:
        side //= 2
    return side


def _pairs(side: int, windows: Windows) -> int:
    """Upper bound of queries times cells along one side of a block."""
    queries = min(side, windows.queries)
    reach = 2 * windows.cells / INVERSE_REACH + queries * windows.cells / windows.queries
    return queries * min(windows.cells, math.ceil(reach) + 2)


def _steps(start: int, stop: int, side: int) -> list[tuple[int, int]]:
    if side >= stop - start:
        return [(start, stop)]
    return [(first, min(stop, first + side)) for first in range(start, stop, side)]
