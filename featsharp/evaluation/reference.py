"""Real run: how close are sharp features to those of the backbone itself at the high resolution?

A backbone that takes any size can be run on the large image at full cost; an upsampler should give the same for less.
With x the sharp features [h, w] of an image of (f h p, f w p) pixels, p the patch, and y the backbone's features:

    cosine     mean over cells of the cosine between x and y
    error      mean squared error relative to the variance of y over the cells of its image, pooled as a ratio of sums;
               the mean of every image would score 1
    cka        linear CKA of the cells of an image (see ``cka``), invariant to rotation and scale of the space

The real run is no ground truth: features of backbones that were trained at one size differ at another (position
embeddings, objects that became too large); ``zoom`` and ``fidelity`` compare with features of crops instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from featsharp.errors import ConfigError
from featsharp.evaluation.cka import linear_cka
from featsharp.evaluation.estimates import estimate_mean, estimate_ratio
from featsharp.evaluation.features import encode_raw, predict_raw, whitened_crop
from featsharp.evaluation.images import ImageTask
from featsharp.evaluation.runner import Row, Run, Subject, Summary
from featsharp.model import SharpEncoder


@dataclass
class ReferenceTask(ImageTask):
    """Cosine, squared error and linear CKA against a real run of the backbone at the high resolution."""

    name: ClassVar[str] = "reference"

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> None:
        if not encoder.backbone.flexible:
            raise ConfigError(
                f"backbone {encoder.backbone.name!r} takes {encoder.backbone.input_size} only, so there is no real run "
                "at a high resolution to compare with; the tasks fidelity and zoom need none"
            )

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, head: Any) -> Row:
        whitened = whitened_crop(encoder, image, reference_size(encoder))
        return compare(predict_raw(encoder, whitened, encoder.backbone.input_size)[0], encode_raw(encoder, whitened)[0])

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        return {
            "cosine": estimate_mean([row["cosine"] for row in rows]),
            "error": estimate_ratio([row["_square"] for row in rows], [row["_variance"] for row in rows]),
            "cka": estimate_mean([row["cka"] for row in rows]),
        }


def reference_size(encoder: SharpEncoder) -> tuple[int, int]:
    """Compute (h, w) in pixels at which the backbone has as many tokens as the sharp map of its native size."""
    backbone = encoder.backbone
    grid = backbone.grid_size(backbone.input_size)
    high = encoder.upsampler.high_res_grid(torch.empty(1, 1, *grid, device="meta"))
    return high[0] * backbone.patch_size, high[1] * backbone.patch_size


def compare(sharp: Tensor, real: Tensor) -> Row:
    """Compare two maps [C, h, w] float32 of one image: "cosine", "error", "cka", and sums for pooling."""
    square = (sharp - real).square().sum().item()
    variance = (real - real.mean((1, 2), keepdim=True)).square().sum().item()
    return {
        "cosine": F.cosine_similarity(sharp, real, dim=0).mean().item(),
        "error": square / max(variance, 1e-12),
        "cka": linear_cka(sharp.flatten(1).T, real.flatten(1).T),
        "_square": square,
        "_variance": variance,
    }
