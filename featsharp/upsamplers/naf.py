"""NAF: every cell attends to the raw features of nearby tokens, by an encoding of the image alone.

NAF (Neighborhood Attention Filtering, arXiv 2511.18452). Like AnyUp it serves any backbone with one set of weights, and
needs no code of the features at all: with Q the encoded image, averaged over the cells of the output and rotated by
position, and K its average over tokens, per head

    out(i) = sum_p softmax_p(<Q(i), K(p)> / sqrt(64)) * x(p),   p in the 9 x 9 tokens around the token of cell i

The window is moved back onto the map at the border. Heads share the channels of x, so the output is a convex
combination of features per head.

Shapes: B images, C channels, (h, w) low-resolution grid, (H, W) output grid, N = 4 heads of D = 64 query channels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.layers.cross_attention import GROUPS, GroupNorm, PaddedConv2d, rotate_halves
from featsharp.layers.guidance import shrink_guidance
from featsharp.layers.input_conditioner import IMAGENET_MEAN, IMAGENET_STD, check_whitening
from featsharp.ops.boxes import Box
from featsharp.ops.local_attention import local_attention
from featsharp.ops.resize import average, size_of
from featsharp.upsamplers.chunked import ChunkedGuidedUpsampler, ComputeChunk
from featsharp.upsamplers.registration import register_upsampler

DIM = 256
NUM_HEADS = 4
HEAD_DIM = DIM // NUM_HEADS
WINDOW = 9
ROPE_BASE = 100.0
# The image is shrunk to so many pixels per cell of the output.
GUIDANCE_SCALE = 4


@register_upsampler(
    "naf", "NAF: attention to raw features nearby by the image alone, one set of weights for all backbones"
)
class NAF(ChunkedGuidedUpsampler):
    """Neighbourhood attention with an encoded image as queries and keys: 662,528 parameters for any C.

    Under a limit on memory only the attention works in chunks: the encoder of the image normalises over all of it, at
    up to four pixels per cell of the output in each direction.

    Args:
        embed_dim: Channels C; no parameter depends on it. Heads share them, the last one has fewer where 4 does not
            divide them.
        factor: In each direction.
        mean, std: Whitening of the backbone, three values each: the encoder was trained on images with that of
            ImageNet, to which they are brought.
        published: Whether results are those of the published code where that is peculiar. An image of more than four
            pixels per cell is then shrunk to nearly a square where the output is none (here: to four per cell, with
            antialias), and at ratios of output to grid that are not whole, neighbours are cells of the output at whole
            steps, which repeat some tokens and skip others (here: the 9 x 9 tokens). It needs the whole map at once.

    Raises:
        ConfigError: For a whitening that is none.
    """

    trainable = True
    needs = "image"
    paper = "NAF, arXiv 2511.18452"
    window = WINDOW
    options = ("published",)
    backbone_facts = ("mean", "std")
    periods: Tensor

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        published: bool = False,
    ) -> None:
        super().__init__(embed_dim, factor)
        self.mean, self.std = check_whitening(mean, std)
        self.published = published
        self.halo = None if published else 0
        self.pixel_encoder = _build_branch(kernel_size=1)
        self.context_encoder = _build_branch(kernel_size=3)
        # 2 pi over a period is an angle per half image; the published weights have their own.
        self.register_buffer("periods", ROPE_BASE ** (torch.arange(HEAD_DIM // 4) / (HEAD_DIM // 4)))

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        query = self.encode_image(image, size)
        key = average(query, size_of(low_res))
        channels = low_res.shape[1]
        value = F.pad(low_res, (0, 0, 0, 0, 0, -channels % NUM_HEADS)) if channels % NUM_HEADS else low_res
        query, key, value = (x.unflatten(1, (NUM_HEADS, -1)).permute(0, 3, 4, 1, 2) for x in (query, key, value))
        attend = _attend_on_lines if self.published else attend_nearby

        def compute(box: Box) -> Tensor:
            out = attend(query, key, value, box).flatten(3)
            return out[..., :channels].permute(0, 3, 1, 2)

        return compute

    def encode_image(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Encode a whitened image [B, 3, height, width] as queries [B, N D, *size]: colours, context, position."""
        image = self._whiten(image)
        if self.published:
            image = _shrink_to_square(image, size)
        else:
            most = (GUIDANCE_SCALE * size[0], GUIDANCE_SCALE * size[1])
            if image.shape[2] > most[0] or image.shape[3] > most[1]:
                image = shrink_guidance(image, size, GUIDANCE_SCALE)
        encoded = torch.cat([average(encode(image), size) for encode in (self.pixel_encoder, self.context_encoder)], 1)
        return rotate_halves(encoded.unflatten(1, (NUM_HEADS, -1)), self._angles(size)).flatten(1, 2).to(image.dtype)

    def _whiten(self, image: Tensor) -> Tensor:
        """From the whitening of the backbone to that of ImageNet."""
        if (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD):
            return image
        scale = [ours / wanted for ours, wanted in zip(self.std, IMAGENET_STD, strict=True)]
        shift = [(a - b) / std for a, b, std in zip(self.mean, IMAGENET_MEAN, IMAGENET_STD, strict=True)]
        return image * image.new_tensor(scale)[:, None, None] + image.new_tensor(shift)[:, None, None]

    def _angles(self, size: tuple[int, int]) -> Tensor:
        """[D, *size] float32: row angles and column angles of each period, and once more for the other halves."""
        rows, cols = ((2 * torch.arange(n, dtype=torch.float32, device=self.periods.device) + 1) / n - 1 for n in size)
        rate = (2 * math.pi / self.periods.float())[:, None, None]
        row_angle, col_angle = (rate * rows[:, None]).expand(-1, -1, size[1]), (rate * cols).expand(-1, size[0], -1)
        return torch.cat([row_angle, col_angle, row_angle, col_angle])


