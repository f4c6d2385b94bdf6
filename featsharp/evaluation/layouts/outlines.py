"""Objects of pictures by their outlines, and the masks of these.

Points are in pixels of the picture, (x, y) from its upper left corner; pixel (i, j) covers j to j + 1 and i to i + 1.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from featsharp.evaluation.layouts.frames import Frame


class ObjectMask(NamedTuple):
    """One object."""

    category: int
    mask: np.ndarray  # [H, W] bool, pixels whose centre is inside
    area: float  # pixels: as annotated, else of the mask


class ObjectBox(NamedTuple):
    """One object, with its box."""

    category: int
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels, within the picture
    area: float  # pixels: as annotated, else of the mask
    crowd: bool  # a box around many objects, which is neither to be found nor wrong
    mask: Callable[[], np.ndarray]  # draws [H, W] bool, pixels whose centre is inside


class Labels(Protocol):
    """The objects of a data set, by image name."""

    def knows(self, name: str) -> bool:
        """Return whether there is an entry for an image."""

    def frame(self, name: str) -> Frame:
        """Return the pixels of an image that its objects lie on."""

    def read(self, name: str, size: tuple[int, int]) -> list[ObjectMask]:
        """Read the objects of an image of ``size`` (H, W) that cover a pixel; DataError where that fails."""

    def boxes(self, name: str, size: tuple[int, int]) -> list[ObjectBox]:
        """Read the objects of an image of ``size`` (H, W), crowds too; DataError where that fails."""

    def key(self, name: str) -> object:
        """Return JSON values that change with the file of an image's objects."""


# skimage.draw.polygon2mask takes 8 times as long (10.3 s instead of 1.3 for 636 objects of COCO), and differs where a
# border runs through the centres of pixels (26 of these objects).
def draw(outlines: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Draw polygons, each [n, 2] (x, y) in pixels: [H, W] bool, pixels whose centre is inside any, even-odd rule."""
    mask = np.zeros(size, dtype=bool)
    x, y = np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5
    for outline in outlines:
        inside = np.zeros(size, dtype=bool)
        for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
            rows = (y0 <= y) != (y1 <= y)
            if rows.any():
                crossings = x0 + (y[rows] - y0) * ((x1 - x0) / (y1 - y0))
                inside[rows] ^= x >= crossings[:, None]
        mask |= inside
    return mask
