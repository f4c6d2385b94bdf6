"""Class activation maps: do they lie on what the class is recognised by, and on the object?

A linear classifier of averaged features, w_c . mean of f(x) + b_c, is trained on the backbone's features of all
pictures that are measured (the question is where a class is seen, not how well it is told), by logistic loss, one yes
or no per class. Its class activation map is w_c . f(x) (arXiv 1512.04150), which for such a head is Grad-CAM (arXiv
1610.02391) times the number of cells; as there, what is negative becomes 0, and the largest value 1. All encoders of a
backbone share the classifier: those of sharp maps are asked without any training. How well classes are told at all is
``classifier_map``: the mean over classes of two pictures or more of the average precision on pictures that were left
out of the fit, a fifth at a time; ``classifier_map_seen`` is that of the classifier on the pictures that it was fitted
to.

Of each picture, for the class that covers most of it, with y the classifier's probability:

    average_drop          max(0, y - y') / y, with y' of the picture times its map (Grad-CAM++, arXiv 1710.11063)
    average_increase      whether y' > y
    deletion, insertion   area under y while the pixels of the largest values are replaced by the mean colour first, or
                          alone come back (arXiv 1806.07421): the lower and the higher, the better

For every class of the picture, as their mean:

    pointing              whether the largest value is in a box of the class, or 15 pixels beside it (arXiv 1608.00507);
                          pointing_chance is the share of the picture that would count
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import DataError, InputError
from featsharp.evaluation.estimates import estimate_mean
from featsharp.evaluation.features import encode_raw, sharp_features, whitened_picture
from featsharp.evaluation.objects import ObjectTask, mask_box
from featsharp.evaluation.runner import Item, Row, Run, Subject, Summary
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize
from featsharp.settings import setting
from featsharp.terminal import with_progress

# Pixels beside a box that count as inside, in a picture as it is stored.
MARGIN = 15
# Of the classifier: updates of L-BFGS, and the weight of the squared weights in its loss.
_UPDATES, _DECAY = 100, 1e-4
# Parts of the pictures, each of which is left out once.
_PARTS = 5


class Classifier(NamedTuple):
    """A linear classifier of features: numbers of its classes, weights [K, C] and biases [K], mAP left out and seen."""

    classes: list[int]
    weight: Tensor
    bias: Tensor
    precision: dict[str, float]

    def __call__(self, features: Tensor) -> Tensor:
        """Compute the probabilities [B, K] of maps [B, C, h, w]."""
        return (features.mean((2, 3)) @ self.weight.T + self.bias).sigmoid()


@dataclass
class CamTask(ObjectTask):
    """Class activation maps of a linear classifier: average drop and increase, deletion, insertion, pointing."""

    name: ClassVar[str] = "cam"

    steps: int = setting(10, "of deletion and insertion", type="count", metavar="N")

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> Classifier:
        vectors, present = [], []
        for item in with_progress(list(self.items()), "features of the classifier", run.progress):
            try:
                image, objects = self.read(item)
                picture = whitened_picture(encoder, image, encoder.backbone.input_size)
                with torch.no_grad():
                    vectors.append(encode_raw(encoder, picture).mean((2, 3))[0])
            except (DataError, InputError):
                continue  # said and counted where it is measured
            present.append({one.category for one in objects})
        if not vectors:
            raise DataError(
                f"no picture of {self.data} can be used; the first problem is said by the task small-objects"
            )
        classes = sorted(set().union(*present))
        inputs = torch.stack(vectors)
        wanted = torch.tensor([[float(one in some) for one in classes] for some in present]).to(inputs)
        weight, bias = fit_classifier(inputs, wanted)
        scores = {"classifier_map": left_out_scores(inputs, wanted), "classifier_map_seen": inputs @ weight.T + bias}
        several = wanted.sum(0) > 1  # of others nothing is left to learn from
        precision = {
            name: mean_average_precision(one[:, several], wanted[:, several])
            for name, one in scores.items()
            if several.any()
        }
        return Classifier(classes, weight, bias, precision)

    def measure(self, encoder: SharpEncoder, item: Item, head: Classifier) -> Row:
        image, objects = self.read(item)
        areas = {one.category: 0 for one in objects}
        for one in objects:
            areas[one.category] += int(one.mask.sum())
        category = max(areas, key=lambda one: areas[one])
        number = head.classes.index(category)
        features = sharp_features(encoder, image, self.low_res_size)
        cam = class_map(features, head.weight[number])
        size = encoder.backbone.input_size
        picture = whitened_picture(encoder, image, size)

        def probability(pictures: Tensor) -> Tensor:
            return head(encode_raw(encoder, pictures))[:, number]

        shown = resize(cam[None, None], size)[0, 0]
        # Whitened pictures have the mean colour at 0.
        full, explained = probability(torch.cat([picture, picture * shown])).tolist()
        deletion, insertion = (
            float(torch.trapezoid(probability(series), dx=1 / self.steps))
            for series in remove(picture, shown, self.steps)
        )
        points = []
        for present in areas:
            boxes = [mask_box(one.mask) for one in objects if one.category == present]
            of_class = class_map(features, head.weight[head.classes.index(present)])
            points.append(point_at(of_class, boxes, image.size))
        pointing, chance = np.mean(points, axis=0).tolist()
        return {
            "average_drop": max(0.0, full - explained) / max(full, 1e-12),
            "average_increase": float(explained > full),
            "deletion": deletion,
            "insertion": insertion,
            "pointing": pointing,
            "pointing_chance": chance,
        }

    def score(self, rows: Sequence[Row], head: Classifier) -> Summary:
        estimates = {name: estimate_mean([row[name] for row in rows]) for name in rows[0]}
        return {**estimates, **head.precision, "classes": len(head.classes)}

    def head_key(self, head: Classifier) -> object:
        return [head.classes, head.weight.double().sum().item(), head.bias.double().sum().item()]


def class_map(features: Tensor, weight: Tensor) -> Tensor:
    """Compute the map of a class [h, w], 0 to 1, from features [1, C, h, w] and the weights of its score [C]."""
    cam = torch.einsum("chw,c->hw", features[0], weight).relu()
    return cam / cam.max().clamp(min=1e-12)


def point_at(cam: Tensor, boxes: Sequence[np.ndarray], size: tuple[int, int]) -> tuple[float, float]:
    """Return whether the largest value of a map [h, w] is in a box, or beside it, and the share of the picture that is.

    Args:
        cam: Of the whole picture.
        boxes: (top, bottom, left, right) in pixels.
        size: (W, H) of the picture.
    """
    counted = np.zeros(size[::-1], dtype=bool)
    for top, bottom, left, right in boxes:
        counted[max(0, top - MARGIN) : bottom + MARGIN, max(0, left - MARGIN) : right + MARGIN] = True
    place = np.unravel_index(int(cam.argmax()), cam.shape)
    y, x = (
        int((at + 0.5) * (pixels / cells)) for at, pixels, cells in zip(place, counted.shape, cam.shape, strict=True)
    )
    return float(counted[y, x]), float(counted.mean())


def left_out_scores(vectors: Tensor, wanted: Tensor) -> Tensor:
    """Score every picture [N, K] by a classifier of :func:`fit_classifier` that was fitted without it."""
    scores = torch.zeros_like(wanted)
    part = torch.arange(len(vectors), device=vectors.device) % _PARTS
    for one in part.unique():
        if (part != one).any():
            weight, bias = fit_classifier(vectors[part != one], wanted[part != one])
            scores[part == one] = vectors[part == one] @ weight.T + bias
    return scores


def mean_average_precision(scores: Tensor, wanted: Tensor) -> float:
    """Average over classes the precision at each picture of the class, of scores and answers [N, K]."""
    ranked = wanted.gather(0, scores.argsort(dim=0, descending=True, stable=True))
    places = torch.arange(1, len(wanted) + 1, device=wanted.device)[:, None]
    return float(((ranked.cumsum(0) / places * ranked).sum(0) / ranked.sum(0)).mean())


def remove(picture: Tensor, cam: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Make a picture [1, 3, h, w] without its pixels of the largest values of a map [h, w], and with these alone.

    Returns:
        Both [steps + 1, 3, h, w]: with shares 0, 1 / steps ... 1 of all pixels.
    """
    rank = cam.flatten().argsort(descending=True, stable=True).argsort().view(cam.shape)
    counts = (torch.arange(steps + 1, device=cam.device) * cam.numel() / steps).round()
    chosen = (rank < counts[:, None, None])[:, None]
    return picture * ~chosen, picture * chosen


@torch.enable_grad()
def fit_classifier(vectors: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Fit weights [K, C] and biases [K] to features [N, C] and answers [N, K], 0 or 1, by logistic loss."""
    mean, deviation = vectors.mean(0), vectors.std(0, correction=0)
    # Channels that hardly vary would count as much as others by their rounding errors.
    deviation = deviation.clamp(min=max(1e-2 * deviation.max().item(), 1e-12))
    inputs = (vectors - mean) / deviation
    weight = torch.zeros(wanted.shape[1], vectors.shape[1], device=vectors.device, requires_grad=True)
    bias = torch.zeros(wanted.shape[1], device=vectors.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_UPDATES, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = F.binary_cross_entropy_with_logits(inputs @ weight.T + bias, wanted) + _DECAY * weight.square().sum()
        error.backward()
        return error

    optimizer.step(loss)
    # On features as they are.
    fitted = weight.detach() / deviation
    return fitted, bias.detach() - fitted @ mean
