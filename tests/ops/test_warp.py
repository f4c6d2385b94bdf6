"""Warps: the pixel-centre convention by hand, whole-pixel shifts exactly, and a loop over a true perspective."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.ops.warp import homography_grid, inside, warp

IDENTITY = torch.eye(3, dtype=torch.float64)[None]


def shift(dy: int, dx: int, size: tuple[int, int]) -> torch.Tensor:
    """The view that shows base pixel (y + dy, x + dx) at (y, x)."""
    matrix = IDENTITY.clone()
    matrix[0, 0, 2], matrix[0, 1, 2] = 2 * dx / size[1], 2 * dy / size[0]
    return matrix


@pytest.mark.parametrize("size", [(5, 8), (1, 1), (7, 3)])
def test_identity(size):
    base = torch.randn(2, 3, *size, dtype=torch.float64)
    both = IDENTITY.expand(2, 3, 3)
    torch.testing.assert_close(warp(base, both, size), base, atol=1e-13, rtol=0)
    torch.testing.assert_close(warp(base, both, size, mode="bicubic"), base, atol=1e-13, rtol=0)
    assert torch.equal(warp(base, both, size, mode="nearest"), base)
    assert torch.equal(inside(both, size), torch.ones(2, 1, *size, dtype=torch.float64))


@pytest.mark.parametrize(("dy", "dx"), [(0, 3), (2, -1), (-4, 0)])
def test_translation_by_whole_pixels_is_a_shifted_map(dy, dx):
    size = (6, 9)
    base = torch.randn(1, 2, *size, dtype=torch.float64)
    out = warp(base, shift(dy, dx, size), size, padding_mode="zeros")
    expected = torch.zeros_like(base)
    for y in range(6):
        for x in range(9):
            if 0 <= y + dy < 6 and 0 <= x + dx < 9:
                expected[..., y, x] = base[..., y + dy, x + dx]
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    seen = inside(shift(dy, dx, size), size)[0, 0]
    assert seen.sum() == (6 - abs(dy)) * (9 - abs(dx))
    assert torch.equal(seen.bool(), expected[0, 0] != 0)


def test_pixel_centres_by_hand():
    grid = homography_grid(IDENTITY, (2, 4))
    torch.testing.assert_close(grid[0, 0, :, 0], torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64))
    torch.testing.assert_close(grid[0, :, 0, 1], torch.tensor([-0.5, 0.5], dtype=torch.float64))


def test_a_homography_means_the_same_at_every_resolution():
    """The centre of a coarse view pixel lands in the middle of where its four fine pixels land."""
    matrix = torch.tensor([[[0.7, 0.2, 0.1], [-0.1, 0.6, -0.2], [0, 0, 1]]], dtype=torch.float64)
    coarse, fine = homography_grid(matrix, (3, 5)), homography_grid(matrix, (6, 10))
    torch.testing.assert_close(F.avg_pool2d(fine.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1), coarse)


def test_zooming_into_the_middle_equals_growing_and_cropping():
    base = torch.randn(1, 1, 8, 12, dtype=torch.float64)
    matrix = torch.diag(torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64))[None]
    out = warp(base, matrix, (8, 12))
    expected = F.interpolate(base, scale_factor=2, mode="bilinear", align_corners=False)[..., 4:12, 6:18]
    torch.testing.assert_close(out, expected)


def test_perspective_point_by_point():
    matrix = torch.tensor([[0.9, 0.1, 0.05], [-0.05, 0.8, 0.1], [0.2, -0.1, 1.1]], dtype=torch.float64)
    grid = homography_grid(matrix[None], (3, 4))
    for i in range(3):
        for j in range(4):
            x, y, w = (matrix @ torch.tensor([(2 * j + 1) / 4 - 1, (2 * i + 1) / 3 - 1, 1]).double()).tolist()
            torch.testing.assert_close(grid[0, i, j], torch.tensor([x / w, y / w]).double(), atol=1e-6, rtol=1e-6)


def test_views_of_another_size_and_a_homography_each():
    base = torch.randn(2, 3, 10, 14)
    matrices = torch.cat([IDENTITY, shift(2, 4, (10, 14))]).float()
    out = warp(base, matrices, (5, 7))
    assert out.shape == (2, 3, 5, 7)
    torch.testing.assert_close(out[:1], warp(base[:1], matrices[:1], (5, 7)))
    torch.testing.assert_close(out[1:], warp(base[1:], matrices[1:], (5, 7)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    base = torch.randn(1, 2, 6, 9).to(dtype)
    matrix = shift(1, 2, (6, 9)).float()
    out = warp(base, matrix, (6, 9))
    assert out.dtype == dtype
    torch.testing.assert_close(out[..., :5, :7].float(), base[..., 1:, 2:].float(), atol=1e-2, rtol=1e-2)


def test_gradient_passes():
    base = torch.randn(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    matrix = torch.tensor([[[0.7, 0.2, 0.1], [-0.1, 0.6, -0.2], [0.1, 0, 1]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda b: warp(b, matrix, (3, 4)), base)


def test_what_lies_outside():
    base = torch.arange(1.0, 5).expand(1, 1, 1, 4)
    matrix = shift(0, 2, (1, 4)).float()
    rows = {mode: warp(base, matrix, (1, 4), padding_mode=mode)[0, 0, 0].tolist() for mode in ("zeros", "border")}
    assert rows["zeros"] == pytest.approx([3, 4, 0, 0], abs=1e-6)
    assert rows["border"] == pytest.approx([3, 4, 4, 4])
    assert warp(base, matrix, (1, 4))[0, 0, 0].tolist() == pytest.approx([3, 4, 4, 3], abs=1e-5)
