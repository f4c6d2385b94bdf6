"""Multi-view fidelity: does the sharp map agree with the backbone's features of other views of the same scene?

    fidelity = sum(variance) / sum(squared error)      (FeatSharp, arXiv 2502.16025; higher is better)

The protocol makes runs comparable: held-out images, of which the centre is cropped; views fixed by the image's number
(zoom 1 to 1.6, rotation up to 8 degrees, inside the crop up to a rest that is mirrored); errors in the backbone's space
without any learned bias, of all tokens of a view but the outermost; pooled over images as a ratio of sums; and two
downsamplers: area pooling, which has no parameters, and the trained one of the run where there is one ("own"). For area
pooling the map is read at 4 x 4 points of each token, or at as many as it has cells where those are more. The variance
is that of the targets, so the best constant scores 1; PHI-S scales the whole space by one number, so the ratio is the
same in PHI-S space.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from featsharp.data.images import Picture, decode_image
from featsharp.data.views import similarity
from featsharp.errors import ConfigError
from featsharp.evaluation.estimates import Estimate, bootstrap, estimate_ratio
from featsharp.evaluation.features import EncodedCrop, encode_crop, encode_raw, shown_size
from featsharp.evaluation.images import ImageTask, NumberedDraws
from featsharp.evaluation.runner import Row, Run, Subject, Summary
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.ops.views import View
from featsharp.ops.warp import sample
from featsharp.settings import setting

# Per image, and the seed of their random numbers. Methods that are made of views draw theirs from other seeds.
VIEWS, SEED = 4, 77
# Ranges of the views: of the zoom, whose inverse is 1 / (1 + 0.6 u), and of the rotation either way, in radians.
MOST_ZOOM, MOST_ROTATION = 1.6, 0.14
# Share of a view's side that its centre keeps free of the border of the crop, since rotated views are wider.
CLEARANCE = 1.15
# Points per token and axis at which a warped map is read for area pooling.
POINTS = 4


def default_eval_size(encoder: SharpEncoder) -> tuple[int, int]:
    """Return (h, w) of the evaluation images: the native size times the factor, rounded up, at least 2."""
    return shown_size(encoder, encoder.backbone.input_size)


def draw_views(numbers: Tensor, size: tuple[int, int]) -> View:
    """Make views from random numbers in [0, 1).

    Args:
        numbers: [n, 4]: zoom, rotation, and place of the centre along x and y.
        size: (h, w) in pixels of the base image.

    Returns:
        n views, float32, on the CPU.
    """
    matrices = []
    for zoom, turn, *place in numbers.tolist():
        scale = 1 / (1 + (MOST_ZOOM - 1) * zoom)
        room = max(1 - CLEARANCE * scale, 0)
        shift = room * (2 * np.array(place) - 1)
        matrices.append(similarity(size, scale, (2 * turn - 1) * MOST_ROTATION, shift))
    return View(torch.from_numpy(np.stack(matrices)).float())


class FidelityMeter:
    """Meter of the fidelity of one encoder over images.

    Args:
        encoder: In eval mode.
        downsamplers: Named modules from [N, C, f*h, f*w] to [N, C, h, w] in *normalised* space, besides "area".
        size: (h, w) in pixels of the base image; the low-resolution pass has the backbone's native size.
        views: Per image.
        seed: Of the views; the same seed gives every encoder the same views.
    """

    def __init__(
        self,
        encoder: SharpEncoder,
        *,
        downsamplers: Mapping[str, nn.Module] | None = None,
        size: tuple[int, int] | None = None,
        views: int = VIEWS,
        seed: int = SEED,
    ) -> None:
        self.encoder = encoder
        self.size = size or default_eval_size(encoder)
        self.downsamplers = {"area": None, **(downsamplers or {})}
        # A fifth number of each view is not used: the views stay those of the first measurements.
        self._numbers = NumberedDraws(seed, lambda generator: torch.rand(5 * views, generator=generator, device="cpu"))
        self._rows: list[Row] = []

    def add(self, picture: Picture) -> None:
        """Measure one picture, in any form that ``decode_image`` takes."""
        self._rows.append(self.measure(decode_image(picture), len(self._rows)))

    def result(self) -> dict[str, Estimate]:
        """Pool over the images so far, see :func:`pool_fidelity`."""
        return pool_fidelity(self._rows)

    @torch.inference_mode()
    def measure(self, image: Image, number: int) -> Row:
        """Compute the row of one RGB picture: its scores, and the sums for pooling; ``number`` decides its views."""
        return self.measure_crop(encode_crop(self.encoder, image, self.size), number)

    @torch.inference_mode()
    def measure_crop(self, crop: EncodedCrop, number: int) -> Row:
        """:meth:`measure` a picture that is encoded already, at the size of this meter."""
        encoder = self.encoder
        numbers = self._numbers[number]
        views = draw_views(numbers[: len(numbers) // 5 * 4].view(-1, 4), self.size).to(encoder.device)
        shown = sample(crop.image.expand(len(views), -1, -1, -1), views.grid(self.size), mode="bicubic")
        targets = encode_raw(encoder, resize(shown, encoder.backbone.input_size))
        grid = size_of(targets)
        inner = _without_border(targets)
        row: Row = {
            "_count": inner.numel(),
            "_square": inner.square().sum().item(),
            "_sum": inner.sum((0, 2, 3)).tolist(),
            "_tokens": inner.numel() // inner.shape[1],
        }
        factor = math.ceil(encoder.factor)  # whole, so that cells can be pooled
        for name, downsampler in self.downsamplers.items():
            points = max(POINTS, factor) if downsampler is None else factor
            warped = views.warp(crop.high_res, (points * grid[0], points * grid[1]))
            prediction = _without_border(self._pool(warped, grid, downsampler))
            row[f"_error_{name}"] = (prediction - inner).square().sum().item()
            if name == "area":
                row["_cosine"] = F.cosine_similarity(prediction, inner, dim=1).sum().item()
        row.update({name: estimate.value for name, estimate in pool_fidelity([row], resamples=0).items()})
        return row

    def _pool(self, warped: Tensor, grid: tuple[int, int], downsampler: nn.Module | None) -> Tensor:
        if downsampler is None:
            return F.adaptive_avg_pool2d(warped, grid)
        normalizer = self.encoder.normalizer
        if not normalizer.invertible:
            return downsampler(warped)
        return normalizer.denormalize(downsampler(normalizer(warped)))


def pool_fidelity(rows: Sequence[Row], *, resamples: int = 1000) -> dict[str, Estimate]:
    """Compute fidelity by downsampler ("area", ...) and "cosine", the mean cosine similarity under area pooling.

    Args:
        rows: Of :meth:`FidelityMeter.measure`, at least one.
        resamples: For the intervals; 0: none.
    """
    if not rows:
        raise ConfigError("no image was measured; add at least one")
    sums = np.sum([row["_sum"] for row in rows], axis=0)
    count = sum(row["_count"] for row in rows)
    mean_square = np.square(sums / (count / len(sums))).sum()
    # One variance for all resamples: it is a property of the space, not of the encoder.
    variance = sum(row["_square"] for row in rows) / count - mean_square / len(sums)
    scores = {}
    for name in [key.removeprefix("_error_") for key in rows[0] if key.startswith("_error_")]:
        errors = [(row["_count"], row[f"_error_{name}"]) for row in rows]
        scores[name] = bootstrap(
            errors, lambda r: float(variance * r[:, 0].sum() / max(r[:, 1].sum(), 1e-12)), resamples=resamples
        )
    cosines, tokens = ([row[name] for row in rows] for name in ("_cosine", "_tokens"))
    scores["cosine"] = estimate_ratio(cosines, tokens, resamples=resamples)
    return scores


@dataclass
class FidelityTask(ImageTask):
    """Multi-view fidelity with area pooling and with the trained downsampler of the run, where there is one."""

    name: ClassVar[str] = "fidelity"

    views: int = setting(VIEWS, "views per image", type="count", metavar="N")
    seed: int = setting(SEED, "of the views", type=int, metavar="N")

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> FidelityMeter:
        trained = subject.load_downsampler(encoder)
        downsamplers = {} if trained is None else {"own": trained}
        return FidelityMeter(encoder, downsamplers=downsamplers, views=self.views, seed=self.seed)

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, head: FidelityMeter) -> Row:
        return head.measure(image, number)

    def score(self, rows: Sequence[Row], head: FidelityMeter) -> Summary:
        scores = pool_fidelity(rows)
        return {name if name == "cosine" else f"fidelity_{name}": value for name, value in scores.items()}


def _without_border(tokens: Tensor) -> Tensor:
    """Drop the outermost ring of [B, C, h, w], except where nothing would remain."""
    return tokens if min(size_of(tokens)) <= 2 else tokens[..., 1:-1, 1:-1]
