"""Boundaries: do the features change where annotators draw boundaries of objects?

Edges. The distance between neighbouring cells at every pixel, thinned to lines. Distances are between features of unit
length, so they have the same scale for every backbone and one token of large norm is no edge. The distance between two
neighbours is located on the border between them: differences around the centre of a cell would count a sharp step twice
and blur it. Changes along each axis are thinned along that axis, independently, as corners and junctions have no single
direction. Therefore slanted edges are up to two pixels thick.

Scores. Edges are matched with human boundaries as in BSDS500 (Martin, Fowlkes and Malik 2004; Arbelaez et al. 2011):
precision is pooled over pictures (a pixel is right when it matches any annotator), recall summed over annotators; ODS
is the best F at one threshold for all pictures, OIS that with the best threshold of each picture. Pixels are matched
one to one, which unlike a test of the distance alone does not reward thick or doubled edges, but greedily, the nearest
first, where BSDS500 solves an assignment problem. Nor are edges thinned beyond non-maximum suppression: do not compare
these numbers with published ones.

The protocol "quick" is that of :mod:`featsharp.evaluation.ridges`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from featsharp.errors import InputError
from featsharp.evaluation import ridges
from featsharp.evaluation.estimates import bootstrap
from featsharp.evaluation.features import sharp_features, stretched_picture
from featsharp.evaluation.keys import file_key
from featsharp.evaluation.layouts.boundaries import Picture, find_pictures, read_boundaries
from featsharp.evaluation.layouts.frames import decode_labelled
from featsharp.evaluation.layouts.layout import spread
from featsharp.evaluation.protocol import QUICK, check_protocol, protocol_setting
from featsharp.evaluation.runner import Item, Row, Summary, Task
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.settings import setting

# Strengths between unit-length neighbours, from hardly any change to opposite features.
WEAKEST, STRONGEST = 0.005, 2.0


@dataclass
class BoundaryTask(Task):
    """F-measure of feature edges against human boundaries: BSDS500, or pictures with masks of lines."""

    name: ClassVar[str] = "boundaries"

    data: Path = setting(Path("."), "BSDS500 or its like", type=Path, metavar="DIR", required=True)
    split: str | None = setting(None, "train, val or test, where the data set has several", metavar="NAME")
    limit: int | None = setting(None, "only N pictures, spread evenly over their list", type="count", metavar="N")
    low_res_size: tuple[int, int] | None = setting(
        None, "size of the low-resolution pass; default: the backbone's native one", type="size", metavar="HxW"
    )
    protocol: str = protocol_setting("ridges by rank, which count as right where a boundary is near")
    tolerance: float = setting(
        0.0075, "largest distance between matched pixels, as a share of the picture's diagonal", type=float, metavar="X"
    )
    thresholds: int = setting(60, "thresholds on the strength of edges", type="count", metavar="N")

    def __post_init__(self) -> None:
        check_protocol(self, "tolerance", "thresholds")

    def items(self) -> Iterator[Item]:
        for picture in spread(self.find_pictures(), self.limit):
            yield Item(picture.image.name, picture)

    def find_pictures(self) -> list[Picture]:
        """List the pictures of the split."""
        return find_pictures(self.data, self.split)

    def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
        picture: Picture = item.data
        humans, frame = read_boundaries(picture)
        image = decode_labelled(picture.image, picture.image.name, frame)
        size = (image.height, image.width)
        count = self._count_quick if self.protocol == QUICK else self._count_full
        counts = count(encoder, image, size, humans)
        return {"f": float(f_measure(best_row(counts))), "annotators": len(humans), "_counts": counts.tolist()}

    def _count_full(
        self, encoder: SharpEncoder, image: Image, size: tuple[int, int], humans: Sequence[np.ndarray]
    ) -> np.ndarray:
        edges = thin_edges(sharp_features(encoder, image, self.low_res_size)[0], size)
        matcher = Matcher(size, self.tolerance * math.hypot(*size))
        return matcher.count(edges.cpu().numpy(), self._thresholds(), humans)

    def _count_quick(
        self, encoder: SharpEncoder, image: Image, size: tuple[int, int], humans: Sequence[np.ndarray]
    ) -> np.ndarray:
        found = ridges.find_ridges(sharp_features(encoder, image, self.low_res_size, stretched_picture)[0], size)
        tolerance = ridges.TOLERANCE * math.hypot(*size)
        return ridges.count_near(found, ridges.agreed_boundaries(humans), self._thresholds(), tolerance)

    def item_key(self, item: Item) -> object:
        picture: Picture = item.data
        return [file_key(path.parent, path.name) for path in (picture.image, *picture.truths)]

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        counts = np.array([row["_counts"] for row in rows])  # [pictures, thresholds, 4]
        pooled = counts.sum(0)
        precision, recall = precision_recall(pooled)
        best = int(f_measure(pooled).argmax())
        curve = zip(self._thresholds(), precision.tolist(), recall.tolist(), strict=True)
        return {
            "ods_f": bootstrap(
                counts.reshape(len(counts), -1), lambda r: f_measure(r.reshape(-1, *pooled.shape).sum(0)).max()
            ),
            "ois_f": bootstrap(best_row(counts), lambda r: float(f_measure(r.sum(0)))),
            "ods_precision": float(precision[best]),
            "ods_recall": float(recall[best]),
            "ods_threshold": self._thresholds()[best],
            "curve": [{"threshold": t, "precision": p, "recall": r} for t, p, r in curve],
        }

    def _thresholds(self) -> list[float]:
        """Thresholds for every picture and encoder.

        Of the strength in equal factors, since strengths per cell differ between grids; of the rank in equal steps.
        """
        if self.protocol == QUICK:
            return np.linspace(ridges.LOWEST, ridges.HIGHEST, ridges.THRESHOLDS).tolist()
        return np.geomspace(WEAKEST, STRONGEST, self.thresholds).tolist()


def neighbour_distances(features: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the distances between neighbouring features scaled to unit length: from 0 to 2.

    Of features [C, h, w], at least 2 x 2 cells, returns float32 distances between the cells above and below
    [h - 1, w], and to the left and right [h, w - 1].
    """
    if min(size_of(features)) < 2:
        raise InputError(f"edges need a map of at least 2x2 cells; got {tuple(features.shape[-2:])}")
    cells = F.normalize(features.float(), dim=0)
    return cells.diff(dim=1).norm(dim=0), cells.diff(dim=2).norm(dim=0)


