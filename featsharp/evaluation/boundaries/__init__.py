"""Boundaries: do the features change where people see one thing end and the next begin?

The edges of the sharp map, thinned to lines, are matched with human boundaries as in BSDS500: precision is pooled over
pictures (a pixel is right when it matches any annotator), recall summed over annotators; ODS is the best F at one
threshold for all pictures, OIS that with the best threshold of each picture. :mod:`.edges` says how edges are taken,
:mod:`.matching` how the matching differs from the official one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from featsharp.data.images import decode_image
from featsharp.evaluation.boundaries.data import Picture, find_pictures, read_boundaries
from featsharp.evaluation.boundaries.edges import thin_edges
from featsharp.evaluation.boundaries.matching import Matcher, best_row, f_measure, precision_recall
from featsharp.evaluation.identity import digest, file_key
from featsharp.evaluation.samples import bootstrap
from featsharp.evaluation.task import Item, Row, Summary, Task
from featsharp.evaluation.whole_picture import sharp_features
from featsharp.model import SharpEncoder
from featsharp.settings import setting

__all__ = ["BoundaryTask"]

# Strengths between unit-length neighbours, from hardly any change to opposite features.
WEAKEST, STRONGEST = 0.005, 2.0


@dataclass
class BoundaryTask(Task):
    """F-measure of feature edges against human boundaries: BSDS500, or pictures with masks of lines."""

    name: ClassVar[str] = "boundaries"
    title: ClassVar[str] = "do the features change where people draw boundaries?"

    data: Path = setting(Path("."), "BSDS500 or its like", type=Path, metavar="DIR", required=True)
    split: str | None = setting(None, "train, val or test, where the data set has several", metavar="NAME")
    limit: int | None = setting(None, "only the first N pictures", type="count", metavar="N")
    low_res_size: tuple[int, int] | None = setting(
        None, "size of the low-resolution pass; default: the backbone's native one", type="size", metavar="HxW"
    )
    tolerance: float = setting(
        0.0075, "largest distance between matched pixels, as a part of the picture's diagonal", type=float, metavar="X"
    )
    thresholds: int = setting(60, "thresholds on the strength of edges", type="count", metavar="N")

    def items(self) -> Iterator[Item]:
        for picture in find_pictures(self.data, self.split)[: self.limit]:
            yield Item(picture.image.name, picture)

    def measure(self, encoder: SharpEncoder, item: Item, number: int, state: Any) -> Row:
        picture: Picture = item.data
        image = decode_image(picture.image, name=picture.image.name, upright=False)
        size = (image.height, image.width)
        humans = read_boundaries(picture, size)
        edges = thin_edges(sharp_features(encoder, image, self.low_res_size)[0], size)
        matcher = Matcher(size, self.tolerance * math.hypot(*size))
        counts = matcher.count(edges.cpu().numpy(), self._thresholds(), humans)
        return {"f": float(f_measure(best_row(counts))), "annotators": len(humans), "_counts": counts.tolist()}

    def stamp(self, item: Item) -> str:
        picture: Picture = item.data
        return digest(*(file_key(path.parent, path.name) for path in (picture.image, *picture.truths)))

    def summarize(self, rows: Sequence[Row], state: Any) -> Summary:
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
        """The same for every picture and encoder; by equal factors, since strengths per cell differ between grids."""
        return np.geomspace(WEAKEST, STRONGEST, self.thresholds).tolist()
