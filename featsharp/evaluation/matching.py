"""Matching of points by features: the encoding of pictures that occur in many pairs, and nearest cells of a grid.

The grid is one of 64 x 64 cells over the whole picture, whatever its shape. A feature is compared by cosine with those
of all cells, and the centre of the most similar one is the match: coarser than matching pixels, and much faster.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from featsharp.evaluation.features import sharp_features, shown_size, stretched_picture
from featsharp.evaluation.layouts.frames import Frame, decode_labelled
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of

# Bytes of features that are cached for other pairs with the same picture.
CACHE_BYTES = 1 << 30
# Cells of the grid along each axis.
GRID = 64
_KEYPOINTS = Frame("its keypoints")


class EncodedPicture(Protocol):
    """Features of a picture, ready for matching."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) in pixels of the picture's file."""

    @property
    def bytes(self) -> int:
        """Size in memory."""


E = TypeVar("E", bound=EncodedPicture)


class PointMatcher(ABC, Generic[E]):
    """Matching of the points of one picture to another, with a cache of encoded pictures.

    The cache holds those used last. Points are (x, y) in pixels of the picture's file, the centre of the first pixel at
    (0.5, 0.5).

    Args:
        encoder: In eval mode.
        low_res_size: (h, w) in pixels of its low-resolution pass.
        cache_bytes: Most bytes of features in the cache.
    """

    def __init__(self, encoder: SharpEncoder, low_res_size: tuple[int, int], cache_bytes: int = CACHE_BYTES) -> None:
        self.encoder, self.low_res_size, self.cache_bytes = encoder, low_res_size, cache_bytes
        self.canvas_size = shown_size(encoder, low_res_size)  # (h, w) in pixels of the encoder's input
        self._cache: OrderedDict[Path, E] = OrderedDict()
        self._bytes = 0

    @abstractmethod
    def encode_image(self, image: Image) -> E:
        """Encode an RGB picture; raises InputError for NaN."""

    @abstractmethod
    def match(self, source: E, target: E, points: np.ndarray) -> np.ndarray:
        """Match points [K, 2] of the source with points [K, 2] of the target."""

    def encode(self, path: Path, frame: Frame = _KEYPOINTS) -> E:
        """Encode the picture of a file, with the pixels ``frame``; raises DataError when it cannot be decoded."""
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        encoded = self._cache[path] = self.encode_image(decode_labelled(path, str(path), frame))
        self._bytes += encoded.bytes
        while self._bytes > self.cache_bytes and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1].bytes
        return encoded


class Cells(NamedTuple):
    """Features of a picture of which the grid's cells are matched."""

    image_size: tuple[int, int]  # (h, w) of the file
    source: Tensor  # [1, C, h, w] float32, read at points
    grid: Tensor  # [1, C, GRID, GRID] float32, every cell of length 1

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(x.numel() * x.itemsize for x in {id(x): x for x in (self.source, self.grid)}.values())


class NearestCell(PointMatcher[Cells]):
    """Matching of points to the centres of the most similar cells of a 64 x 64 grid.

    The map of a source, with cells of length 1, is read bilinearly at the points; that of a target is interpolated to
    the grid and scaled to length 1 again.

    Args:
        encoder: As in :class:`PointMatcher`.
        low_res_size: As in :class:`PointMatcher`.
        from_grid: Whether features of sources are read from the grid, too, which is then made of features of any
            length.
    """

    def __init__(self, encoder: SharpEncoder, low_res_size: tuple[int, int], *, from_grid: bool = False) -> None:
        super().__init__(encoder, low_res_size)
        self.from_grid = from_grid

    def encode_image(self, image: Image) -> Cells:
        """Encode an RGB picture, which Pillow's bicubic filter stretches to the size of the encoder's input."""
        features = sharp_features(self.encoder, image, self.low_res_size, stretched_picture)
        features = features if self.from_grid else F.normalize(features, dim=1)
        grid = F.normalize(resize(features, (GRID, GRID)), dim=1)
        return Cells((image.height, image.width), grid if self.from_grid else features, grid)

    def match(self, source: Cells, target: Cells, points: np.ndarray) -> np.ndarray:
        """Match points [K, 2] of the source's file with centres of cells [K, 2] in pixels of the target's."""
        queries = sample_points(source.source, points / source.image_size[::-1])
        return nearest_cells(queries, target.grid) * target.image_size[::-1]


def sample_points(features: Tensor, positions: np.ndarray) -> Tensor:
    """Interpolate a map [1, C, h, w] at positions [K, 2], (x, y) from 0 to 1 over the map: [K, C]."""
    at = torch.as_tensor(2 * positions - 1, dtype=torch.float32, device=features.device)[None, None]
    return F.grid_sample(features, at, padding_mode="border", align_corners=False)[0, :, 0].T


def nearest_cells(queries: Tensor, cells: Tensor) -> np.ndarray:
    """Find the cells of a map [1, C, h, w] of unit vectors most similar to queries [K, C].

    Returns:
        Their centres [K, 2] float64, (x, y) from 0 to 1 over the map.
    """
    rows, columns = size_of(cells)
    best = (queries @ cells[0].flatten(1)).argmax(1).cpu().numpy()
    return np.stack([(best % columns + 0.5) / columns, (best // columns + 0.5) / rows], axis=1)
