"""Small objects: classification of objects by the features inside their outline.

The features of each object are averaged over its pixels and classified by the nearest class mean (Mensink et al. 2013),
the means taken over the objects of all other images. Nothing is trained, so the result depends on the features alone.
Accuracy is by size with COCO's limits on the area in pixels of the original image. This is no detection, as outlines
are given.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import DataError
from featsharp.evaluation.estimates import estimate_ratio
from featsharp.evaluation.features import sharp_features
from featsharp.evaluation.objects import ObjectTask
from featsharp.evaluation.runner import Item, Row, Summary
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of

# Areas in pixels from the first number up to the second, COCO's.
SIZES = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, float("inf")),
    "all": (0.0, float("inf")),
}


@dataclass
class SmallObjectTask(ObjectTask):
    """Accuracy of classifying objects by the features inside their outline, by size."""

    name: ClassVar[str] = "small-objects"

    def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
        image, objects = self.read(item)
        features = sharp_features(encoder, image, self.low_res_size)[0]
        masks = torch.from_numpy(np.stack([one.mask for one in objects])).to(features)
        vectors = F.normalize(pool_masks(features, masks), dim=1)
        return {
            "objects": len(objects),
            "_categories": [one.category for one in objects],
            "_areas": [one.area for one in objects],
            "_vectors": _pack(vectors),
        }

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        image = np.repeat(np.arange(len(rows)), [row["objects"] for row in rows])
        category = np.concatenate([row["_categories"] for row in rows])
        area = np.concatenate([row["_areas"] for row in rows])
        predicted = nearest_other_mean(np.concatenate([_unpack(row) for row in rows]), category, image)
        possible = predicted != IMPOSSIBLE
        if not possible.any():
            raise DataError(f"no class of {self.labels} is in more than one image: there is nothing to learn from")
        summary: Summary = {}
        for size, (low, high) in SIZES.items():
            chosen = possible & (low <= area) & (area < high)
            if chosen.any():
                right = np.bincount(image, chosen & (predicted == category), len(rows))
                total = np.bincount(image, chosen, len(rows))
                summary[f"accuracy_{size}"] = estimate_ratio(right, total)
            summary[f"objects_{size}"] = int(chosen.sum())
        summary["left_out"] = int((~possible).sum())
        summary["chance"] = 1 / len(np.unique(category))
        return summary


# Result of nearest_other_mean where no other image has the class.
IMPOSSIBLE = -1


def nearest_other_mean(vectors: np.ndarray, category: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Classify each vector by the nearest mean of a class, taken over the vectors of all other images.

    Args:
        vectors: [n, C], of length 1.
        category: [n], not negative.
        image: [n].

    Returns:
        [n], the class whose mean has the largest cosine; IMPOSSIBLE where no other image has the vector's class.
    """
    classes, label = np.unique(category, return_inverse=True)
    member = np.eye(len(classes))[label]  # [n, K]
    sums, counts = member.T @ vectors, member.sum(0)
    predicted = np.full(len(vectors), IMPOSSIBLE)
    for one in np.unique(image):
        inside = image == one
        others = counts - member[inside].sum(0)
        means = sums - member[inside].T @ vectors[inside]
        means = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        scores = np.where(others > 0, vectors[inside] @ means.T, -np.inf)
        predicted[inside] = np.where(others[label[inside]] > 0, classes[scores.argmax(1)], IMPOSSIBLE)
    return predicted


def pool_masks(features: Tensor, masks: Tensor) -> Tensor:
    """Average features [C, h, w], bilinearly enlarged to the picture, over the pixels of masks [n, H, W]: [n, C].

    Masks have the type of the features, 1 inside; none is empty.
    """
    # Enlarging is linear along each axis: its transpose spreads a mask over the cells, without a large map.
    rows, columns = (
        _enlarging(cells, pixels, features) for cells, pixels in zip(size_of(features), size_of(masks), strict=True)
    )
    weights = (rows.T @ masks @ columns).flatten(1)
    return weights @ features.flatten(1).T / weights.sum(1, keepdim=True)


def _enlarging(cells: int, pixels: int, like: Tensor) -> Tensor:
    """Compute the weights [pixels, cells] of the cells of a line in each pixel of the enlarged line."""
    unit = torch.eye(cells, dtype=like.dtype, device=like.device)
    return resize(unit[None, None], (pixels, cells))[0, 0]


def _pack(vectors: Tensor) -> str:
    """Encode [n, C] as text: a journal of lists of numbers would be ten times as long."""
    return base64.b64encode(vectors.half().cpu().numpy().tobytes()).decode()


def _unpack(row: Row) -> np.ndarray:
    """Invert :func:`_pack`: [n, C] float64."""
    numbers = np.frombuffer(base64.b64decode(row["_vectors"]), dtype=np.float16)
    return numbers.reshape(row["objects"], -1).astype(np.float64)
