"""Cutting an image into tiles and putting tile features back: exact inverses of each other.

Tiles are row-major within an image: batch order is (image, tile row, tile column).
"""

import torch
from torch import Tensor

from featsharp.errors import InputError
from featsharp.ops.resize import size_of


def split_tiles(x: Tensor, tiles: tuple[int, int]) -> Tensor:
    """Cut [B, C, ty*h, tx*w] into [B*ty*tx, C, h, w]."""
    batch, channels, height, width = x.shape
    rows, cols = tiles
    if height % rows or width % cols:
        raise InputError(f"{height}x{width} cannot be cut into {rows}x{cols} equal tiles; resize it first")
    x = x.reshape(batch, channels, rows, height // rows, cols, width // cols)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch * rows * cols, channels, height // rows, width // cols)


def join_tiles(x: Tensor, tiles: tuple[int, int]) -> Tensor:
    """Put [B*ty*tx, C, h, w] back together as [B, C, ty*h, tx*w]; the inverse of :func:`split_tiles`."""
    rows, cols = tiles
    total, channels, height, width = x.shape
    x = x.reshape(total // (rows * cols), rows, cols, channels, height, width)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, rows * height, cols * width)


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """Compute the first cells of the fewest windows that cover ``length`` cells and overlap by at least ``overlap``."""
    if not 0 <= overlap < window:
        raise InputError(
            f"the overlap of tiles must be from 0 to {window - 1} cells, less than the {window} that a tile has here; "
            f"got {overlap}"
        )
    if length <= window:
        return [0]
    count = -(-(length - overlap) // (window - overlap))
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def blend_windows(windows: Tensor, starts: tuple[list[int], list[int]], size: tuple[int, int]) -> Tensor:
    """Average overlapping windows into one map, each fading out linearly towards its edges.

    Args:
        windows: [B*ny*nx, C, h, w], ordered (image, row, column).
        starts: First row of each of the ny windows and first column of each of the nx.
        size: (H, W) of the map.

    Returns:
        [B, C, H, W]. A map that all windows agree on is returned unchanged (the weights sum to one).
    """
    windows = windows.unflatten(0, (-1, len(starts[0]) * len(starts[1])))
    out = windows.new_zeros(windows.shape[0], windows.shape[2], *size)
    add_windows(out, windows, starts)
    return out


def add_windows(out: Tensor, windows: Tensor, starts: tuple[list[int], list[int]], first: int = 0) -> None:
    """Add some of the windows of :func:`blend_windows`, weighted as there, to a map.

    Args:
        out: [B, C, H, W], changed in place.
        windows: [B, n, C, h, w], consecutive in row-major order.
        starts: Of all windows, see :func:`blend_windows`.
        first: Number of the first of ``windows``.
    """
    height, width = size_of(windows)
    weights_y = _blend_weights(starts[0], height, out.shape[2], windows)
    weights_x = _blend_weights(starts[1], width, out.shape[3], windows)
    for number, window in enumerate(windows.unbind(1), first):
        i, j = divmod(number, len(starts[1]))
        y, x = starts[0][i], starts[1][j]
        weighted = window * weights_y[i][:, None] * weights_x[j]
        out[..., y : y + height, x : x + width] += weighted.to(out.device)


def _blend_weights(starts: list[int], window: int, length: int, like: Tensor) -> Tensor:
    """Weights along one axis of each window's cells, [windows, window]; those on one cell of the map sum to one."""
    rising = torch.arange(1, window + 1, device=like.device)
    ramp = torch.minimum(rising, rising.flip(0)).to(torch.promote_types(like.dtype, torch.float32))
    total = ramp.new_zeros(length)
    for start in starts:
        total[start : start + window] += ramp
    return torch.stack([ramp / total[start : start + window] for start in starts]).to(like.dtype)
