"""Reconstruction from views against a dense solve, plain numerical integration, and its own promises."""

import numpy as np
import pytest
import torch

from featsharp.ops.reconstruct import TOLERANCE, Span, ViewGrid, pooling_matrix, reconstruct

SHIFTED = [Span(0, 1), Span(0.1, 1.1)]
ZOOMED = [Span(0, 0.75), Span(0.25, 1)]


def solve_densely(grids, prior, precision):
    """Build the normal equations of all cells view by view, and solve them in float64."""
    height, width = prior.shape[2:]
    matrix = precision * torch.eye(height * width, dtype=torch.float64)
    right = precision * prior.double().flatten(2)
    for grid in grids:
        h, w = grid.cells.shape[2] // len(grid.rows), grid.cells.shape[3] // len(grid.cols)
        weights = torch.ones(h, w, dtype=torch.float64)
        weights[[0, -1]] *= grid.edge
        weights[:, [0, -1]] *= grid.edge
        weights = grid.precision * weights.flatten()
        for i, row in enumerate(grid.rows):
            for j, col in enumerate(grid.cols):
                pool = np.kron(pooling_matrix(row, h, height), pooling_matrix(col, w, width))
                weighted = torch.from_numpy(pool) * weights[:, None]
                seen = grid.cells[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w].double().flatten(2)
                matrix += weighted.T @ torch.from_numpy(pool)
                right = right + seen @ weighted
    return torch.linalg.solve(matrix, right.mT).mT.reshape(prior.shape)


@pytest.mark.parametrize("size", [(10, 14), (7, 11), (5, 7), (9, 16)])
def test_a_dense_solve(size):
    h, w = 5, 7
    prior = torch.randn(2, 3, *size)
    grids = [
        ViewGrid(torch.randn(2, 3, 2 * h, 2 * w), SHIFTED, SHIFTED),
        ViewGrid(torch.randn(2, 3, 2 * h, w), ZOOMED, ZOOMED[1:], 0.7, 0.3),
        ViewGrid(torch.randn(2, 3, 9, 13), [Span(0, 1)], [Span(0, 1)], 1.5, 0.0),
    ]
    for some in (grids, grids[:1], grids[1:2]):
        exact = solve_densely(some, prior, 0.4)
        error = (reconstruct(some, prior, 0.4) - exact).norm() / (exact - prior).norm()
        assert error < TOLERANCE


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0.25, 0.9), (-0.2, 0.6), (0.5, 1.4)])
def test_pooling_against_fine_sampling(start, stop):
    size, cells, samples = 7, 4, 5000
    values = np.random.default_rng(0).normal(size=size)
    mirrored = np.concatenate([values[::-1], values, values[::-1]])
    positions = (start + (stop - start) * (np.arange(cells * samples) + 0.5) / (cells * samples)) * size - 0.5
    expected = np.interp(positions + size, np.arange(3 * size), mirrored).reshape(cells, samples).mean(1)
    matrix = pooling_matrix(Span(start, stop), cells, size)
    np.testing.assert_allclose(matrix @ values, expected, atol=1e-6)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)


def test_gradients():
    prior = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    cells = torch.randn(1, 2, 6, 8, dtype=torch.float64, requires_grad=True)

    def solve(cells, prior):
        return reconstruct([ViewGrid(cells, ZOOMED, SHIFTED, 1.0, 0.5)], prior, 0.3)

    assert torch.autograd.gradcheck(solve, (cells, prior))


def test_what_all_views_confirm_stays():
    level = torch.linspace(-3, 5, 6).reshape(2, 3, 1, 1)
    grids = [ViewGrid(level.expand(2, 3, 8, 10), spans, spans, 2.0, 0.3) for spans in (SHIFTED, ZOOMED)]
    prior = level.expand(2, 3, 9, 11)
    torch.testing.assert_close(reconstruct(grids, prior, 0.1), prior, atol=1e-5, rtol=1e-5)


def test_channels_and_pictures_do_not_meet():
    cells, prior = torch.randn(3, 4, 8, 10), torch.randn(3, 4, 8, 10)
    together = reconstruct([ViewGrid(cells, ZOOMED, ZOOMED)], prior, 0.2)
    alone = reconstruct([ViewGrid(cells[1:2, 2:], ZOOMED, ZOOMED)], prior[1:2, 2:], 0.2)
    torch.testing.assert_close(together[1:2, 2:], alone, atol=1e-5, rtol=1e-5)
