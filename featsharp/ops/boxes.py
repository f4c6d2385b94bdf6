"""Rectangles of cells of a map, for work that is done chunk by chunk."""

from typing import NamedTuple

from torch import Tensor


class Box(NamedTuple):
    """Cells [top, bottom) x [left, right) of a map."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.bottom - self.top, self.right - self.left

    def grow(self, cells: int, size: tuple[int, int]) -> "Box":
        """Add ``cells`` on every side, as far as a map of ``size`` (h, w) has them."""
        return Box(
            max(0, self.top - cells),
            min(size[0], self.bottom + cells),
            max(0, self.left - cells),
            min(size[1], self.right + cells),
        )

    def relative_to(self, outer: "Box") -> "Box":
        """The same cells, counted from the corner of ``outer``."""
        return Box(self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left)

    def cut(self, x: Tensor) -> Tensor:
        """A view of these cells of ``x`` [..., H, W]."""
        return x[..., self.top : self.bottom, self.left : self.right]

    def cut_channels_last(self, x: Tensor) -> Tensor:
        """A view of these cells of ``x`` [B, H, W, C]."""
        return x[:, self.top : self.bottom, self.left : self.right]

    def covers(self, size: tuple[int, int]) -> bool:
        """Return whether these are all cells of a map of ``size`` (h, w)."""
        return self.top == 0 and self.left == 0 and self.bottom == size[0] and self.right == size[1]


def whole(size: tuple[int, int]) -> Box:
    """All of a map of ``size`` (h, w)."""
    return Box(0, size[0], 0, size[1])
