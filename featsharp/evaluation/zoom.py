"""Zoom cosine: do the sharp features agree with the backbone's features of crops?

For random half-size crops of an image: the cosine similarity, in the backbone's space, between the sharp features
inside the crop and the backbone's features of the crop at its native size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from featsharp.evaluation.estimates import Estimate, estimate_mean
from featsharp.evaluation.features import encode_raw, predict_raw, whitened_crop
from featsharp.evaluation.images import ImageTask
from featsharp.evaluation.runner import Row, Run, Subject, Summary
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.settings import setting


class ZoomMeter:
    """Meter of the zoom cosine of one encoder over images.

    Args:
        encoder: In eval mode.
        crops: Random crops per image; they start at whole tokens.
        seed: Of the crops; the same seed gives every encoder the same crops.
    """

    def __init__(self, encoder: SharpEncoder, *, crops: int = 4, seed: int = 0) -> None:
        self.encoder, self.crops, self.seed = encoder, crops, seed
        self._cosines: list[float] = []

    def add(self, image: Image) -> None:
        """Measure one RGB picture."""
        self._cosines.append(self.measure(image, len(self._cosines)))

    @torch.inference_mode()
    def measure(self, image: Image, number: int) -> float:
        """Compute the zoom cosine of one RGB picture; ``number`` seeds its crops."""
        encoder, backbone = self.encoder, self.encoder.backbone
        native, patch = backbone.input_size, backbone.patch_size
        whitened = whitened_crop(encoder, image, (2 * native[0], 2 * native[1]))
        grid = backbone.grid_size(native)
        features = predict_raw(encoder, whitened, native)
        features = _to_cells(features, (2 * grid[0], 2 * grid[1]))  # one per token of the doubled image
        rng = np.random.default_rng((self.seed, number))
        starts = [(int(rng.integers(grid[0] + 1)), int(rng.integers(grid[1] + 1))) for _ in range(self.crops)]
        crops = torch.cat(
            [whitened[..., y * patch : y * patch + native[0], x * patch : x * patch + native[1]] for y, x in starts]
        )
        targets = encode_raw(encoder, crops)
        predictions = torch.cat([features[..., y : y + grid[0], x : x + grid[1]] for y, x in starts])
        return F.cosine_similarity(predictions, targets, dim=1).mean().item()

    def result(self) -> Estimate:
        """Estimate the mean over the images so far."""
        return estimate_mean(self._cosines)


def _to_cells(features: Tensor, cells: tuple[int, int]) -> Tensor:
    """Resample a map to another grid: average or repeat where the cells of one grid divide those of the other."""
    size = size_of(features)
    if all(n % m == 0 for n, m in zip(size, cells, strict=True)):
        return F.adaptive_avg_pool2d(features, cells)
    if all(m % n == 0 for n, m in zip(size, cells, strict=True)):
        return F.interpolate(features, cells, mode="nearest")
    return resize(features, cells)


@dataclass
class ZoomTask(ImageTask):
    """Zoom cosine."""

    name: ClassVar[str] = "zoom"

    crops: int = setting(4, "crops per image", type="count", metavar="N")

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> ZoomMeter:
        return ZoomMeter(encoder, crops=self.crops, seed=self.seed)

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, head: ZoomMeter) -> Row:
        return {"zoom_cosine": head.measure(image, number)}

    def score(self, rows: Sequence[Row], head: ZoomMeter) -> Summary:
        return {"zoom_cosine": estimate_mean([row["zoom_cosine"] for row in rows])}