def thin_edges(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the edge strength of a feature map on the lines where it is largest, zero elsewhere.

    Args:
        features: [C, h, w], covering the whole picture; one finer than its pixels is averaged first.
        size: (H, W) of the picture.

    Returns:
        [H, W] float32 on the device of the features: :func:`neighbour_distances` of either axis, bilinearly enlarged,
        where neither pixel next to it along that axis is larger (non-maximum suppression); the larger of both axes.
    """
    h, w = size_of(features)
    vertical, horizontal = neighbour_distances(resize(features[None].float(), (min(h, size[0]), min(w, size[1])))[0])
    return torch.maximum(_ridges(_enlarge(vertical, size, 0)), _ridges(_enlarge(horizontal, size, 1).T).T)


def _ridges(values: Tensor) -> Tensor:
    """Keep values [H, W] larger than those above and not smaller than those below, else 0."""
    padded = F.pad(values[None], (0, 0, 1, 1), mode="replicate")[0]
    return values * ((values > padded[:-2]) & (values >= padded[2:]))


def _enlarge(values: Tensor, size: tuple[int, int], between: int) -> Tensor:
    """Enlarge bilinearly to [H, W] pixels; along the axis ``between`` the values are on the borders between cells."""
    # Zeros at the frame of the picture keep the outermost borders peaks.
    values = F.pad(values, (0, 0, 1, 1) if between == 0 else (1, 1))
    axes = []
    for axis, (pixels, count) in enumerate(zip(size, values.shape, strict=True)):
        cells, first = (count - 1, 0.0) if axis == between else (count, 0.5)
        position = (torch.arange(pixels, dtype=torch.float32, device=values.device) + 0.5) * (cells / pixels) - first
        axes.append(position * (2 / max(count - 1, 1)) - 1)  # -1 and 1: the first and the last value
    y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([x, y], -1)[None]
    return F.grid_sample(values[None, None], grid, align_corners=True, padding_mode="border")[0, 0]


# scipy's maximum_bipartite_matching is optimal, but takes 40 to 100 times as long (60 to 160 ms per map of BSDS500, not
# 1.5, and a picture has hundreds) and would change all recorded results: on BSDS500 greedy pairs are 0.88 to 0.94 of
# the optimum, and F is lower by about as much, for every encoder. Thinning and boundaries of scikit-image are for
# binary masks and labels, not for strengths.
class Matcher:
    """Greedy matching between boundary maps of ``size`` (H, W); never less than half of the largest matching.

    Two pixels of a pair are at most ``tolerance`` pixels apart.
    """

    def __init__(self, size: tuple[int, int], tolerance: float) -> None:
        self._reach = int(tolerance)
        self._width = size[1] + 2 * self._reach  # of the padded map, in which no offset leaves a row
        steps = np.arange(-self._reach, self._reach + 1)
        squares = steps[:, None] ** 2 + steps**2
        order = np.argsort(squares, axis=None, kind="stable")
        order = order[squares.flat[order] <= tolerance**2]
        self._offsets = (steps[order // len(steps)] * self._width + steps[order % len(steps)]).tolist()

    def match(self, predicted: np.ndarray, human: np.ndarray) -> np.ndarray:
        """Match a prediction with the boundaries of one annotator, both [H, W] bool.

        Returns:
            [n] bool, whether the n predicted pixels, row by row, have a partner. As many human pixels are matched.
        """
        y, x = np.nonzero(predicted)
        positions = (y + self._reach) * self._width + x + self._reach
        free = np.pad(human, self._reach).reshape(-1)
        matched = np.zeros(len(positions), dtype=bool)
        unmatched = np.arange(len(positions))
        # All pairs that are one offset apart are disjoint, so each offset is one step.
        for offset in self._offsets:
            partners = positions[unmatched] + offset
            hit = free[partners]
            free[partners[hit]] = False
            matched[unmatched[hit]] = True
            unmatched = unmatched[~hit]
        return matched

    def count(self, strength: np.ndarray, thresholds: Sequence[float], humans: Sequence[np.ndarray]) -> np.ndarray:
        """Count pixels at each threshold, as BSDS does.

        Args:
            strength: [H, W], of thinned edges.
            thresholds: A pixel counts as predicted where the strength is at least that.
            humans: [H, W] bool each, one map per annotator.

        Returns:
            [thresholds, 4] int64: predicted pixels matched to any annotator, predicted pixels, pairs summed over
            annotators, human pixels summed over annotators.
        """
        total = sum(int(human.sum()) for human in humans)
        rows = []
        for threshold in thresholds:
            predicted = strength >= threshold
            matches = [self.match(predicted, human) for human in humans]
            rows.append((np.any(matches, axis=0).sum(), predicted.sum(), np.sum(matches), total))
        return np.array(rows, dtype=np.int64)


def precision_recall(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute precision and recall of (summed) counts [..., 4] of :meth:`Matcher.count`; 0 for 0 / 0."""
    return counts[..., 0] / np.maximum(counts[..., 1], 1), counts[..., 2] / np.maximum(counts[..., 3], 1)


def f_measure(counts: np.ndarray) -> np.ndarray:
    """Compute F = 2 P R / (P + R) of counts [..., 4]; 0 where nothing is matched."""
    precision, recall = precision_recall(counts)
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def best_row(counts: np.ndarray) -> np.ndarray:
    """Select from counts [..., thresholds, 4] those at the threshold of the largest F."""
    best = f_measure(counts).argmax(-1)
    return np.take_along_axis(counts, best[..., None, None], axis=-2)[..., 0, :]
