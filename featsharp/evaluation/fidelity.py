"""Multi-view fidelity: does the sharp map agree with the backbone's features of other views of the same scene?

    fidelity = sum(mask * variance) / sum(mask * squared error)      (FeatSharp, arXiv 2502.16025; higher is better)

The protocol makes runs comparable: held-out images, views fixed by the image's number, masks eroded by one token,
errors in the backbone's space without any learned bias, pooled over images as a ratio of sums, and two downsamplers:
area pooling, which has no parameters, and the trained one of the run where there is one ("own"). The variance is that
of the targets, so the best constant scores 1; PHI-S scales the whole space by one number, so the ratio is the same in
PHI-S space.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from featsharp.data.views import ViewConfig, Views, base_view, cut_canvas, render_views, sample_homography
from featsharp.errors import ConfigError
from featsharp.evaluation.estimates import Estimate, bootstrap, estimate_ratio
from featsharp.evaluation.features import encode_raw, predict_raw, shown_size
from featsharp.evaluation.images import ImageTask
from featsharp.evaluation.runner import Row, Run, Subject, Summary
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize
from featsharp.settings import setting

# Views zoom in by up to 1.6 and rotate by up to 8 degrees.
EVAL_VIEWS = ViewConfig(
    num_views=8, zoom=(1.0, 1.0), jitter_zoom=(1.0, 1.6), perspective=(0.0, 0.0), rotation=8.0, shift=0.0
)


def default_eval_size(encoder: SharpEncoder) -> tuple[int, int]:
    """Return (h, w) of the evaluation images: the native size times the factor, rounded up, at least 2."""
    return shown_size(encoder, encoder.backbone.input_size)


class FidelityMeter:
    """Meter of the fidelity of one encoder over images.

    Args:
        encoder: In eval mode.
        downsamplers: Named modules from [N, C, f*h, f*w] to [N, C, h, w] in *normalised* space, besides "area".
        size: (h, w) in pixels of the base image; the low-resolution pass has the backbone's native size.
        views: Ranges of the views.
        seed: Of the views; the same seed gives every encoder the same views.
    """

    def __init__(
        self,
        encoder: SharpEncoder,
        *,
        downsamplers: Mapping[str, nn.Module] | None = None,
        size: tuple[int, int] | None = None,
        views: ViewConfig = EVAL_VIEWS,
        seed: int = 0,
    ) -> None:
        self.encoder, self.views, self.seed = encoder, views, seed
        self.size = size or default_eval_size(encoder)
        self.downsamplers = {"area": None, **(downsamplers or {})}
        self._rows: list[Row] = []

    def add(self, image: Image) -> None:
        """Measure one RGB picture."""
        self._rows.append(self.measure(image, len(self._rows)))

    def result(self) -> dict[str, Estimate]:
        """Pool over the images so far, see :func:`pool_fidelity`."""
        return pool_fidelity(self._rows)

    @torch.inference_mode()
    def measure(self, image: Image, number: int) -> Row:
        """Compute the row of one RGB picture: its scores, and the sums for pooling; ``number`` seeds its views."""
        encoder, device = self.encoder, self.encoder.device
        rng = np.random.default_rng((self.seed, number))
        canvas, mask = cut_canvas(image, self.size)
        homographies = np.stack([sample_homography(self.size, self.views, rng) for _ in range(self.views.num_views)])
        views = Views(canvas[None], mask[None], torch.from_numpy(homographies).float()[None])
        views = Views(*(x.to(device) for x in views))
        native = encoder.backbone.input_size
        images, masks = render_views(views, native)
        targets = encode_raw(encoder, encoder.input_conditioner(images))
        grid = (targets.shape[-2], targets.shape[-1])
        high_res = predict_raw(encoder, encoder.input_conditioner(base_view(views)[0]), native)
        factor = math.ceil(encoder.factor)  # whole, so that cells can be pooled
        large = (factor * grid[0], factor * grid[1])
        warped = views.jitters.warp(high_res, large)
        valid = _erode((resize(masks, grid) > 0.99).float() * views.jitters.inside(grid))
        row: Row = {
            "_count": valid.sum().item() * targets.shape[1],
            "_square": (valid * targets.square()).sum().item(),
            "_sum": (valid * targets).sum((0, 2, 3)).tolist(),
            "_tokens": valid.sum().item(),
        }
        for name, downsampler in self.downsamplers.items():
            prediction = self._pool(warped, grid, downsampler)
            row[f"_error_{name}"] = (valid * (prediction - targets).square()).sum().item()
            if name == "area":
                cosine = F.cosine_similarity(prediction, targets, dim=1)[:, None]
                row["_cosine"] = (valid * cosine).sum().item()
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

    views: int = setting(EVAL_VIEWS.num_views, "views per image", type="count", metavar="N")

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> FidelityMeter:
        trained = subject.load_downsampler(encoder)
        downsamplers = {} if trained is None else {"own": trained}
        views = replace(EVAL_VIEWS, num_views=self.views)
        return FidelityMeter(encoder, downsamplers=downsamplers, views=views, seed=self.seed)

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, head: FidelityMeter) -> Row:
        return head.measure(image, number)

    def score(self, rows: Sequence[Row], head: FidelityMeter) -> Summary:
        scores = pool_fidelity(rows)
        return {name if name == "cosine" else f"fidelity_{name}": value for name, value in scores.items()}


def _erode(mask: Tensor) -> Tensor:
    """Drop the outermost ring of a [B, 1, h, w] mask, except where nothing would remain."""
    if min(mask.shape[-2:]) <= 2:
        return mask
    return -F.max_pool2d(F.pad(-mask, (1, 1, 1, 1)), 3, stride=1)
