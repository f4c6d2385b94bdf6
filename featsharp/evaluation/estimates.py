"""Numbers over images with their 95 % intervals: percentiles under resampling of images, with a fixed seed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number and its 95 % interval over images."""

    value: float
    low: float
    high: float


def bootstrap(per_image: Any, statistic: Callable[[np.ndarray], float], *, resamples: int = 1000) -> Estimate:
    """Compute a statistic of all images with its interval.

    Args:
        per_image: A number or a row of numbers per image.
        statistic: Maps rows [images, ...] to a number; resamples of NaN are left out.
        resamples: 0 for no interval (NaN).
    """
    rows = np.asarray(per_image, dtype=np.float64)
    if resamples == 0:
        return Estimate(float(statistic(rows)), math.nan, math.nan)
    rng = np.random.default_rng(0)
    draws = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(resamples)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Estimate(float(statistic(rows)), float(low), float(high))


def bootstrap_sums(
    per_image: np.ndarray, statistic: Callable[[np.ndarray], float], *, resamples: int = 1000
) -> Estimate:
    """:func:`bootstrap` of a statistic of the sum over images of ``per_image`` [images, ...]; fast for long rows."""
    count = len(per_image)
    rng = np.random.default_rng(0)
    times = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples)]
    sums = np.tensordot(np.array(times, dtype=np.float64), per_image, 1)
    low, high = np.nanpercentile([statistic(total) for total in sums], [2.5, 97.5])
    return Estimate(float(statistic(per_image.sum(0))), float(low), float(high))


def bootstrap_draws(count: int, statistics: Callable[[np.ndarray], Any], *, resamples: int = 1000) -> np.ndarray:
    """Compute numbers under resampling of ``count`` images, [resamples, M].

    Two encoders with the same count have the same resamples, so that the difference of their draws has an interval.

    Args:
        count: Of images.
        statistics: Maps numbers of images [count] to M numbers, NaN where there is none.
        resamples: Their number.
    """
    rng = np.random.default_rng(0)
    return np.array([statistics(rng.integers(count, size=count)) for _ in range(resamples)], dtype=np.float64)


def estimate_from(value: float, draws: np.ndarray) -> Estimate:
    """Make an estimate of a number and its draws [resamples]; those of NaN are left out."""
    known = draws[~np.isnan(draws)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (math.nan, math.nan)
    return Estimate(float(value), float(low), float(high))


def estimate_mean(per_image: Any) -> Estimate:
    """Estimate the mean of one number, or as many numbers, per image."""
    return bootstrap(per_image, lambda rows: float(rows.mean()))


def estimate_ratio(numerators: Any, denominators: Any, *, resamples: int = 1000) -> Estimate:
    """Estimate the ratio of the sums over images; resamples whose denominators are 0 are left out."""

    def ratio(rows: np.ndarray) -> float:
        above, below = rows.sum(0)
        return float(above / below) if below else math.nan

    return bootstrap(np.stack([numerators, denominators], 1), ratio, resamples=resamples)
