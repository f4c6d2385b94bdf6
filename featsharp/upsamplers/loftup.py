"""LoftUp: a small transformer whose queries are pixels, by coordinates and colours, and whose keys are all tokens.

LoftUp (arXiv 2504.14032). Every cell of the output is described by Fourier features of its position and of the colours
of the image there; two layers of global cross-attention then gather from the normalised features what belongs to it:

    X = convolutions(fourier(row, col, r, g, b)),   T = [LN(x), fourier(row, col)]
    X = X + Attention(LN(X), LN(T));  X = X + MLP(X)                                      twice
    out = LN(Linear(LN(X)))

The output is learned and lies in a space of its own, not in that of the features.

The highest frequency, 22,026 per half image or full range of a colour, makes of the last bit of a float32 coordinate a
thousandth of a radian: results of two devices agree to 1e-2, not better. Positions are therefore rounded once, from
exact ones, and the image is shrunk in float32 whatever the type of the weights.

Shapes: B images, C channels, (h, w) low-resolution grid, (H, W) output grid, E = C + 20.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.device import without_autocast
from featsharp.errors import ConfigError
from featsharp.layers.cross_attention import recompute
from featsharp.ops.boxes import Box
from featsharp.ops.recording import split_length
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.chunked import ChunkedGuidedUpsampler, ComputeChunk
from featsharp.upsamplers.registration import register_upsampler

NUM_HEADS, NUM_LAYERS = 4, 2
# Frequencies of pixels (of rows, columns and three colours) and of tokens (of rows and columns), from e^-2 to e^10.
IMAGE_FREQUENCIES, TOKEN_FREQUENCIES = 20, 5
LOWEST, HIGHEST = -2.0, 10.0
# The least range of a colour that is stretched to one.
FLAT = 1e-4
# Cells around a chunk that its convolutions see.
CONV_HALO = 2
# Numbers that the queries of one piece and their scores may take: 64 MiB in float32.
MAX_NUMBERS = 2**24


@register_upsampler("loftup", "LoftUp: cross-attention from positions and colours to all low-resolution features")
class LoftUp(ChunkedGuidedUpsampler):
    """A transformer from pixels to tokens, for one number of channels: 4,303,894 parameters for C = 384.

    The range of each colour is stretched to one, so that the whitening of the image does not matter. In training mode
    batch normalisation needs more than one cell and sees the whole map; in eval mode images of a batch do not mix.

    Args:
        embed_dim: Channels C, a multiple of 4.
        factor: In each direction.
        published: Whether colours are stretched by the range over all images of a batch, and positions are rounded as
            in the published code (see above), by which results differ by some thousandths.

    Raises:
        ConfigError: For a number of channels that 4 heads cannot share.
    """

    trainable = True
    needs = "image"
    keeps_space = "no"
    paper = "LoftUp, arXiv 2504.14032"
    options = ("published",)

    def __init__(self, embed_dim: int, factor: float, *, published: bool = False) -> None:
        super().__init__(embed_dim, factor)
        if embed_dim % NUM_HEADS:
            lower = embed_dim // NUM_HEADS * NUM_HEADS
            raise ConfigError(
                f"LoftUp has {NUM_HEADS} heads and needs a multiple of {NUM_HEADS} channels; got {embed_dim}, "
                f"use {f'{lower} or ' if lower else ''}{lower + NUM_HEADS}"
            )
        self.published = published
        if published:
            self.halo = None  # a range over the batch is none over a chunk of one image
        self.feature_norm = nn.LayerNorm(embed_dim)
        self.token_phases = FourierFeatures(2, TOKEN_FREQUENCIES)
        self.image_phases = FourierFeatures(5, IMAGE_FREQUENCIES)
        described, width = self.image_phases.channels + 3, embed_dim + self.token_phases.channels
        self.image_norm = nn.LayerNorm(described)
        self.image_convs = nn.Sequential(
            nn.Conv2d(described, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.layers = nn.ModuleList(_Layer(width, embed_dim) for _ in range(NUM_LAYERS))
        self.query_norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed_dim)
        self.output_norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        # How resizing rounds depends on the layout of memory and on what records a graph, and the frequencies show it.
        image = image.float().contiguous()
        colours = self.stretch(image if size_of(image) == size else resize(image, size))
        tokens = self.encode_tokens(low_res)

        def compute(box: Box) -> Tensor:
            seen = box.grow(CONV_HALO, size)
            described = self.describe(seen.cut(colours), seen, size).to(low_res.dtype)
            query = box.relative_to(seen).cut(self.encode_cells(described))
            out = self.gather(query.flatten(2).transpose(1, 2), tokens)
            return out.transpose(1, 2).unflatten(2, box.size)

        return compute

    def encode_tokens(self, low_res: Tensor) -> Tensor:
        """Normalise features [B, C, h, w] and add their positions: [B, h w, E]."""
        tokens = self.feature_norm(low_res.permute(0, 2, 3, 1))
        grid = size_of(low_res)
        place = self.token_phases(self.positions(Box(0, grid[0], 0, grid[1]), grid, low_res.device))
        place = place.permute(1, 2, 0).to(tokens.dtype).expand(*tokens.shape[:3], -1)
        return torch.cat([tokens, place], 3).flatten(1, 2)

    def describe(self, colours: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
        """Describe the cells ``box`` of the output: stretched colours [B, 3, *box.size] to [B, 203, *box.size]."""
        places = self.positions(box, size, colours.device).expand(
            colours.shape[0], -1, -1, -1
        )  # len() would fix it in a graph
        return torch.cat([self.image_phases(torch.cat([places, colours], 1)), colours], 1)

    def encode_cells(self, described: Tensor) -> Tensor:
        """Normalise and convolve what describes cells [B, 203, ...]: [B, E, ...]."""
        normed = self.image_norm(described.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.image_convs(normed)

    def gather(self, query: Tensor, tokens: Tensor, *, max_numbers: int = MAX_NUMBERS) -> Tensor:
        """Gather features for queries [B, Q, E] from tokens [B, K, E], ``max_numbers`` at a time: [B, Q, C]."""
        keys = [layer.project_tokens(tokens) for layer in self._attention_layers()]
        # Fused attention holds no scores, but not every device has it.
        per_query = NUM_HEADS * tokens.shape[1] + 6 * query.shape[2]
        pieces = split_length(query.shape[1], query.shape[0], per_query, max_numbers)
        arguments = [x for pair in keys for x in pair]
        if len(pieces) == 1:
            return self._gather(query, *arguments)
        return torch.cat([recompute(self._gather, query[:, piece], *arguments) for piece in pieces], 1)

    def _gather(self, query: Tensor, *keys: Tensor) -> Tensor:
        for n, layer in enumerate(self._attention_layers()):
            query = layer(query, *keys[2 * n : 2 * n + 2])
        return self.output_norm(self.project(self.query_norm(query)).to(query.dtype))

    def _attention_layers(self) -> list["_Layer"]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def stretch(self, image: Tensor) -> Tensor:
        """Stretch the colours of an image [B, 3, height, width] to [-0.5, 0.5]."""
        over = (0, 2, 3) if self.published else (2, 3)
        low, high = image.amin(over, keepdim=True), image.amax(over, keepdim=True)
        return (image - low) / (high - low).clamp(min=FLAT) - 0.5

    def positions(self, box: Box, size: tuple[int, int], device: torch.device) -> Tensor:
        """Positions [2, *box.size] float32 of the cells of a map, from -1 to 1 with both ends."""
        spans = ((box.top, box.bottom), (box.left, box.right))
        if self.published:
            rows, cols = (torch.linspace(-1, 1, n, dtype=torch.float32, device=device) for n in size)
            rows, cols = rows[box.top : box.bottom], cols[box.left : box.right]
        else:
            rows, cols = (_steps(*span, n, device) for span, n in zip(spans, size, strict=True))
        return torch.stack([rows[:, None].expand(box.size), cols.expand(box.size)])


class FourierFeatures(nn.Module):
    """Sines and cosines of maps at several frequencies, with learned phases.

    For maps c and frequencies f_m = e^-2 ... e^10, evenly spaced in their logarithm, with phases b:

        [sin(c f_m + b_0), cos(c f_m + b_1)],   m outer, c inner

    Args:
        maps: Number of maps.
        frequencies: Number of frequencies.
    """

    def __init__(self, maps: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.channels = 2 * maps * frequencies
        # The shape is the published one; phases are used in the order of memory, by which maps and frequencies mix.
        self.biases = nn.Parameter(torch.randn(2, maps, frequencies))

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., maps, H, W] float32 to [..., channels, H, W] float32."""
        with without_autocast(x):
            rate = torch.linspace(LOWEST, HIGHEST, self.frequencies, dtype=torch.float32, device=x.device).exp()
            angle = (x[..., None, :, :, :] * rate[:, None, None, None]).flatten(-4, -3)
            sine, cosine = self.biases.float().flatten(1)[..., None, None].unbind(0)
            return torch.cat([(angle + sine).sin(), (angle + cosine).cos()], -3)


class _Layer(nn.Module):
    """Cross-attention and an MLP, each added to its input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.query_norm, self.token_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def project_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens [B, K, E] to keys and values [B, heads, K, E / heads]."""
        width = tokens.shape[2]
        projected = F.linear(self.token_norm(tokens), self.in_proj.weight[width:], self.in_proj.bias[width:])
        key, value = projected.unflatten(2, (2, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [B, Q, E] to the same shape."""
        width = query.shape[2]
        heads = F.linear(self.query_norm(query), self.in_proj.weight[:width], self.in_proj.bias[:width])
        heads = heads.unflatten(2, (NUM_HEADS, -1)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(heads, key, value)
        query = query + self.out_proj(attended.transpose(1, 2).flatten(2))
        return query + self.mlp(query)


def _steps(start: int, stop: int, count: int, device: torch.device) -> Tensor:
    """Positions start..stop of ``count`` from -1 to 1 in float32, each rounded from the exact one."""
    if count == 1:
        return torch.full((stop - start,), -1.0, dtype=torch.float32, device=device)
    # Whole numbers are exact, so only the division rounds.
    place = torch.arange(start, stop, device=device)
    return (2 * place - (count - 1)).float() / (count - 1)
