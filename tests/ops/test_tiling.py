"""Tiles: cutting and joining are inverse, windows cover the map, blending keeps what all windows agree on."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featsharp.errors import InputError
from featsharp.ops.tiling import blend_windows, join_tiles, split_tiles, window_starts


@pytest.mark.parametrize("tiles", [(1, 1), (2, 3), (3, 1)])
def test_split_and_join_are_inverse(tiles):
    x = torch.randn(2, 3, 6, 12)
    pieces = split_tiles(x, tiles)
    assert pieces.shape == (2 * tiles[0] * tiles[1], 3, 6 // tiles[0], 12 // tiles[1])
    assert torch.equal(join_tiles(pieces, tiles), x)


def test_tiles_run_row_by_row_within_an_image():
    x = torch.randn(2, 1, 4, 9)
    pieces = split_tiles(x, (2, 3))
    for image in range(2):
        for row in range(2):
            for column in range(3):
                expected = x[image, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
                assert torch.equal(pieces[image * 6 + row * 3 + column], expected)


def test_sides_that_cannot_be_cut():
    with pytest.raises(InputError, match="7x8 cannot be cut into 2x2"):
        split_tiles(torch.zeros(1, 1, 7, 8), (2, 2))


@settings(deadline=None)
@given(st.data())
def test_windows_cover_with_the_least_overlap_and_are_few(data):
    window = data.draw(st.integers(1, 40))
    overlap = data.draw(st.integers(0, window - 1))
    length = data.draw(st.integers(1, 300))
    starts = window_starts(length, window, overlap)
    if length <= window:
        assert starts == [0]
        return
    assert (starts[0], starts[-1]) == (0, length - window)
    steps = [b - a for a, b in pairwise(starts)]
    assert all(0 < step <= window - overlap for step in steps)
    assert max(steps) - min(steps) <= 1
    # One window fewer could not reach: its steps would have to be longer than the overlap allows.
    assert (len(starts) - 2) * (window - overlap) < length - window


@pytest.mark.parametrize("overlap", [-1, 4, 9])
def test_impossible_overlaps(overlap):
    with pytest.raises(InputError, match=f"from 0 to 3 cells, .*got {overlap}"):
        window_starts(8, 4, overlap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_blending_keeps_a_map_that_all_windows_agree_on(dtype):
    x = torch.randn(2, 3, 10, 13, dtype=torch.float64).mul(100).to(dtype)
    starts = window_starts(10, 5, 2), window_starts(13, 6, 3)
    windows = torch.stack([x[..., i : i + 5, j : j + 6] for i in starts[0] for j in starts[1]], 1).flatten(0, 1)
    out = blend_windows(windows, starts, (10, 13))
    assert out.dtype == dtype
    torch.testing.assert_close(out, x, rtol=6 * torch.finfo(dtype).eps, atol=0)


def test_large_half_precision_values_do_not_overflow():
    windows = torch.full((4, 1, 40, 40), 6e4, dtype=torch.float16)
    out = blend_windows(windows, ([0, 20], [0, 20]), (60, 60))
    assert out.isfinite().all()


def test_windows_side_by_side_are_joined():
    windows = torch.randn(2 * 6, 3, 4, 5)
    out = blend_windows(windows, ([0, 4], [0, 5, 10]), (8, 15))
    torch.testing.assert_close(out, join_tiles(windows, (2, 3)))


def test_blending_fades_from_one_window_to_the_next():
    windows = torch.stack([torch.zeros(1, 1, 6), torch.ones(1, 1, 6)])
    out = blend_windows(windows, ([0], [0, 3]), (1, 9))
    # Cells 3, 4, 5 are shared; the ramps there are 3, 2, 1 against 1, 2, 3.
    expected = torch.tensor([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1])
    torch.testing.assert_close(out[0, 0, 0], expected)


def test_gradient_passes_through_blending():
    windows = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: blend_windows(w, ([0], [0, 2]), (3, 6)), windows)
