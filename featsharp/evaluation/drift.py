"""Drift: do features stay in the backbone's distribution when an upsampler is applied again and again?

Guided upsamplers take any features, their own included, so LiFT (arXiv 2403.14625) doubles a map as often as one likes.
Nothing but training keeps the result where heads that know the backbone's features expect it. For every number k of
applications, in the space that the upsampler works in, with x the backbone's features and x_k the map after k:

    cosine_k   mean over cells of the cosine between x and x_k, averaged over each cell of x
    norm_k     norm of that average relative to that of x, root of the mean squares over cells
    mean_k     distance of the mean vectors over all cells of x_k and x, relative to the spread of x
    std_k      spread of x_k relative to that of x

The spread of a map is the root of its variance over cells, summed over channels. What does not drift has cosine 1,
norm 1 and mean 0; a spread somewhat above 1 is what added detail looks like. k = 0 is x itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from featsharp.data.views import canvas_margin, cut_canvas
from featsharp.errors import ConfigError
from featsharp.evaluation.image_task import ImageTask
from featsharp.evaluation.samples import Estimate, bootstrap
from featsharp.evaluation.task import Row, Subject, Summary
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.settings import setting
from featsharp.upsamplers.base import GuidedUpsampler

# Largest map that is made: 4 GiB in float32.
MAX_NUMBERS = 2**30

QUANTITIES = ("cosine", "norm", "mean", "std")


class DriftMeter:
    """Collects the drift of one encoder, image by image.

    Args:
        encoder: In eval mode, with a guided upsampler of a whole factor f of at least 2.
        iterations: How often the upsampler is applied; the last map is f^iterations times the native grid.
    """

    def __init__(self, encoder: SharpEncoder, *, iterations: int = 3) -> None:
        upsampler = encoder.upsampler
        name, factor = type(upsampler).__name__, upsampler.factor
        if not isinstance(upsampler, GuidedUpsampler):
            raise ConfigError(f"drift is of upsamplers that take their own result again; {name} encodes the image")
        if factor != int(factor) or factor < 2:
            raise ConfigError(f"drift is measured with a whole factor of at least 2; got {name} of factor {factor}")
        if iterations < 1:
            raise ConfigError(f"iterations must be at least 1; got {iterations}")
        native = encoder.backbone.grid_size(encoder.backbone.input_size)
        largest = encoder.embed_dim * native[0] * native[1] * factor ** (2 * iterations)
        if largest > MAX_NUMBERS:
            raise ConfigError(
                f"{iterations} iterations of a {factor}x upsampler make a map of {largest:.1e} numbers; take fewer"
            )
        self.encoder, self.upsampler, self.iterations = encoder, upsampler, iterations
        # Per image: the quantities of every number of applications.
        self._rows: list[list[float]] = []

    def add(self, image: Image) -> None:
        """Measure one RGB picture."""
        self._rows.append(self.measure(image))

    @torch.inference_mode()
    def measure(self, image: Image) -> list[float]:
        """The quantities of one RGB picture: of its largest crop in the shape of the backbone's native size."""
        encoder = self.encoder
        native = encoder.backbone.input_size
        size = native[0] * int(self.upsampler.factor), native[1] * int(self.upsampler.factor)
        (top, left), (canvas, _) = canvas_margin(size), cut_canvas(image, size)
        view = canvas[None, :, top : top + size[0], left : left + size[1]].to(encoder.device)
        guide = encoder.input_conditioner(view)
        first = encoder.encode(resize(guide, native)).features
        features, row = first, [*drift(first, first)]
        for _ in range(self.iterations):
            features = self.upsampler.upsample(features, guide)
            row += drift(first, features)
        return row

    def result(self) -> dict[str, Estimate]:
        """See :func:`pool_drift`."""
        return pool_drift(self._rows)


def pool_drift(rows: Sequence[Sequence[float]]) -> dict[str, Estimate]:
    """Means over images: "cosine_0", "norm_0", "mean_0", "std_0", "cosine_1", ..."""
    if not rows:
        raise ConfigError("no image was measured; add at least one")
    found = {}
    for column in range(len(rows[0])):
        applied, quantity = divmod(column, len(QUANTITIES))
        values = [(row[column],) for row in rows]
        found[f"{QUANTITIES[quantity]}_{applied}"] = bootstrap(values, lambda r: float(r.mean()))
    return found


@dataclass
class DriftTask(ImageTask):
    """Drift under repeated application."""

    name: ClassVar[str] = "drift"
    title: ClassVar[str] = "how far do features get when the upsampler is applied to its own result?"

    iterations: int = setting(3, "applications", type="count", metavar="N")

    def begin(self, encoder: SharpEncoder, subject: Subject) -> DriftMeter:
        return DriftMeter(encoder, iterations=self.iterations)

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, state: Any) -> Row:
        return {"quantities": state.measure(image)}

    def summarize(self, rows: Sequence[Row], state: Any) -> Summary:
        return dict(pool_drift([row["quantities"] for row in rows]))


def drift(low_res: Tensor, high_res: Tensor) -> tuple[float, float, float, float]:
    """Cosine, norm, mean and std of a map [1, C, H, W] against [1, C, h, w], H and W whole multiples of h and w."""
    low_res, high_res = low_res.float(), high_res.float()
    pooled = F.adaptive_avg_pool2d(high_res, size_of(low_res))
    cosine = F.cosine_similarity(pooled, low_res, dim=1).mean()
    norm = (pooled.square().mean() / low_res.square().mean()).sqrt()
    shift = (high_res.mean((2, 3)) - low_res.mean((2, 3))).square().sum(1).mean().sqrt()
    before, after = _spread(low_res), _spread(high_res)
    return cosine.item(), norm.item(), (shift / before).item(), (after / before).item()


def _spread(x: Tensor) -> Tensor:
    return x.var((2, 3), correction=0).sum(1).mean().sqrt()
