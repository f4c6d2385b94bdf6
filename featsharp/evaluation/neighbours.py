"""Classification and retrieval by nearest neighbours: whole pictures, described by one vector each.

A picture's neighbours are sought among all others, by cosine. ``knn`` is the share of pictures whose class the 20
nearest name, each weighing exp(cosine / 0.07) (the protocol of DINO, arXiv 2104.14294); ``map`` is the mean over
pictures of the average precision of all others, ranked, where those of the same class are relevant. Both describe a
picture by the backbone's summary, or by the mean of its sharp map where it has none; ``knn_pooled`` and ``map_pooled``
always by the mean.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

import numpy as np
from PIL.Image import Image

from featsharp.errors import DataError
from featsharp.evaluation.estimates import estimate_mean
from featsharp.evaluation.images import ImageTask
from featsharp.evaluation.runner import Item, Row, Summary
from featsharp.model import SharpEncoder

NEIGHBOURS, TEMPERATURE = 20, 0.07


@dataclass
class NeighboursTask(ImageTask):
    """Classification by nearest neighbours, and retrieval of the same class; the class is a picture's folder or name.

    The folder that holds it (CLASS/x.jpg), or else its name up to its number (yin_yang_0060.jpg).
    """

    name: ClassVar[str] = "neighbours"

    def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
        return {"class": class_of(item.name), **super().measure(encoder, item, head)}

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, head: Any) -> Row:
        out = encoder.encode_image(image, return_summary=encoder.backbone.summary_dim is not None)
        row = {"_pooled": out.high_res[0].mean((1, 2)).tolist()}
        return row if out.summary is None else {**row, "_summary": out.summary[0].tolist()}

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        classes = [row["class"] for row in rows]
        result: Summary = {}
        for suffix, kind in (("", "_summary" if "_summary" in rows[0] else "_pooled"), ("_pooled", "_pooled")):
            right, precision = neighbour_scores(np.array([row[kind] for row in rows]), classes)
            result |= {f"knn{suffix}": estimate_mean(right), f"map{suffix}": estimate_mean(precision)}
        return {**result, "classes": len(set(classes)), "queries": len(right)}


def class_of(name: str) -> str:
    """Return the class of a picture by its name within the data: its folder, or its name without number."""
    path = PurePosixPath(name)
    folders = [part for part in path.parts[:-1] if not part.endswith(".tar")]
    return folders[-1] if folders else re.sub(r"[ _-]*\d+$", "", path.stem)


def neighbour_scores(vectors: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Compute, for every picture whose class has another, whether its neighbours name it, and its average precision.

    Args:
        vectors: [N, C].
        classes: N names.

    Raises:
        DataError: Where no class has two pictures, or all have one.
    """
    names, labels = np.unique(classes, return_inverse=True)
    counts = Counter(labels.tolist())
    queries = [number for number, label in enumerate(labels) if counts[label] > 1]
    if not queries or len(names) < 2:
        raise DataError(
            f"{len(vectors)} pictures of {len(names)} classes, {len(queries)} with another of their class; neighbours "
            "need two classes, and two pictures of one. Name files CLASS_NUMBER.jpg, or put them into folders"
        )
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    right, precision = [], []
    for query in queries:
        cosines = units @ units[query]
        others = np.flatnonzero(np.arange(len(units)) != query)
        order = others[np.argsort(-cosines[others], kind="stable")]
        nearest = order[:NEIGHBOURS]
        votes = np.bincount(labels[nearest], np.exp(cosines[nearest] / TEMPERATURE), len(names))
        right.append(float(votes.argmax() == labels[query]))
        places = np.flatnonzero(labels[order] == labels[query]) + 1  # 1 is the nearest
        precision.append(float((np.arange(1, len(places) + 1) / places).mean()))
    return np.array(right), np.array(precision)
