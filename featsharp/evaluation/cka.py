"""Linear CKA across scales: are the features of an image similar at every size?

The heat maps of LiFT (arXiv 2403.14625): for two sizes a and b of an image, the encoder's features x and y [n, C] are
resized to a common grid (that of the smaller size, antialiased), matched by position and centred, and compared by

    CKA = ||y^T x||_F^2 / (||x^T x||_F ||y^T y||_F)        (Kornblith et al., arXiv 1905.00414)

which is 1 for features that differ by a rotation and a scale. It is computed per image and averaged over images (the
paper does not state whether it pools images). With fewer tokens n than channels C this estimate is near 1 even for
unrelated features, so the debiased one (Song et al., JMLR 13, 2012; around 0 for unrelated features) is reported too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
from PIL.Image import Image
from torch import Tensor

from featsharp.errors import ConfigError, InputError
from featsharp.evaluation.estimates import Estimate, estimate_mean
from featsharp.evaluation.features import predict_raw, shown_size, whitened_crop
from featsharp.evaluation.images import ImageTask
from featsharp.evaluation.runner import Row, Run, Subject, Summary
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize
from featsharp.settings import setting

# Those of LiFT.
SIZES = (56, 112, 224, 448)
# The estimate without bias divides by n - 3.
MIN_TOKENS = 4


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """Compute the linear CKA of two sets of features for the same n tokens.

    Args:
        x: [n, C], n at least 4; centred here.
        y: [n, D].
        debiased: Whether to compute the estimate whose expectation does not depend on n.

    Returns:
        In [0, 1]; debiased: at most 1, and around 0 for unrelated features.

    Raises:
        InputError: For other shapes, and constant features.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < MIN_TOKENS:
        raise InputError(
            f"CKA takes [n, C] and [n, D] with n at least {MIN_TOKENS}; got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    similarity = _debiased_hsic if debiased else _hsic
    xy, xx, yy = similarity(x, y), similarity(x, x), similarity(y, y)
    if not (xx > 0 and yy > 0 and math.isfinite(xy)):
        raise InputError("CKA is not defined for features that are constant, NaN or infinite")
    return xy / math.sqrt(xx * yy)


def cka_of_maps(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """:func:`linear_cka` of two maps [1, C, h, w] of the same picture, on the coarser grid, matched by position."""
    grid = min(x.shape[-2], y.shape[-2]), min(x.shape[-1], y.shape[-1])
    tokens = (resize(z.float(), grid)[0].flatten(1).T for z in (x, y))
    return linear_cka(*tokens, debiased=debiased)


@dataclass
class CkaTask(ImageTask):
    """Linear CKA between all pairs of sizes: a matrix, and per size the mean over the other sizes."""

    name: ClassVar[str] = "cka"

    sizes: Sequence[int] = setting(
        SIZES, "sides of the low-resolution passes, rounded to whole patches", type="count", nargs="+", metavar="N"
    )

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> list[int]:
        return fitting_sizes(encoder, self.sizes)

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, head: list[int]) -> Row:
        maps = maps_by_size(encoder, image, head)
        pairs = list(combinations(maps, 2))
        return {
            "cka": [cka_of_maps(x, y) for x, y in pairs],
            "cka_debiased": [cka_of_maps(x, y, debiased=True) for x, y in pairs],
        }

    def score(self, rows: Sequence[Row], head: list[int]) -> Summary:
        plain = pool_cka([row["cka"] for row in rows], head)
        debiased = pool_cka([row["cka_debiased"] for row in rows], head)
        by_size = {f"cka_{size}": estimate for size, estimate in plain["scale_summary"].items()}
        return {"sizes": head, **plain, **by_size, **{f"{name}_debiased": value for name, value in debiased.items()}}


def fitting_sizes(encoder: SharpEncoder, sizes: Sequence[int]) -> list[int]:
    """Round sides in pixels to sizes of the backbone, in ascending order.

    Raises:
        ConfigError: For a backbone of one size, fewer than two different sizes, or a size of too few tokens.
    """
    backbone = encoder.backbone
    if not backbone.flexible:
        raise ConfigError(f"backbone {backbone.name!r} takes one size only, so there are no scales to compare")
    fitting = sorted(
        {backbone.fit_size(max(size, backbone.patch_size), max(size, backbone.patch_size))[0] for size in sizes}
    )
    if len(fitting) < 2:
        raise ConfigError(
            f"two different sizes are needed; {list(sizes)} become {fitting} for patches of {backbone.patch_size}"
        )
    if math.prod(backbone.grid_size((fitting[0], fitting[0]))) < MIN_TOKENS:
        raise ConfigError(
            f"{fitting[0]} pixels are fewer than {MIN_TOKENS} tokens of {backbone.patch_size} pixels; take sizes from "
            f"{2 * backbone.patch_size}"
        )
    return fitting


def maps_by_size(encoder: SharpEncoder, image: Image, sizes: Sequence[int]) -> list[Tensor]:
    """Compute features [1, C, h, w] of the largest square of an RGB picture, for low-resolution passes of these sides.

    The picture is larger than the low-resolution pass by the encoder's factor, at least by 2, as in the other tasks.
    """
    shown = {size: shown_size(encoder, (size, size)) for size in sizes}
    whitened = whitened_crop(encoder, image, shown[max(sizes)])
    return [predict_raw(encoder, resize(whitened, shown[size]), (size, size), positional=False) for size in sizes]


def pool_cka(rows: Sequence[Sequence[float]], sizes: Sequence[int]) -> dict[str, Any]:
    """Compute means over images.

    Args:
        rows: Per image one number for each pair of sizes, in the order of ``itertools.combinations``.
        sizes: Of which the pairs are.

    Returns:
        "cka" over all pairs of different sizes; "matrix" and "intervals" with one row and one column per size;
        "scale_summary", by size the mean over its pairs with the other sizes.
    """
    pairs = list(combinations(range(len(sizes)), 2))
    matrix = np.eye(len(sizes)).tolist()
    intervals = np.ones((len(sizes), len(sizes), 2)).tolist()
    for column, (a, b) in enumerate(pairs):
        estimate = _mean_of(rows, [column])
        matrix[a][b] = matrix[b][a] = estimate.value
        intervals[a][b] = intervals[b][a] = [estimate.low, estimate.high]
    summary = {
        size: _mean_of(rows, [column for column, pair in enumerate(pairs) if number in pair])
        for number, size in enumerate(sizes)
    }
    return {
        "cka": _mean_of(rows, range(len(pairs))),
        "matrix": matrix,
        "intervals": intervals,
        "scale_summary": summary,
    }


def _mean_of(rows: Sequence[Sequence[float]], columns: Sequence[int]) -> Estimate:
    return estimate_mean([[row[column] for column in columns] for row in rows])


def _hsic(x: Tensor, y: Tensor) -> float:
    """Compute ||y^T x||_F^2 for centred [n, C] and [n, D], from Gram matrices where those are smaller."""
    if len(x) < min(x.shape[1], y.shape[1]):
        return float((_gram(x) * _gram(y)).sum())
    return float((y.T @ x).square().sum())


def _debiased_hsic(x: Tensor, y: Tensor) -> float:
    """Compute equation 5 of Song et al. for centred [n, C] and [n, D], but for the factor 1 / (n (n - 3)).

    That factor cancels in CKA. With K = x x^T and L = y y^T without their diagonals. Both have n^2 entries, of which
    only the sums are needed: tr(K L), the sum of K L, and those of K and of L. Rows of the full products sum to 0, for
    x and y are centred.
    """
    n = len(x)
    diagonal_x, diagonal_y = x.square().sum(1), y.square().sum(1)
    trace = _hsic(x, y) - float(diagonal_x @ diagonal_y)
    # K 1 = -diagonal_x, so 1^T K L 1 = diagonal_x . diagonal_y and 1^T K 1 = -sum(diagonal_x).
    sums = float(diagonal_x.sum() * diagonal_y.sum())
    return trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * float(diagonal_x @ diagonal_y)


def _gram(x: Tensor) -> Tensor:
    return x @ x.T
