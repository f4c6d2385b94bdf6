"""One-to-one matching of predicted and human boundary pixels, and the scores that BSDS derives from it.

The benchmark (Martin, Fowlkes and Malik 2004; Arbelaez et al. 2011) solves an assignment problem, which ends with as
many pairs as there can be. Here pairs are made greedily, the nearest first. That is never less than half of the largest
matching; on pictures of BSDS500 it was 0.88 to 0.94 of it, so F comes out lower by about as much, for every encoder.
Unlike a mere test of the distance, it does not reward thick or doubled edges. It is not the official matcher, nor are
predictions thinned beyond non-maximum suppression: do not mix its numbers with published ones.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["Matcher", "best_row", "f_measure", "precision_recall"]


class Matcher:
    """Greedy matching between boundary maps of one size.

    Args:
        size: (H, W).
        tolerance: Largest distance between two pixels of a pair, in pixels.
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
        """Which pixels of a prediction find a partner.

        Args:
            predicted: [H, W] bool.
            human: [H, W] bool.

        Returns:
            [n] bool, for the n predicted pixels row by row. As many human pixels are matched.
        """
        y, x = np.nonzero(predicted)
        places = (y + self._reach) * self._width + x + self._reach
        free = np.pad(human, self._reach).reshape(-1)
        found = np.zeros(len(places), dtype=bool)
        alone = np.arange(len(places))
        # All pairs that are one offset apart are disjoint, so each offset is one step.
        for offset in self._offsets:
            partners = places[alone] + offset
            hit = free[partners]
            free[partners[hit]] = False
            found[alone[hit]] = True
            alone = alone[~hit]
        return found

    def count(self, strength: np.ndarray, thresholds: Sequence[float], humans: Sequence[np.ndarray]) -> np.ndarray:
        """The counts of BSDS at each threshold.

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
    """Precision and recall of counts [..., 4] of :meth:`Matcher.count`, summed over whatever is pooled; 0 for 0 / 0."""
    return counts[..., 0] / np.maximum(counts[..., 1], 1), counts[..., 2] / np.maximum(counts[..., 3], 1)


def f_measure(counts: np.ndarray) -> np.ndarray:
    """2 P R / (P + R) of counts [..., 4]; 0 where nothing is matched."""
    precision, recall = precision_recall(counts)
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def best_row(counts: np.ndarray) -> np.ndarray:
    """Of counts [..., thresholds, 4], those at the threshold of the largest F."""
    best = f_measure(counts).argmax(-1)
    return np.take_along_axis(counts, best[..., None, None], axis=-2)[..., 0, :]
