"""Pairs of images with the keypoints that both show.

Convention:
    Points are (x, y) in pixels of the image file with the centre of its first pixel at (0.5, 0.5), so that an image of
    (h, w) covers [0, w] x [0, h].
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featsharp.errors import DataError

# Distance in pixels that a keypoint may lie outside of its image: annotators click on borders, and count from 0 or 1.
TOLERANCE = 1.0

# Of the data sets.
SPLITS = ("trn", "val", "test")


@dataclass(frozen=True)
class Pair:
    """Two images and the keypoints that both show.

    Attributes:
        source, target: The image files.
        source_points, target_points: [K, 2] float64, K at least 1; rows correspond.
        target_box: Larger side of the object's box in the target, in pixels; None where the data set has no boxes.
        category: Of the object.
    """

    source: Path
    target: Path
    source_points: np.ndarray
    target_points: np.ndarray
    target_box: float | None
    category: str


class Entry(NamedTuple):
    """A pair that has not been read yet."""

    name: str  # unique within the data set
    category: str
    read: Callable[[], Pair]  # raises DataError for a bad pair


class PairOptions(NamedTuple):
    """Choice of pairs of a data set: a split, or a list of the user."""

    split: str = "test"
    pair_list: Path | None = None


def make_pair(
    location: str | Path,
    images: tuple[Path, Path],
    points: tuple[np.ndarray, np.ndarray],
    category: str,
    target_box: float | None = None,
) -> Pair:
    """Make a pair of the keypoints that are visible (finite) in both images.

    Args:
        location: The file or row that the pair was read from, for messages.
        images: Source and target.
        points: [K, 2] each.
        category: As in :class:`Pair`.
        target_box: As in :class:`Pair`.

    Raises:
        DataError: When the keypoints do not correspond, or none is visible in both.
    """
    source, target = (np.asarray(given, dtype=np.float64) for given in points)
    if source.size == target.size == 0:
        raise DataError(f"{location}: no keypoint is annotated")
    for given in (source, target):
        if given.ndim != 2 or given.shape[1] != 2:
            raise DataError(f"{location}: keypoints are lists of (x, y); got numbers of shape {given.shape}")
    if len(source) != len(target):
        raise DataError(f"{location}: {len(source)} keypoints in the source, {len(target)} in the target")
    common = np.isfinite(source).all(1) & np.isfinite(target).all(1)
    if not common.any():
        raise DataError(f"{location}: no keypoint is visible in both images")
    if target_box is not None and not 0 < target_box < np.inf:
        raise DataError(f"{location}: the box of the target has a larger side of {target_box} pixels")
    return Pair(*images, source[common], target[common], target_box, category)


def parse_numbers(values: Any, location: str | Path) -> np.ndarray:
    """Convert to float64; raises DataError, with ``location`` in it."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{location}: {str(values)[:60]} are not numbers") from None


def larger_side(box: Any, location: str | Path) -> float:
    """Compute the larger side of a box (left, top, right, bottom); raises DataError, with ``location`` in it."""
    corners = parse_numbers(box, location).ravel()
    if len(corners) != 4:
        raise DataError(f"{location}: a box has four numbers; got {len(corners)}")
    return float((corners[2:] - corners[:2]).max())


def check_points(points: np.ndarray, size: tuple[int, int], path: Path) -> None:
    """Raise DataError for points [K, 2] outside of an image of ``size`` (h, w) by more than :data:`TOLERANCE`."""
    outside = (points < -TOLERANCE).any(1) | (points > np.array([size[1], size[0]]) + TOLERANCE).any(1)
    if outside.any():
        x, y = points[outside][0]
        raise DataError(
            f"{path}: keypoint ({x:.1f}, {y:.1f}) lies outside of the image of {size[1]} x {size[0]} pixels"
        )
