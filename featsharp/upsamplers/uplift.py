"""UPLiFT: a small convolutional network that doubles a map by weighing the 17 features around every new cell.

UPLiFT (arXiv 2601.17950), the models of features. One encoder of the image serves all doublings, and so do one decoder
and one attender:

    e3, e4 = Encoder(image)                                      two levels, 128 channels, at 16 pixels per token
    y = Double(cat[x, e4])                                       at the grid of x, 64 channels
    g = Double(cat[Up(y), e3])                                   at twice that
    out(i) = sum_d softmax_d(Linear(g(i)) + g(i)) * x(i // 2 + d)

d are 17 of the 25 steps of a 5 x 5 window. Every output is a convex combination of low-resolution features, from less
than four tokens away however often the map is doubled. e3 and e4 are read at one pixel per cell, the one in its
corner, and Up aligns corners: with that the published weights were trained.

Shapes: B images, C channels, (h, w) grid of a doubling.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box, whole
from featsharp.ops.local_filter import local_filter
from featsharp.ops.recording import is_open, is_recording, split_length
from featsharp.ops.resize import enlarge_aligned, resample_box, resample_chunk, resize, size_of
from featsharp.ops.windows import Border
from featsharp.upsamplers.base import check_factor
from featsharp.upsamplers.chunked import ChunkedGuidedUpsampler, ComputeChunk
from featsharp.upsamplers.registration import register_upsampler

# Channels of the levels of the encoder, of which the last two are used; of the decoder.
LEVELS = (16, 32, 64, 128, 128)
DIM = 64
PIXELS_PER_TOKEN = 16
# Steps of the attender in cells (rows, columns), in the order of its channels.
OFFSETS = (
    (-2, -2), (-2, 0), (-2, 2), (-1, -1), (-1, 0), (-1, 1), (0, -2), (0, -1), (0, 0), (0, 1), (0, 2), (1, -1), (1, 0),
    (1, 1), (2, -2), (2, 0), (2, 2),
)  # fmt: skip
REACH, WINDOW = 2, 5
# Cells that the two 3 x 3 convolutions of a block of the decoder see around each, and pixels that the five of the
# encoder see.
BLOCK_HALO, ENCODER_HALO = 2, len(LEVELS)
# Numbers of a strip of the image, all levels together: 64 MiB in float32.
MAX_STRIP_NUMBERS = 2**24


@register_upsampler("uplift", "UPLiFT: a small network doubles the map by weighing 17 features around every new cell")
class UPLiFT(ChunkedGuidedUpsampler):
    """Doublings as often as the output needs, then antialiased resizing where it is no power of two.

    The image is resized to 16 pixels per token and whitened as for the backbone. Under a limit on memory the last
    doubling works in chunks, the encoder in strips of the image.

    In training mode batch normalisation needs more than one cell; in eval mode images of a batch do not mix.

    Args:
        embed_dim: Channels C.
        factor: In each direction, more than 1.
        published: Whether the number of doublings follows from the factor alone, a power of two, whatever output size
            is asked for, as in the published code; here it follows from the size.

    Parameters: 789,521 for C = 384.
    """

    trainable = True
    needs = "image"
    paper = "UPLiFT, arXiv 2601.17950"
    window = WINDOW
    options = ("published",)

    def __init__(self, embed_dim: int, factor: float, *, published: bool = False) -> None:
        super().__init__(embed_dim, factor)
        if published:
            check_factor(factor, "powers of two", "UPLiFT as published")
        if self.factor == 1:
            raise ConfigError("UPLiFT doubles the grid at least once; got factor 1, use 2 (or 'identity' for factor 1)")
        self.published = published
        self.encoder = nn.ModuleList(
            FittedBlock(inputs, outputs, 1) for inputs, outputs in zip((3, *LEVELS), LEVELS, strict=False)
        )
        self.coarse = FittedBlock(embed_dim + LEVELS[-1], DIM, 2)
        self.expand = nn.ConvTranspose2d(DIM, DIM, 2, stride=2)
        self.fine = FittedBlock(DIM + LEVELS[-2], DIM, 2)
        self.attend = nn.Conv2d(DIM, len(OFFSETS), 1)

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        grid, count = size_of(low_res), self.count_doublings(low_res, size)
        levels = self.encode_image(image, grid, count)
        x = low_res
        for guide in levels[:-1]:
            x = self.double_map(x, guide, whole(size_of(guide.fine)))
        natural = size_of(levels[-1].fine)

        def compute(box: Box) -> Tensor:
            seen = resample_box(box, natural, size)
            return resample_chunk(self.double_map(x, levels[-1], seen), seen, natural, size, box)

        return compute

    def count_doublings(self, low_res: Tensor, size: tuple[int, int]) -> int:
        """Count the doublings of a map [B, C, h, w] for an output of ``size``, one at least."""
        grid = size_of(low_res)
        if self.published or is_open(*grid, *size):
            return math.ceil(math.log2(self.factor))
        count = 1
        while grid[0] * 2**count < size[0] or grid[1] * 2**count < size[1]:
            count += 1
        return count

    def encode_image(
        self, image: Tensor, grid: tuple[int, int], count: int, *, max_numbers: int = MAX_STRIP_NUMBERS
    ) -> list["Guide"]:
        """Encode an image [B, 3, height, width] for ``count`` doublings that begin at ``grid``.

        Where no gradient is needed, strips of it are encoded that hold at most ``max_numbers``, or one row of tokens.
        """
        image = resize(image, (PIXELS_PER_TOKEN * grid[0], PIXELS_PER_TOKEN * grid[1]))
        strips = [slice(0, grid[0])]
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_recording()):
            numbers = PIXELS_PER_TOKEN**2 * grid[1] * sum(LEVELS)
            strips = split_length(grid[0], image.shape[0], numbers, max_numbers)
        guides = [self._encode_strip(image, grid, strip, count) for strip in strips]
        if len(guides) == 1:
            return guides[0]
        return [
            Guide(*(torch.cat(parts, 2) for parts in zip(*level, strict=True))) for level in zip(*guides, strict=True)
        ]

    def _encode_strip(self, image: Tensor, grid: tuple[int, int], rows: slice, count: int) -> list["Guide"]:
        """Encode some rows of tokens of the resized image."""
        top, bottom = PIXELS_PER_TOKEN * rows.start, PIXELS_PER_TOKEN * rows.stop
        strip = Box(top, bottom, 0, image.shape[3])
        seen = strip.grow(ENCODER_HALO, size_of(image))
        x = seen.cut(image)
        levels: list[Tensor] = []
        for block in self.encoder:
            x = block(x)
            levels.append(x)
        fine, coarse = (strip.relative_to(seen).cut(level) for level in levels[-2:])
        sizes = [((rows.stop - rows.start) * 2**n, grid[1] * 2**n) for n in range(count + 1)]
        return [
            Guide(F.interpolate(coarse, small, mode="nearest"), F.interpolate(fine, large, mode="nearest"))
            for small, large in itertools.pairwise(sizes)
        ]

    def double_map(self, x: Tensor, guide: "Guide", box: Box) -> Tensor:
        """Compute the cells ``box`` of a map [B, C, h, w] at twice its size: [B, C, *box.size]."""
        return weigh_neighbours(x, self.weigh(x, guide, box), box)

    def weigh(self, x: Tensor, guide: "Guide", box: Box) -> Tensor:
        """Weights of the 17 features around the cells ``box`` of the doubled map: [B, 17, *box.size]."""
        grid = size_of(x)
        size = 2 * grid[0], 2 * grid[1]
        if box.covers(size):
            fine, source, coarse = box, whole(grid), whole(grid)
        else:  # backwards from what is wanted: each block of convolutions sees some cells more
            fine = box.grow(BLOCK_HALO, size)
            source = _halved(fine).grow(1, grid)
            coarse = source.grow(BLOCK_HALO, grid)
        y = self.coarse(torch.cat([coarse.cut(x), coarse.cut(guide.coarse)], 1))
        y = source.relative_to(coarse).cut(y)
        doubled = fine.relative_to(_doubled(source)).cut(self.expand(y))
        doubled = doubled + enlarge_aligned(y, source, grid, size, fine)
        g = self.fine(torch.cat([doubled, fine.cut(guide.fine)], 1))
        g = box.relative_to(fine).cut(g)
        return (self.attend(g) + g[:, : len(OFFSETS)]).softmax(1)


class Guide(NamedTuple):
    """Levels of the image for one doubling of an (h, w) grid."""

    coarse: Tensor  # [B, 128, h, w]
    fine: Tensor  # [B, 128, 2 h, 2 w]


class FittedBlock(nn.Module):
    """Convolutions of 3 x 3 with batch normalisation and ReLU, one of 1 x 1, and the input added.

    Channels that the input has more than the output are left out of the sum, those that it lacks count as zeros.

    Args:
        inputs, outputs: Numbers of channels.
        convs: Number of 3 x 3 convolutions.
    """

    def __init__(self, inputs: int, outputs: int, convs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n in range(convs):
            conv = nn.Conv2d(outputs if n else inputs, outputs, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        missing = out.shape[1] - x.shape[1]
        return out + (F.pad(x, (0, 0, 0, 0, 0, missing)) if missing > 0 else x[:, : out.shape[1]])


def weigh_neighbours(x: Tensor, weights: Tensor, box: Box) -> Tensor:
    """Sum the features at the 17 :data:`OFFSETS` around new cells; beyond the border the nearest is repeated.

    Args:
        x: [B, C, h, w].
        weights: [B, 17, *box.size], by offset.
        box: Cells of the map at twice the size.

    Returns:
        [B, C, *box.size].
    """
    # The eight other entries of the 5 x 5 windows read a map of zeros behind the weights.
    places = [(dy + REACH) * WINDOW + dx + REACH for dy, dx in OFFSETS]
    entries = [places.index(n) if n in places else len(places) for n in range(WINDOW**2)]
    spread = torch.cat([weights, torch.zeros_like(weights[:, :1])], 1)[:, entries]
    grid = size_of(x)
    if box.covers((2 * grid[0], 2 * grid[1])):
        return _filter(x, spread, "replicate")
    cells = _halved(box)
    rows, cols = (
        torch.arange(start - REACH, stop + REACH, device=x.device).clamp(0, length - 1)
        for start, stop, length in ((cells.top, cells.bottom, grid[0]), (cells.left, cells.right, grid[1]))
    )
    whole_cells = _doubled(cells)
    inner = box.relative_to(whole_cells)
    halo, (height, width) = 2 * REACH, whole_cells.size
    padding = (inner.left + halo, width - inner.right + halo, inner.top + halo, height - inner.bottom + halo)
    out = _filter(x[:, :, rows[:, None], cols], F.pad(spread, padding), "zeros")
    return Box(*(side + halo for side in inner)).cut(out)


def _filter(x: Tensor, spread: Tensor, border: Border) -> Tensor:
    """Filter [B, C, h, w] by weights [B, 25, 2 h, 2 w]."""
    weights = spread.permute(0, 2, 3, 1).unflatten(3, (1, WINDOW, WINDOW))
    out = local_filter(weights, x.permute(0, 2, 3, 1)[:, :, :, None], border=border)
    return out[:, :, :, 0].permute(0, 3, 1, 2)


def _halved(box: Box) -> Box:
    """Cells whose doubled ones cover ``box``."""
    return Box(box.top // 2, (box.bottom + 1) // 2, box.left // 2, (box.right + 1) // 2)


def _doubled(box: Box) -> Box:
    return Box(*(2 * side for side in box))