def attend_nearby(query: Tensor, key: Tensor, value: Tensor, box: Box) -> Tensor:
    """Attend from cells of the output to the 9 x 9 tokens around the token that each lies in.

    Args:
        query: [B, H, W, N, D].
        key: [B, h, w, N, D], h <= H, w <= W.
        value: [B, h, w, N, E].
        box: Cells of the output to compute.

    Returns:
        [B, *box.size, N, E].
    """
    grid, size = (key.shape[1], key.shape[2]), (query.shape[1], query.shape[2])
    if box.covers(size) and _divides(grid, size):
        return _attend(query, key, value)
    # Queries sorted by their token, as many per token as any has: a place that is left over repeats a query.
    places = max(-(-size[0] // grid[0]), -(-size[1] // grid[1]))
    rows = _Line(grid[0], size[0], box.top, box.bottom, places, query.device)
    cols = _Line(grid[1], size[1], box.left, box.right, places, query.device)
    seen = Box(*rows.seen, *cols.seen)
    out = _attend(
        query[:, rows.sorted[:, None], cols.sorted], seen.cut_channels_last(key), seen.cut_channels_last(value)
    )
    return out[:, rows.places[:, None], cols.places]


class _Line:
    """Queries start..stop of one axis among the tokens that they see.

    Attributes:
        seen: Range [first, last) of these tokens.
        sorted: Queries by token, ``places`` per token of ``seen``.
        places: Where the queries start..stop are in that order.
    """

    def __init__(self, tokens: int, queries: int, start: int, stop: int, places: int, device: torch.device) -> None:
        def token_of(query: Tensor) -> Tensor:
            return (2 * query + 1) * tokens // (2 * queries)

        def first_of(token: Tensor) -> Tensor:
            return -((tokens - 2 * queries * token) // (2 * tokens))

        first, last = (2 * start + 1) * tokens // (2 * queries), (2 * stop - 1) * tokens // (2 * queries)
        # At a border of the map all that windows reach when they are moved; elsewhere windows stay where they are.
        low, high = max(0, min(first - WINDOW // 2, tokens - WINDOW)), min(tokens, max(last + 1 + WINDOW // 2, WINDOW))
        self.seen = (low, high)
        token = torch.arange(low, high, device=device)[:, None]
        place = torch.arange(places, device=device)
        self.sorted = torch.minimum(first_of(token) + place, first_of(token + 1) - 1).flatten()
        query = torch.arange(start, stop, device=device)
        self.places = (token_of(query) - low) * places + query - first_of(token_of(query))


def _divides(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether a token has as many cells in each direction, a whole number."""
    return size[0] % grid[0] == 0 and size[1] % grid[1] == 0 and size[0] // grid[0] == size[1] // grid[1]


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return local_attention(query, key, value, window=WINDOW, scale=HEAD_DIM**-0.5, border="shift")


def _attend_on_lines(query: Tensor, key: Tensor, value: Tensor, box: Box) -> Tensor:
    """:func:`attend_nearby` as published: neighbours are 9 x 9 cells of the output at whole steps, read as tokens.

    A cell belongs to the line of cells that have its remainder by the step; windows are moved back onto lines.
    """
    grid, size = (key.shape[1], key.shape[2]), (query.shape[1], query.shape[2])
    if all(n % tokens == 0 for n, tokens in zip(size, grid, strict=True)):
        return attend_nearby(query, key, value, box)
    steps = size[0] // grid[0], size[1] // grid[1]
    rows, cols = (_nearest_tokens(tokens, n, query.device) for tokens, n in zip(grid, size, strict=True))
    out = value.new_empty(*query.shape[:3], *value.shape[3:])
    for y in range(steps[0]):
        for x in range(steps[1]):
            line = rows[y :: steps[0], None], cols[x :: steps[1]]
            cells = query[:, y :: steps[0], x :: steps[1]]
            out[:, y :: steps[0], x :: steps[1]] = _attend(cells, key[:, line[0], line[1]], value[:, line[0], line[1]])
    return box.cut_channels_last(out)


def _nearest_tokens(tokens: int, cells: int, device: torch.device) -> Tensor:
    """Compute the token of each cell, by the rounding of the published enlargement."""
    token = torch.arange(tokens, dtype=torch.float32, device=device)
    return F.interpolate(token[None, None], cells, mode="nearest-exact")[0, 0].long()


def _shrink_to_square(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Shrink an image of more than four pixels per cell as published: both sides by both sides of the output."""
    most = GUIDANCE_SCALE * min(size)
    if image.shape[2] <= GUIDANCE_SCALE * size[0] and image.shape[3] <= GUIDANCE_SCALE * size[1]:
        return image
    shrunk = min(image.shape[2], most), min(image.shape[3], most)
    return F.interpolate(image, shrunk, mode="bilinear", align_corners=False)


def _build_branch(kernel_size: int) -> nn.Sequential:
    """Build an encoder of images [B, 3, height, width] to [B, N D / 2, height, width]; its names are the published."""
    dim = DIM // 2
    return nn.Sequential(
        PaddedConv2d(3, dim, kernel_size, bias=True), _Block(dim, kernel_size), _Block(dim, kernel_size)
    )


class _Block(nn.Module):
    """Conv(SiLU(GN(Conv(SiLU(GN(x)))))), without a residual."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (GroupNorm(GROUPS, dim) for _ in range(2))
        self.conv1, self.conv2 = (PaddedConv2d(dim, dim, kernel_size, bias=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(x)))
