"""Scores of segmentation, from counts of pixels: intersection over union (IoU), its mean, pixel accuracy."""

from collections.abc import Sequence

import numpy as np

from featsharp.evaluation.samples import bootstrap_sums
from featsharp.evaluation.segmentation.labels import VOID
from featsharp.evaluation.task import Row, Summary


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by true class and predicted class, [K, K] integers; void pixels of ``truth`` do not count.

    Args:
        truth: Integers of any shape, classes and VOID.
        prediction: Classes, of the same shape.
        classes: K.
    """
    labelled = truth != VOID
    cells = truth[labelled].astype(np.int64) * classes + prediction[labelled]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def class_counts(matrix: np.ndarray) -> np.ndarray:
    """Of a confusion matrix: pixels that are of a class and predicted so, are of it, are predicted so; [3, K]."""
    return np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def iou(counts: np.ndarray) -> np.ndarray:
    """IoU by class, [K], of :func:`class_counts`; NaN for a class that is neither in the truth nor predicted."""
    hit, true, predicted = counts
    union = true + predicted - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


def image_row(matrix: np.ndarray) -> Row:
    """What an evaluation keeps of an image: its scores, and per class that occurs [class, *class_counts]."""
    counts = class_counts(matrix)
    occurring = np.flatnonzero(counts.any(0))
    return {
        "miou": float(np.nanmean(iou(counts))),
        "pixel_accuracy": float(counts[0].sum() / counts[1].sum()),
        "_counts": [[int(c), *map(int, counts[:, c])] for c in occurring],
    }


def pool_rows(rows: Sequence[Row], classes: Sequence[str]) -> Summary:
    """Scores of a split: from the counts of all images together, with intervals over images.

    Returns:
        "miou" and "pixel_accuracy" with intervals; "iou" by class name, None for a class that is neither in the truth
        nor predicted. Such classes are left out of the mean, and out of a resample's mean where it has none.
    """
    counts = np.zeros((len(rows), 3, len(classes)))
    for number, row in enumerate(rows):
        for c, *numbers in row["_counts"]:
            counts[number, :, c] = numbers
    by_class = iou(counts.sum(0))
    return {
        "miou": bootstrap_sums(counts, lambda pooled: float(np.nanmean(iou(pooled)))),
        "pixel_accuracy": bootstrap_sums(counts, lambda pooled: float(pooled[0].sum() / pooled[1].sum())),
        "iou": {name: None if np.isnan(value) else float(value) for name, value in zip(classes, by_class, strict=True)},
    }
