"""Drift: do features stay in the backbone's distribution when an upsampler is applied repeatedly?

Guided upsamplers can be applied to their output, so LiFT (arXiv 2403.14625) doubles a map any number of times. Only
training keeps the result in the distribution that heads on the backbone's features expect. For every number k of
applications, in the space that the upsampler works in, with x the backbone's features and x_k the map after k:

    cosine_k   mean over cells of the cosine between x and x_k, averaged over each cell of x
    norm_k     norm of that average relative to that of x, root of the mean squares over cells
    mean_k     distance of the mean vectors over all cells of x_k and x, relative to the spread of x
    std_k      spread of x_k relative to that of x

The spread of a map is the root of its variance over cells, summed over channels. Without drift cosine is 1, norm 1 and
mean 0; added detail makes the spread somewhat larger than 1. k = 0 is x itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from featsharp.errors import ConfigError
from featsharp.evaluation.estimates import estimate_mean
from featsharp.evaluation.features import whitened_crop
from featsharp.evaluation.images import ImageTask
from featsharp.evaluation.runner import Row, Run, Subject, Summary
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.settings import setting
from featsharp.upsamplers.base import GuidedUpsampler

# Numbers in the largest map: 4 GiB in float32.
MAX_NUMBERS = 2**30

QUANTITIES = ("cosine", "norm", "mean", "std")


@dataclass
class DriftTask(ImageTask):
    """Drift under repeated application of a guided upsampler of a whole factor f, at least 2.

    It uses the largest crop of each picture in the shape of the backbone's native size; the last map is f^iterations
    times the native grid.
    """

    name: ClassVar[str] = "drift"

    iterations: int = setting(3, "applications", type="count", metavar="N")

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> GuidedUpsampler:
        """Check that the upsampler can be applied repeatedly, and that its maps fit."""
        upsampler = encoder.upsampler
        name, factor = type(upsampler).__name__, upsampler.factor
        if not isinstance(upsampler, GuidedUpsampler):
            raise ConfigError(f"drift is of upsamplers that take their own result again; {name} encodes the image")
        if factor != int(factor) or factor < 2:
            raise ConfigError(f"drift is measured with a whole factor of at least 2; got {name} of factor {factor}")
        if self.iterations < 1:
            raise ConfigError(f"iterations must be at least 1; got {self.iterations}")
        height, width = encoder.backbone.grid_size(encoder.backbone.input_size)
        largest = encoder.embed_dim * height * width * factor ** (2 * self.iterations)
        if largest > MAX_NUMBERS:
            raise ConfigError(
                f"{self.iterations} iterations of a {factor}x upsampler make a map of {largest:.1e} numbers; take fewer"
            )
        return upsampler

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, head: GuidedUpsampler) -> Row:
        height, width = encoder.backbone.input_size
        guide = whitened_crop(encoder, image, (height * int(head.factor), width * int(head.factor)))
        features = low_res = encoder.encode(resize(guide, (height, width))).features
        quantities = [*compute_drift(low_res, features)]
        for _ in range(self.iterations):
            features = head.upsample(features, guide)
            quantities += compute_drift(low_res, features)
        return {"quantities": quantities}

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        names = [f"{quantity}_{applied}" for applied in range(self.iterations + 1) for quantity in QUANTITIES]
        return {name: estimate_mean([row["quantities"][i] for row in rows]) for i, name in enumerate(names)}


def compute_drift(low_res: Tensor, high_res: Tensor) -> tuple[float, float, float, float]:
    """Compute cosine, norm, mean and std of a map [1, C, H, W] against [1, C, h, w], whole multiples of h and w."""
    low_res, high_res = low_res.float(), high_res.float()
    pooled = F.adaptive_avg_pool2d(high_res, size_of(low_res))
    cosine = F.cosine_similarity(pooled, low_res, dim=1).mean()
    norm = (pooled.square().mean() / low_res.square().mean()).sqrt()
    shift = (high_res.mean((2, 3)) - low_res.mean((2, 3))).square().sum(1).mean().sqrt()
    before, after = _spread(low_res), _spread(high_res)
    return cosine.item(), norm.item(), (shift / before).item(), (after / before).item()


def _spread(x: Tensor) -> Tensor:
    return x.var((2, 3), correction=0).sum(1).mean().sqrt()
