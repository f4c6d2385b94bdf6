"""Least-squares reconstruction of a map from pooled views of it.

A view is an upright rectangle of the picture that was encoded on its own; each of its cells is modelled as the mean of
the map over that cell. The places of the views of one zoom form a grid, so that all their pooling along the height is
one matrix R and all along the width one matrix S: with their cells in one array Y, arranged as the places are, the
model of a grid of views is ``Y = R H S'``. For several grids k of precision w_k and a prior map H0 of precision L, the
map that explains all of them best minimises

    sum_k w_k |U_k (Y_k - R_k H S_k') V_k|^2 + L |H - H0|^2

with diagonal weights U, V of cells. Its normal equations have as matrix a sum of Kronecker products and L, so that a
step of an iterative solver is two small products for each grid: nothing depends on the picture, nothing needs to be
kept, and the number of steps follows from the eigenvalues along single axes. This is multi-frame super-resolution
(Tikhonov-regularised least squares) of features in place of pixels.

Convention: that of :mod:`featsharp.ops.resize`. The map is read bilinearly between the centres of its cells; beyond the
picture it goes on as its mirror image.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from featsharp.device import without_autocast
from featsharp.ops.resize import size_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float64]

TOLERANCE = 1e-2  # of the solution, as a part of its distance from the prior


class Span(NamedTuple):
    """Part of an axis of the picture that a view shows, 0 and 1 at the edges of the picture; it may look beyond."""

    start: float
    stop: float


class ViewGrid(NamedTuple):
    """Features of the views of one zoom, at all pairs of places along height and width.

    Attributes:
        cells: [B, C, m * h, n * w]: the cells [h, w] of m x n views, arranged as their places are.
        rows, cols: The m and n places along height and width.
        precision: Inverse variance of a cell.
        edge: Precision of the outermost cells of a view along an axis, relative to the others.
    """

    cells: Tensor
    rows: Sequence[Span]
    cols: Sequence[Span]
    precision: float = 1.0
    edge: float = 1.0


def reconstruct(grids: Sequence[ViewGrid], prior: Tensor, precision: float) -> Tensor:
    """Solve for the map that explains views of it, by Chebyshev's iteration from the prior.

    Channels and items of the batch do not depend on each other; the result is linear in cells and prior, and a map
    that the prior has and all views confirm is returned as it is.

    Args:
        grids: At least one; cells of B x C maps, of any floating-point type.
        prior: [B, C, H, W] H0, float32 or float64.
        precision: L, above 0.

    Returns:
        [B, C, H, W] in the type of ``prior``, as far from the exact solution as ``TOLERANCE`` says.
    """
    size = size_of(prior)
    low, high, terms = precision, precision, []
    for grid in grids:
        total = size_of(grid.cells)
        rows, row_weights = _stack_pooling(grid.rows, total[0], size[0], grid.edge)
        cols, col_weights = _stack_pooling(grid.cols, total[1], size[1], grid.edge)
        to_y, to_x = rows.T * row_weights * grid.precision, cols.T * col_weights
        seen_y, seen_x = to_y @ rows, to_x @ cols
        (least_y, most_y), (least_x, most_x) = _bounds(seen_y), _bounds(seen_x)
        low, high = low + least_y * least_x, high + most_y * most_x
        terms.append([torch.from_numpy(matrix).to(prior) for matrix in (to_y, to_x, seen_y, seen_x)])
    with without_autocast(prior):
        start = _last(prior)
        # All grids at once: for each row of the map those of the grids follow each other.
        all_y, all_x = torch.stack([term[2] for term in terms], 1).flatten(0, 1), torch.cat([t[3] for t in terms], 1)
        residual = -_multiply(all_y, all_x, start)
        for grid, term in zip(grids, terms, strict=True):
            residual = residual + _multiply(term[0], term[1], _last(grid.cells.to(prior)))
        middle, half = (high + low) / 2, max((high - low) / 2, 1e-9 * high)
        step, change, solution = half / middle, residual / middle, start
        for _ in range(_count_steps(low, high)):
            solution = solution + change
            residual = residual.sub(change, alpha=precision) - _multiply(all_y, all_x, change)
            next_step = 1 / (2 * middle / half - step)
            change = torch.add(next_step * step * change, residual, alpha=2 * next_step / half)
            step = next_step
        return (solution + change).unflatten(2, (-1, prior.shape[1])).permute(2, 3, 0, 1).contiguous()


def average(grids: Sequence[ViewGrid], size: tuple[int, int], *, width: float = 1.0, circular: bool = False) -> Tensor:
    """Average the cells of views where they lie: no model of pooling is inverted, so that no detail is recovered.

    Args:
        grids: At least one; together they cover the picture.
        size: (H, W) of the map.
        width: Part of its sides, around its centre, in which a cell counts: 1 repeats it over its area, 0.5 interlaces
            the cells of views that are half a cell apart.
        circular: Whether the picture goes on beyond its edges as itself; else cells do not count there.

    Returns:
        [B, C, H, W], float32 or float64: the means over the area of each cell and over views, by their precision.
    """
    first = grids[0].cells
    like = first.new_empty(0, dtype=torch.promote_types(first.dtype, torch.float32))
    sums = weights = like.new_zeros(())
    with without_autocast(first):
        for grid in grids:
            total = size_of(grid.cells)
            rows = _stack_overlaps(grid.rows, total[0], size[0], grid.edge, width, circular) * grid.precision
            cols = _stack_overlaps(grid.cols, total[1], size[1], grid.edge, width, circular)
            to_y, to_x = (torch.from_numpy(matrix).to(like) for matrix in (rows, cols))
            sums = sums + _multiply(to_y, to_x, _last(grid.cells.to(like)))
            weights = weights + torch.outer(to_y.sum(1), to_x.sum(1))
        return (sums / weights[..., None]).unflatten(2, (-1, first.shape[1])).permute(2, 3, 0, 1).contiguous()


def pooling_matrix(span: Span, cells: int, size: int) -> "FloatArray":
    """Compute the means over the cells of a view of an axis of the map, read linearly between its centres.

    Args:
        span: Part of the axis that the view shows, from -1 to 2.
        cells: Of the view along the axis.
        size: Cells of the map along the axis.

    Returns:
        [cells, size]; rows sum to 1.
    """
    import numpy as np

    edges = np.linspace(span.start, span.stop, cells + 1) * size - 0.5
    distance = np.clip(edges[:, None] - np.arange(-size, 2 * size), -1, 1)
    # Integral, up to each edge, of the hat function around each centre.
    area = np.where(distance < 0, (1 + distance) ** 2 / 2, 1 - (1 - distance) ** 2 / 2)
    weights = np.diff(area, axis=0) / np.diff(edges)[:, None]
    before, inside, behind = np.split(weights, 3, axis=1)
    return inside + before[:, ::-1] + behind[:, ::-1]


def _stack_pooling(spans: Sequence[Span], total: int, size: int, edge: float) -> tuple["FloatArray", "FloatArray"]:
    """Stack the pooling matrices of the places along an axis: [total, size], and the weights of cells [total]."""
    import numpy as np

    cells = total // len(spans)
    return np.concatenate([pooling_matrix(span, cells, size) for span in spans]), _weigh(len(spans), cells, edge)


def _weigh(places: int, cells: int, edge: float) -> "FloatArray":
    """Weigh the cells of the views of an axis: [places * cells]."""
    import numpy as np

    weights = np.ones((places, cells))
    weights[:, [0, -1]] = edge
    return weights.ravel()


def _stack_overlaps(
    spans: Sequence[Span], total: int, size: int, edge: float, width: float, circular: bool
) -> "FloatArray":
    """Compute the part of each cell of the map that each cell of the views covers, weighted: [size, total]."""
    import numpy as np

    cells = total // len(spans)
    overlaps = np.zeros((size, total))
    for number, (start, stop) in enumerate(spans):
        side = (stop - start) * size / cells
        first = start * size + side * (np.arange(cells) + (1 - width) / 2)
        for turn in (-size, 0, size) if circular else (0,):
            begin = np.maximum(np.arange(size)[:, None], first + turn)
            end = np.minimum(np.arange(size)[:, None] + 1, first + turn + width * side)
            overlaps[:, number * cells : (number + 1) * cells] += np.maximum(end - begin, 0)
    return overlaps * _weigh(len(spans), cells, edge)


def _bounds(matrix: "FloatArray") -> tuple[float, float]:
    """Least and largest eigenvalue of a symmetric matrix without negative ones."""
    import numpy as np

    values = np.linalg.eigvalsh(matrix)
    return max(0.0, float(values[0])), float(values[-1])


def _count_steps(low: float, high: float) -> int:
    """Count the steps that Chebyshev's iteration needs for eigenvalues in [low, high]."""
    root = max(math.sqrt(high / low), 1 + 1e-9)
    return math.ceil(math.log(2 / TOLERANCE) / math.log((root + 1) / (root - 1)))


def _last(x: Tensor) -> Tensor:
    """Arrange [B, C, H, W] as [H, W, B * C]: the products along both axes are large ones then."""
    return x.permute(2, 3, 0, 1).flatten(2)


def _multiply(along_y: Tensor, along_x: Tensor, x: Tensor) -> Tensor:
    """Multiply [h, w, N] by k matrices along each axis, [k H, h] and [W, k w], and add up: [H, W, N]."""
    return along_x @ (along_y @ x.flatten(1)).reshape(-1, along_x.shape[1], x.shape[2])
