"""Projective warps of images and feature maps.

Convention:
    A homography is a 3x3 matrix that maps points (x, y, 1) of the *view* to the *base* image. Coordinates are
    normalised: -1 and 1 are the outer edges of the first and last pixel (``align_corners=False``), so the centre of
    pixel j of n is at ``(2 j + 1) / n - 1`` and a homography means the same at every resolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def homography_grid(homography: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the positions of the pixel centres of a view in the base image.

    Args:
        homography: [B, 3, 3], view to base.
        size: (h, w) of the view.

    Returns:
        [B, h, w, 2], (x, y) in normalised base coordinates, float32 or float64 as ``homography``.
    """
    height, width = size
    y = (2 * torch.arange(height, device=homography.device, dtype=homography.dtype) + 1) / height - 1
    x = (2 * torch.arange(width, device=homography.device, dtype=homography.dtype) + 1) / width - 1
    points = torch.stack(
        [x.expand(height, width), y[:, None].expand(height, width), torch.ones_like(x).expand(height, width)], -1
    )
    mapped = points.reshape(1, -1, 3) @ homography.transpose(1, 2)
    return (mapped[..., :2] / mapped[..., 2:]).reshape(-1, height, width, 2)


def warp(
    base: Tensor, homography: Tensor, size: tuple[int, int], *, mode: str = "bilinear", padding_mode: str = "reflection"
) -> Tensor:
    """Resample ``base`` to the view that a homography describes.

    Args:
        base: [B, C, H, W].
        homography: [B, 3, 3], view to base.
        size: (h, w) of the view.
        mode: "bilinear", "bicubic" or "nearest".
        padding_mode: Values outside of the base image: "reflection", "zeros" or "border".

    Returns:
        [B, C, h, w] in the dtype of ``base``.
    """
    return sample(base, homography_grid(homography, size), mode=mode, padding_mode=padding_mode)


def sample(base: Tensor, grid: Tensor, *, mode: str = "bilinear", padding_mode: str = "reflection") -> Tensor:
    """Sample ``base`` [B, C, H, W] at the positions of :func:`homography_grid`; see :func:`warp`."""
    full = base.to(torch.promote_types(base.dtype, torch.float32))
    return F.grid_sample(full, grid.to(full), mode=mode, padding_mode=padding_mode, align_corners=False).to(base.dtype)


def inside(homography: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask of the pixel centres of a view inside the base image: [B, 1, h, w], 1 or 0, dtype of ``homography``."""
    return grid_inside(homography_grid(homography, size))


def grid_inside(grid: Tensor) -> Tensor:
    """:func:`inside` for the positions of :func:`homography_grid`, in their dtype."""
    return (grid.abs() <= 1).all(-1)[:, None].to(grid)
