"""Views of base images: one homography each, which warps maps of the base to them and back.

The jitters of training, the crops of the implicit fit and all that compares a map with views of its image use these.
Convention: that of :mod:`featsharp.ops.warp`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from featsharp.errors import InputError
from featsharp.ops.warp import homography_grid, inside, warp


@dataclass(frozen=True)
class View:
    """N views of B base images, ordered (image, view) where there are several of each.

    Attributes:
        to_base: [N, 3, 3] homographies, view to base.
    """

    to_base: Tensor

    @classmethod
    def crop(cls, zoom: float, shift: tuple[float, float], *, flip: bool = False) -> "View":
        """Make one view without rotation, float32.

        Args:
            zoom: 2 shows half of each side of the base.
            shift: (x, y) of its centre in the base, -1 and 1 at the edges.
            flip: Mirror it left to right.
        """
        x, y = shift
        rows = [[(-1 if flip else 1) / zoom, 0, x], [0, 1 / zoom, y], [0, 0, 1]]
        return cls(torch.tensor(rows, dtype=torch.float64).float()[None])

    def __len__(self) -> int:
        return len(self.to_base)

    def __getitem__(self, chosen: slice | Tensor) -> "View":
        return View(self.to_base[chosen])

    def split(self, count: int) -> Iterator["View"]:
        """Groups of at most ``count`` views."""
        return map(View, self.to_base.split(count))

    def to(self, device: torch.device) -> "View":
        """The same views on another device."""
        return View(self.to_base.to(device))

    def inverse(self) -> "View":
        """Views in the other direction: :meth:`warp` then brings maps of views back to their base."""
        return View(torch.linalg.inv(self.to_base))

    def grid(self, size: tuple[int, int]) -> Tensor:
        """Positions in the base of the pixel centres of views of size (h, w): [N, h, w, 2], (x, y)."""
        return homography_grid(self.to_base, size)

    def inside(self, size: tuple[int, int]) -> Tensor:
        """[N, 1, h, w], 1 where the pixel centre of a view lies inside its base, else 0."""
        return inside(self.to_base, size)

    def warp(self, base: Tensor, size: tuple[int, int], *, padding_mode: str = "reflection") -> Tensor:
        """Resample maps of the base images to the views.

        Args:
            base: [B, C, H, W]; B divides the number of views.
            size: (h, w) of the result.
            padding_mode: Values outside of the base: "reflection", "zeros" or "border".

        Returns:
            [N, C, h, w] in the dtype of ``base``.

        Raises:
            InputError: When not every base image has the same number of views.
        """
        if len(self) % len(base):
            raise InputError(f"{len(self)} views cannot be of {len(base)} base images, the same number of each")
        if len(base) == 1:
            base = base.expand(len(self), -1, -1, -1)
        elif len(base) < len(self):
            base = base.repeat_interleave(len(self) // len(base), 0)
        return warp(base, self.to_base, size, padding_mode=padding_mode)
