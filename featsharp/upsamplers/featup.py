"""FeatUp's joint bilateral upsampling (JBU): a stack of learned, image-guided filters.

FeatUp (arXiv 2403.10516). Per level, with keys k = MLP(guidance) and offsets p in a 7 x 7 window:

    w_p(i) = softmax_p( exp(theta) <k[i + p], k[i]> - |t_p|^2 / (2 sigma^2) ),   t_p in linspace(-1, 1, 7)^2
    out(i) = sum_p w_p(i) * bilinear(source)[i + p],                             borders mirrored

which equals the published product of a range and a spatial kernel wherever that product's floor of 1e-7 is not active
(always for |sigma| >= 0.249). The scalars range_alpha and spatial_alpha of FeatSharp's copy cancel and are left out.

FeatUp's code has more than the paper, and its published weights need it (``flavour="featup"``): the source is enlarged
bicubically, a small network corrects the weights of every level, and a convolution the result.

    w(i) <- w(i) + 0.1 M([w(i), guidance(i)])        49 weights first, then 3 channels; M per level, 49 outputs
    out  <- out + 0.1 (A out + b)                    A [C, C], after the last level

There the guidance of a level is the adaptive average of the whole image, also where the image is the smaller one, and
the product of kernels is computed as published, with its floor.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featsharp.errors import ConfigError
from featsharp.layers.guidance import pool_guidance
from featsharp.ops.boxes import Box, whole
from featsharp.ops.local_attention import local_attention
from featsharp.ops.local_filter import local_filter
from featsharp.ops.recording import split_length
from featsharp.ops.resize import average, enlarge, enlarge_chunk, size_of, source_box
from featsharp.ops.windows import border_cells
from featsharp.upsamplers.base import level_factors, level_sizes
from featsharp.upsamplers.chunked import ChunkedGuidedUpsampler, ComputeChunk
from featsharp.upsamplers.registration import register_upsampler

KEY_DIM = 32
WINDOW = 7
MAX_LOG_TEMPERATURE = 9.21  # exp() of it is 1e4, the published clamp

# Width of the spatial kernel at the start, in units of half the window: "published" is a broad blur of the bilinear
# map, "bilinear" has 92 % of the weight at the centre and still a gradient to widen or narrow.
START_SIGMA = {"published": 1.0, "bilinear": 0.12}

# Weight of the residuals that the fix-up networks predict.
FIXUP_WEIGHT = 0.1
# The floor of the sum of the product of kernels.
MIN_WEIGHT_SUM = 1e-7
# Most filter weights that FixedUpLevel holds at once: 16 MiB in float32.
MAX_WEIGHTS = 2**22

Start = Literal["bilinear", "published"]
Flavour = Literal["featsharp", "featup"]


@register_upsampler("featup", "FeatUp: a stack of learned joint bilateral filters guided by the image")
class FeatUp(ChunkedGuidedUpsampler):
    """One JBU level per prime factor of ``factor`` (of the next whole number, for a fraction).

    Levels have separate parameters, and the last one filters at the requested size.

    Args:
        embed_dim: Channels C.
        factor: In each direction; 6 means a level of 2 and one of 3.
        start: "bilinear" starts close to the bilinear map, "published" as the authors' code does.
        flavour: "featsharp" is the filter alone, as in the paper and in FeatSharp; "featup" has the fix-ups, dropout
            and bicubic enlargement of FeatUp's code, for its published weights. The first is the default: its result
            consists of means of features and stays in their space.
        final_fixup: Whether flavour "featup" ends with its C x C convolution, C^2 + C parameters.
    """

    trainable = True
    needs = "image"
    paper = "FeatUp, arXiv 2403.10516"
    options = ("start", "flavour", "final_fixup")

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        start: Start = "bilinear",
        flavour: Flavour = "featsharp",
        final_fixup: bool = True,
    ) -> None:
        super().__init__(embed_dim, factor)
        if flavour not in ("featsharp", "featup"):
            raise ConfigError(f"unknown flavour {flavour!r}; use 'featsharp' or 'featup'")
        fixups = flavour == "featup"
        level = FixedUpLevel if fixups else JBULevel
        self.levels = nn.ModuleList(level(step, start=start) for step in level_factors(self.factor))
        self.final_fixup = FinalFixup(embed_dim) if fixups and final_fixup else None
        # Chunks of a bicubic enlargement are not implemented.
        self.halo = None if fixups else 0
        self.keeps_space = "nearly" if fixups else "yes"

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        sizes = level_sizes(size_of(low_res), level_factors(self.factor), size)[: len(self.levels)]
        guidance = [level.pool(image, grid) for level, grid in zip(self._levels(), sizes, strict=True)]

        def compute(box: Box) -> Tensor:
            out = self._compute(low_res, guidance, box, size)
            return out if self.final_fixup is None else self.final_fixup(out)

        return compute

    def _compute(self, low_res: Tensor, guidance: list[Tensor], box: Box, size: tuple[int, int]) -> Tensor:
        """Compute the cells ``box`` of a map of ``size`` by the levels that there is guidance for."""
        if not guidance:
            return enlarge(low_res, size, box)
        *before, last = guidance
        level = self._levels()[len(before)]
        # The cells that this level reads, and those of the level before that they depend on.
        seen = box.grow(WINDOW // 2, size)
        source_size = size_of(before[-1] if before else low_res)
        below = source_box(seen, source_size, size)
        source = self._compute(low_res, before, below, source_size)
        value = level.enlarge(source, below, source_size, size, seen)
        return box.relative_to(seen).cut(level.filter(value, seen.cut(last)))

    def _levels(self) -> list["JBULevel"]:
        return [cast(JBULevel, level) for level in self.levels]


class JBULevel(nn.Module):
    """One joint bilateral filter after a bilinear enlargement by ``factor``; 1186 parameters."""

    def __init__(self, factor: int, *, start: Start = "bilinear") -> None:
        super().__init__()
        if start not in START_SIGMA:
            raise ConfigError(f"unknown start {start!r}; use {' or '.join(map(repr, START_SIGMA))}")
        self.factor = factor
        self.keys = nn.Sequential(nn.Conv2d(3, KEY_DIM, 1), nn.GELU(), nn.Conv2d(KEY_DIM, KEY_DIM, 1))
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.sigma = nn.Parameter(torch.tensor(START_SIGMA[start]))

    def forward(self, source: Tensor, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, C, h, w] and an image [B, 3, H, W] of any size to [B, C, *size]; None: ``factor`` times (h, w)."""
        size = size or (self.factor * source.shape[-2], self.factor * source.shape[-1])
        source_size = size_of(source)
        value = self.enlarge(source, whole(source_size), source_size, size, whole(size))
        return self.filter(value, self.pool(image, size))

    def pool(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Pool an image to the guidance [B, 3, *size] of a level."""
        return pool_guidance(image, size)

    def enlarge(
        self, source: Tensor, chunk: Box, source_size: tuple[int, int], size: tuple[int, int], box: Box
    ) -> Tensor:
        """Enlarge the map below; see :func:`featsharp.ops.resize.enlarge_chunk`."""
        return enlarge_chunk(source, chunk, source_size, size, box)

    def filter(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Filter a map [B, C, H, W] bilaterally under guidance [B, 3, H, W]: [B, C, H, W]."""
        key = self.keys(guidance).permute(0, 2, 3, 1)[:, :, :, None]
        value = x.permute(0, 2, 3, 1)[:, :, :, None]
        out = local_attention(
            key,
            key,
            value,
            window=WINDOW,
            bias=self.spatial_bias()[None],
            scale=self.temperature(),
            border="reflect",
        )
        return out.squeeze(3).permute(0, 3, 1, 2)

    def temperature(self) -> Tensor:
        return self.log_temperature.clamp(-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE).exp()

    def spatial_bias(self) -> Tensor:
        """-|t|^2 / (2 sigma^2), [7, 7]."""
        axis = torch.linspace(-1, 1, WINDOW, dtype=torch.float32, device=self.sigma.device)
        offsets = (axis[:, None] ** 2 + axis**2).to(self.sigma.dtype)
        # The small number avoids 0 / 0 at the centre when sigma is 0.
        return -offsets / (2 * self.sigma**2 + 1e-12)


class FixedUpLevel(JBULevel):
    """A level as in FeatUp's code: bicubic enlargement, dropout, weights corrected by a network; 6233 parameters.

    Args:
        factor, start: As for :class:`JBULevel`.
        max_weights: Most filter weights that are held at once.
    """

    def __init__(self, factor: int, *, start: Start = "bilinear", max_weights: int = MAX_WEIGHTS) -> None:
        super().__init__(factor, start=start)
        self.max_weights = max_weights
        first, gelu, second = self.keys
        self.keys = nn.Sequential(first, gelu, nn.Dropout2d(0.1), second)
        taps = WINDOW**2
        self.fixup = nn.Sequential(nn.Conv2d(taps + 3, taps, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(taps, taps, 1))

    def pool(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        return average(image, size)

    def enlarge(
        self, source: Tensor, chunk: Box, source_size: tuple[int, int], size: tuple[int, int], box: Box
    ) -> Tensor:
        """Enlarge a whole map bicubically."""
        return F.interpolate(source, size, mode="bicubic", align_corners=False)

    def filter(self, x: Tensor, guidance: Tensor) -> Tensor:
        """As :meth:`JBULevel.filter`, in chunks of rows: the weights of a map are many times its guidance.

        In training dropout of the fix-up is drawn for every chunk.
        """
        key, size = self.keys(guidance), size_of(x)
        pieces = split_length(size[0], x.shape[0], WINDOW**2 * size[1], self.max_weights)
        chunks = []
        for piece in pieces:
            box = Box(piece.start, piece.stop, 0, size[1])
            seen = box.grow(WINDOW // 2, size)
            inputs = seen.cut(x), seen.cut(key), seen.cut(guidance)
            if len(pieces) > 1 and torch.is_grad_enabled():
                out = checkpoint(self._filter_all, *inputs, use_reentrant=False)
            else:
                out = self._filter_all(*inputs)
            chunks.append(box.relative_to(seen).cut(out))
        return torch.cat(chunks, 2)

    def _filter_all(self, x: Tensor, key: Tensor, guidance: Tensor) -> Tensor:
        weights = self._kernel(key).to(key.dtype)
        weights = weights + FIXUP_WEIGHT * self.fixup(torch.cat([weights, guidance.to(key.dtype)], 1))
        weights = weights.permute(0, 2, 3, 1).unflatten(3, (1, WINDOW, WINDOW))
        out = local_filter(weights, x.permute(0, 2, 3, 1)[:, :, :, None], border="reflect")
        return out.squeeze(3).permute(0, 3, 1, 2)

    def _kernel(self, key: Tensor) -> Tensor:
        """Range kernel times spatial kernel over their sum, at least float32: [B, d, H, W] to [B, 49, H, W]."""
        key = key.to(torch.promote_types(key.dtype, torch.float32))
        (height, width), halo = size_of(key), WINDOW // 2
        rows, cols = (
            border_cells(torch.arange(-halo, n + halo, device=key.device), n, "reflect")[0] for n in (height, width)
        )
        padded = key[:, :, rows][..., cols]
        shifts = ((y, x) for y in range(WINDOW) for x in range(WINDOW))
        scores = torch.stack([(padded[..., y : y + height, x : x + width] * key).sum(1) for y, x in shifts], 1)
        product = (self.temperature() * scores).softmax(1) * self.spatial_bias().exp().reshape(1, -1, 1, 1)
        return product / product.sum(1, keepdim=True).clamp(min=MIN_WEIGHT_SUM)


class FinalFixup(nn.Module):
    """x + 0.1 Conv1x1(x); C^2 + C parameters."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + FIXUP_WEIGHT * self.layers(x)
