"""Windows of local operations: the key cells that a query sees, and the values beyond the edge of the map.

Convention:
    Keys lie on an H x W map, queries on an fH x fW map, f >= 1 whole. Query (y, x) sees the K x K cells around cell
    (y // f, x // f); window entry (i, j) is the cell at offset (i - K // 2, j - K // 2).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from featsharp.errors import ConfigError

# Values beyond the edge of the map: "clip" none, the window becomes smaller; "reflect" the map mirrored, its edge not
# repeated; "replicate" the nearest cell; "zeros" cells of zeros, which count like any other; "shift" moves the window
# back onto the map, so that it always has K x K cells (all cells of an axis with fewer), as in neighbourhood attention
# (arXiv 2204.07143).
Border = Literal["clip", "reflect", "replicate", "zeros", "shift"]
BORDERS = get_args(Border)  # once: torch 2.4 cannot compile the call


def check_window(window: int, border: str = "clip") -> None:
    """Raise ConfigError for a window that has no centre, or an unknown border."""
    if not isinstance(window, int) or window < 1:
        raise ConfigError(f"the window of local operations must be odd and at least 1; got {window!r}, use 3 or 7")
    if window % 2 == 0:
        raise ConfigError(f"the window of local operations must be odd; got {window}, use {window - 1} or {window + 1}")
    if border not in BORDERS:
        raise ConfigError(f"unknown border {border!r}; use {' or '.join(map(repr, BORDERS))}")


def border_cells(position: Tensor, length: int, border: str, window: int = 1) -> tuple[Tensor, Tensor]:
    """Map positions inside or outside of an axis of ``length`` cells to the cell to read, and whether it counts.

    Under "reflect" and "replicate" all positions count, under "clip" and "zeros" those inside. Under "shift" a position
    outside stands for the cell a ``window`` further in, by which the window that is moved back goes beyond the one
    around the query; in a map with fewer cells than that it does not count.
    """
    if border == "shift":
        moved = torch.where(position < 0, position + window, position - window)
        position = torch.where((position >= 0) & (position < length), position, moved)
    inside = (position >= 0) & (position < length)
    if border == "reflect" and length > 1:
        period = 2 * (length - 1)
        position = position.remainder(torch.full_like(position, period))  # ONNX has none by an open length
        position = torch.minimum(position, period - position)
    if border in ("reflect", "replicate"):
        inside = torch.ones_like(inside)
    return position.clamp(0, length - 1), inside
