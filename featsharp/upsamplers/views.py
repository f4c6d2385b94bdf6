"""Views: the map that best explains several passes over the picture, shifted and zoomed. Nothing is trained.

FeatUp and FeatSharp train a network so that its map, pooled to the backbone's grid, matches the backbone's features
of views of the picture. With pooling fixed to the mean over a cell that objective is quadratic in the map, and
:mod:`featsharp.ops.reconstruct` has its minimum. As far as we know, the combination of whole pictures, windows and a
larger picture in one estimate is ours. Relatives: those of :data:`RELATIVES`, which average what shifted pictures give,
and FeatUp's implicit network (arXiv 2403.10516), which fits the same views by gradient steps.

What each kind of view is good for, measured in docs/experiments.md: shifts by half a token place things; windows, which
see finer detail in another context, carry most of the rest; the larger picture draws boundaries.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError, unknown_name
from featsharp.layers.local_block import LocalBlock
from featsharp.layers.tiles import encode_in_batches
from featsharp.ops.reconstruct import Span, ViewGrid, average, reconstruct
from featsharp.ops.recording import is_open
from featsharp.ops.resize import enlarge, resize, size_of
from featsharp.upsamplers.base import Encode, UpsampleFeatures, check_tile_batch
from featsharp.upsamplers.chunked import ChunkedUpsampler, ComputeChunk
from featsharp.upsamplers.registration import register_upsampler

# How a whitened picture goes on beyond its edges: as its mirror image, as itself, or in its mean colour.
Beyond: TypeAlias = Literal["mirror", "circular", "zeros"]
FINEST = 2  # cells per token that are solved for: views of no more zoom say nothing about finer ones


class Views(NamedTuple):
    """Views of one zoom, at all pairs of places along height and width.

    Attributes:
        zoom: 2 shows half of each side.
        rows, cols: Places along height and width: of whole pictures, the shift in tokens; of windows, 0 at the first
            edge of the picture and 1 at the last.
        precision, edge: See :class:`ViewGrid`. Tokens at the edge of a window lack context.
    """

    zoom: float
    rows: tuple[float, ...]
    cols: tuple[float, ...]
    precision: float = 1.0
    edge: float = 1.0

    @property
    def passes(self) -> int:
        """Number of views, each of which is a pass."""
        return len(self.rows) * len(self.cols)


SHIFTS = Views(1, (0, 0.5), (0, 0.5))
WINDOWS = Views(1.3, (0, 1), (0, 1), edge=0.3)
CLOSE = [Views(1.7, (place,), (place,), precision=0.7, edge=0.3) for place in (0, 1)]
QUARTERS = Views(2, (0, 1), (0, 1), precision=0.5, edge=0.3)
LOW_RES = Views(1, (0,), (0,))
# Passes -> the views, each set within the next but one at most: 5 has windows instead of shifts. The larger picture of
# 16 costs about five passes.
SETS: dict[int, list[Views]] = {
    2: [LOW_RES, Views(1, (0.5,), (0.5,))],
    4: [SHIFTS],
    5: [LOW_RES, WINDOWS],
    8: [SHIFTS, WINDOWS],
    16: [SHIFTS, WINDOWS, *CLOSE],
}
# Passes of :class:`LearnedViews` -> its views.
LEARNED = {1: [LOW_RES], 5: SETS[5]}


def shift_by_pixels(rows: Iterable[int], cols: Iterable[int], patch_size: int) -> Views:
    """Make views of the whole picture shifted by pixels of a pass, whose tokens are ``patch_size`` apart."""
    return Views(1, tuple(row / patch_size for row in rows), tuple(col / patch_size for col in cols))


class Relative(NamedTuple):
    """A published method that averages the features of shifted pictures.

    Attributes:
        views: Makes its views for a patch size.
        beyond: See :data:`Beyond`.
        width: See :func:`featsharp.ops.reconstruct.average`.
    """

    views: Callable[[int], list[Views]]
    beyond: Beyond = "mirror"
    width: float = 1.0


RELATIVES = {
    # OverFeat (arXiv 1312.6229), FCN (arXiv 1411.4038): pictures shifted by parts of a token, tokens interlaced.
    "shift-and-stitch": Relative(lambda patch: [Views(1, (-0.25, 0.25), (-0.25, 0.25))], width=0.5),
    # Stochastic Resonance Transformers (arXiv 2310.03967): all shifts by up to 3 pixels, filled with zeros; tokens are
    # repeated over their pixels, shifted back and averaged, here over the shifts that show a pixel.
    "stochastic-resonance": Relative(lambda patch: [shift_by_pixels(range(-3, 4), range(-3, 4), patch)], "zeros"),
    # HR-Dv2 (arXiv 2410.19836): the same for circular shifts by 1 and 2 pixels in 8 directions; without the smaller
    # stride, which is the upsampler "stride", and the flips that it can add.
    "hr-dv2": Relative(
        lambda patch: [
            Views(1, (0,), (0,)),
            *(
                shift_by_pixels(rows, cols, patch)
                for d in (1, 2)
                for rows, cols in (((-d, d), (-d, d)), ((-d, d), (0,)), ((0,), (-d, d)))
            ),
        ],
        "circular",
    ),
    # Phase averaging (arXiv 2606.08132): four phases of the patch grid, aligned by repetition and averaged.
    "phase-averaging": Relative(lambda patch: [SHIFTS]),
}


@register_upsampler("views", "the map that best explains shifted, zoomed and larger views; no training")
class ViewReconstruction(ChunkedUpsampler):
    """Least-squares reconstruction from views.

    The map is solved for at up to two cells per token, and read bilinearly at the cells of a larger result.

    Args:
        embed_dim: Channels C.
        factor: In each direction.
        passes: 2, 4, 5, 8 or 16 passes through the backbone, the low-resolution one included; 4, 8 and 16 have the
            views of all smaller ones. 5 has windows beside the low-resolution pass; 16 has the picture at twice its
            size, too.
        flexible: Whether the backbone takes that larger picture; four windows of half its sides take its place else.
        views: Other views than those of ``passes``, each a :class:`Views` or its values; or the name of a published
            method of :data:`RELATIVES`, which averages instead of solving.
        larger: Precision of the larger picture, 0 without it; None: by ``passes``.
        prior: Precision of the bilinear map for each view, at two cells per token, above 0.
        windows: Factor of the precision of views with a zoom, above 0.
        max_tile_batch: Most images given to ``encode`` at once; None: all of them, the fastest.
        patch_size: Pixels per token of the backbone, for methods that shift by pixels.

    Raises:
        ConfigError: For another number of passes, or views and precisions out of range.
    """

    needs = "image, views"
    keeps_space = "nearly"
    paper = "ours; see docs/experiments.md"
    presets = ("passes=2", "passes=4", "passes=5", "passes=8", "", *(f"views={name}" for name in RELATIVES))
    options: tuple[str, ...] = ("passes", "views", "larger", "prior", "windows", "max_tile_batch")
    backbone_facts: tuple[str, ...] = ("flexible", "patch_size")

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        passes: int = 16,
        flexible: bool = True,
        views: Sequence[Sequence[Any]] | str | None = None,
        larger: float | None = None,
        prior: float = 0.05,
        windows: float = 1.0,
        max_tile_batch: int | None = None,
        patch_size: int = 14,
    ) -> None:
        super().__init__(embed_dim, factor)
        if passes not in SETS:
            raise ConfigError(f"passes must be one of {', '.join(map(str, SETS))}; got {passes!r}")
        default = 0.8 if flexible and passes >= 16 and views is None else 0.0
        self.larger = default if larger is None else larger
        if not (prior > 0 and windows > 0 and self.larger >= 0):
            raise ConfigError(
                f"precisions are above 0, that of the larger picture at least 0; got {prior}, {windows}, {larger}"
            )
        self.relative = None
        if isinstance(views, str):
            if views not in RELATIVES:
                raise unknown_name("method for views:", views, RELATIVES)
            self.relative = RELATIVES[views]
            views = self.relative.views(patch_size)
        elif views is None:
            views = SETS[passes] + ([QUARTERS] if passes >= 16 and not flexible else [])
        checked = [check_views(values) for values in views]
        self.views = [v._replace(precision=v.precision * windows) if v.zoom > 1 else v for v in checked]
        self.prior = prior
        self.max_tile_batch = check_tile_batch(max_tile_batch)

    @property
    def input_upsample_factor(self) -> float:
        return FINEST

    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        if is_open(*size_of(image)):
            raise ConfigError(
                "views solves with matrices made for the size of the picture; export it for one height and width"
            )
        low_res, summary = encode(resize(image, low_res_size))
        size = self.high_res_grid(low_res, output_size)
        solved = self.encode_rest(low_res, image, encode, low_res_size, size)
        return UpsampleFeatures(low_res, resize(solved, size), summary)

    def solve(self, low_res: Tensor, grids: list[ViewGrid], size: tuple[int, int]) -> Tensor:
        """Reconstruct the map from views, at (H, W) or at most two cells per token: [B, C, <=H, <=W]."""
        grid = size_of(low_res)
        solved = min(size[0], FINEST * grid[0]), min(size[1], FINEST * grid[1])
        prior = resize(low_res, solved).to(torch.promote_types(low_res.dtype, torch.float32))
        precision = self.larger + sum(views.precision * views.passes for views in self.views)
        finer = FINEST**2 * grid[0] * grid[1] / (solved[0] * solved[1])
        estimate = torch.compiler.disable(self._estimate) if torch.compiler.is_compiling() else self._estimate
        return estimate(grids, prior, self.prior * precision * finer).to(low_res.dtype)

    def _estimate(self, grids: list[ViewGrid], prior: Tensor, precision: float) -> Tensor:
        if self.relative is None:
            return reconstruct(grids, prior, precision)
        circular = self.relative.beyond == "circular"
        return average(grids, size_of(prior), width=self.relative.width, circular=circular)

    def encode_rest(
        self, low_res: Tensor, image: Tensor, encode: Encode, low_res_size: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        return self.solve(low_res, self.encode_views(low_res, image, encode, low_res_size), size)

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        return lambda box: enlarge(low_res, size, box)

    def encode_views(
        self, low_res: Tensor, image: Tensor, encode: Encode, low_res_size: tuple[int, int]
    ) -> list[ViewGrid]:
        """Encode the views of images.

        Args:
            low_res: Features [B, C, h, w] of the low-resolution pass, which is one of the views.
            image: [B, 3, height, width], any size.
            encode: See :class:`Encode`.
            low_res_size: (h, w) in pixels of a pass.
        """
        grid, pixels = size_of(low_res), size_of(image)
        first = find_pixels(1, 0, pixels[0], grid[0]), find_pixels(1, 0, pixels[1], grid[1])
        places = [
            tuple(
                [find_pixels(views.zoom, place, length, tokens) for place in axis]
                for axis, length, tokens in zip((views.rows, views.cols), pixels, grid, strict=True)
            )
            for views in self.views
        ]
        wanted = [box for rows, cols in places for box in product(rows, cols) if box != first]
        beyond = self.relative.beyond if self.relative else "mirror"
        pictures = [resize(cut_view(image, *box, beyond), low_res_size) for box in wanted]
        boxes = {first: low_res}
        if wanted:
            features, _ = encode_in_batches(torch.cat(pictures), encode, self.max_tile_batch)
            boxes |= dict(zip(wanted, features.unflatten(0, (len(wanted), -1)), strict=True))
        grids = []
        for views, (rows, cols) in zip(self.views, places, strict=True):
            cells = torch.cat([torch.cat([boxes[row, col] for col in cols], 3) for row in rows], 2)
            rows_seen, cols_seen = (
                [Span(start / length, stop / length) for start, stop in axis]
                for axis, length in zip((rows, cols), pixels, strict=True)
            )
            grids.append(ViewGrid(cells, rows_seen, cols_seen, views.precision, views.edge))
        if self.larger:
            larger, _ = encode(resize(image, (FINEST * low_res_size[0], FINEST * low_res_size[1])))
            grids.append(ViewGrid(larger, [Span(0, 1)], [Span(0, 1)], self.larger))
        return grids

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, views={sum(views.passes for views in self.views)}, larger={self.larger:g}"


@register_upsampler("learned-views", "the map of one or five views, refined by a block that learned from many views")
class LearnedViews(ViewReconstruction):
    """Few views, refined by FeatSharp's local block, which is trained to match the map of many views.

    The map solved from the views passes through a linear mix with the bilinear map and then, beside an encoding of the
    picture, through :class:`LocalBlock`. It starts as the map of its views (of one pass: the bilinear map), and learns
    that of more views by regression (objective ``regression``), or by any other objective.

    Args:
        embed_dim: Channels C, a multiple of 16.
        factor: In each direction; the block works at that many cells per token.
        passes: 1, the low-resolution pass alone, or 5, with four windows that show 1 / 1.3 of each side.
        window: Side of the block's attention window, odd.
        picture_dim: Channels of the picture's encoding, a multiple of 16; 0 without.
        linear: Leave out block and picture: the result is the mix, a linear map of the views.
        max_tile_batch: Most images given to ``encode`` at once; None: all of them, the fastest.

    Raises:
        ConfigError: For another number of passes, or channels that the block does not take.
    """

    trainable = True
    needs = "image, views"
    keeps_space = "nearly"
    paper = "ours; block of FeatSharp, arXiv 2502.16025, figure 2"
    options = ("passes", "window", "picture_dim", "linear", "max_tile_batch")
    backbone_facts = ()

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        passes: int = 5,
        window: int = 7,
        picture_dim: int = 64,
        linear: bool = False,
        max_tile_batch: int | None = None,
    ) -> None:
        if passes not in LEARNED:
            raise ConfigError(f"passes must be one of {', '.join(map(str, LEARNED))}; got {passes!r}")
        super().__init__(embed_dim, factor, views=LEARNED[passes], max_tile_batch=max_tile_batch)
        maps = torch.eye(embed_dim), torch.zeros(embed_dim, embed_dim)  # one view alone says no more than bilinear
        self.mix = nn.Parameter(torch.cat(maps if passes > 1 else maps[::-1], 1))
        self.block, self.picture, self.dim = None, None, embed_dim + picture_dim
        if linear:
            return
        self.picture = PictureEncoder(picture_dim) if picture_dim else None
        self.block = LocalBlock(self.dim, embed_dim, window=window, layer_scale=None)
        assert self.block.attention is not None
        assert self.block.mlp is not None
        for layer in (self.block.attention.proj, self.block.mlp.down):
            # As good as zero, but every layer before has a gradient.
            nn.init.normal_(layer.weight, std=1e-6)
            nn.init.zeros_(layer.bias)

    @property
    def input_upsample_factor(self) -> float:
        return max(FINEST, self.factor)

    @property
    def variant(self) -> str:
        return "linear" if self.block is None else ""

    @property
    def linear_weight(self) -> Tensor:
        """The mix [C, 2 C] of the solved and the bilinear map."""
        return self.mix

    def linear_maps(self, image: Tensor, encode: Encode, low_res_size: tuple[int, int]) -> Tensor:
        """Compute the maps that are mixed, [B, 2 C, H, W]."""
        low_res, _ = encode(resize(image, low_res_size))
        return self._encode_maps(low_res, image, encode, low_res_size)

    def encode_rest(
        self, low_res: Tensor, image: Tensor, encode: Encode, low_res_size: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        maps = self._encode_maps(low_res, image, encode, low_res_size).to(self.mix.dtype)
        mixed = F.conv2d(maps, self.mix[..., None, None])
        if self.picture is not None:
            mixed = torch.cat([mixed, self.picture(image.to(mixed.dtype), size_of(mixed))], 1)
        if self.block is not None:
            mixed = self.block(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return resize(mixed.to(low_res.dtype), (min(size[0], mixed.shape[-2]), min(size[1], mixed.shape[-1])))

    def _encode_maps(self, low_res: Tensor, image: Tensor, encode: Encode, low_res_size: tuple[int, int]) -> Tensor:
        size = self.high_res_grid(low_res)
        solved = self.solve(low_res, self.encode_views(low_res, image, encode, low_res_size), size)
        return torch.cat([resize(solved, size), resize(low_res, size)], 1)


class PictureEncoder(nn.Module):
    """Three convolutions from 8 x 8 pixels to a cell: [B, 3, height, width] and (H, W) to [B, C, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = [3, max(16, dim // 2), dim, dim]
        self.layers = nn.Sequential()
        for before, after in pairwise(widths):
            self.layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            self.layers.append(nn.GELU())

    def forward(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        encoded: Tensor = self.layers(resize(image, (8 * size[0], 8 * size[1])))
        return encoded


def check_views(values: Sequence[Any]) -> Views:
    """Make views of plain values, such as those of a configuration; ConfigError for what cannot be views."""
    try:
        views = Views(*values)
        valid = views.passes > 0 and views.zoom >= 1 and views.precision > 0 and views.edge >= 0
    except TypeError:
        valid = False
    if not valid:
        raise ConfigError(
            "views are (zoom, rows, cols, precision, edge), zoom from 1, rows and cols lists of places, precision "
            f"above 0, edge at least 0; got {values!r}"
        )
    return views._replace(rows=tuple(views.rows), cols=tuple(views.cols))


def find_pixels(zoom: float, place: float, pixels: int, tokens: int) -> tuple[int, int]:
    """Find the pixels [start, stop) of a view along an axis of the picture, which may lie beyond it.

    Args:
        zoom: See :class:`Views`.
        place: One of its rows or cols.
        pixels: Length of the axis.
        tokens: Of a pass along it.
    """
    length = max(1, round(pixels / zoom))
    start = round(place * pixels / tokens) if zoom == 1 else round(place * (pixels - length))
    return start, start + length


def cut_view(image: Tensor, rows: tuple[int, int], cols: tuple[int, int], beyond: Beyond = "mirror") -> Tensor:
    """Cut pixels [start, stop) along both axes of [B, C, H, W], up to one length of it beyond its edges."""
    for dim, (start, stop) in ((2, rows), (3, cols)):
        length = image.shape[dim]
        if start >= 0 and stop <= length:
            image = image.narrow(dim, start, stop - start)
            continue
        positions = torch.arange(start, stop, device=image.device)
        inside = (positions >= 0) & (positions < length)
        positions = positions % (2 * length) if beyond == "mirror" else positions % length
        image = image.index_select(dim, torch.minimum(positions, 2 * length - 1 - positions))
        if beyond == "zeros":
            image = image * inside.to(image.dtype).view(-1, *[1] * (3 - dim))
    return image
