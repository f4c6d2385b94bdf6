"""A detector on frozen features: a simple feature pyramid and a dense head without anchors.

The pyramid makes three levels of one map, as ViTDet's does (Li et al. 2022), but learns nothing: every map is brought
to the grid of the finest level and pooled. With transposed convolutions the detector of a small map would have learned
upsampling of its own, that of a large one none, and their difference would be part of every gain. The head says at each
point of each level the class, how well its box fits, and the box (Tian et al. 2019, FCOS; the fit takes the place of
centreness, and boxes are centre and size, so that an object smaller than a cell has one as well). The mask head is that
of Mask R-CNN (He et al. 2017) at the boxes that were found. Nothing but torch is needed.

B pictures, K classes, N points of all levels. Boxes are (left, top, right, bottom) in fractions of the picture, so they
do not depend on its size.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.evaluation.head import Schedule
from featsharp.ops.resize import resize, size_of
from featsharp.terminal import with_progress

# Cells of a level per token of the low-resolution map and side. The picture that is shown is twice as wide as that of
# the low-resolution pass, so that strides are 8, 16 and 32 pixels for patches of 16.
LEVELS = (4, 2, 1)
# Half of the longer side of the objects of a level, in cells of the finest one: FCOS's 64 and 128 pixels at stride 8.
LIMITS = (0.0, 8.0, 16.0, math.inf)
# Points of an object: this far from its centre at most, in cells.
RADIUS = 1.5
# Side in cells of a box before training.
SIDE = 4.0
# Cells of the features that a mask is made of; the mask has twice as many.
MASK_CELLS = 14

# Of detections: least score, candidates before suppression, largest overlap with a better one, most of a picture.
LEAST_SCORE, CANDIDATES, OVERLAP, MOST = 0.01, 400, 0.6, 100


class Objects(NamedTuple):
    """The objects of a picture.

    Attributes:
        boxes: [n, 4].
        classes: [n] int64, from 0.
        masks: [n, 28, 28], share of each cell of the box that the object covers; None where there are none.
    """

    boxes: Tensor
    classes: Tensor
    masks: Tensor | None = None

    def to(self, device: torch.device) -> "Objects":
        """Move to a device."""
        masks = None if self.masks is None else self.masks.to(device)
        return Objects(self.boxes.to(device), self.classes.to(device), masks)


class Detections(NamedTuple):
    """Objects found in a picture, the best first.

    Attributes:
        boxes: [n, 4].
        classes: [n] int64.
        scores: [n].
        masks: [n, 28, 28], probability that a cell of the box is of the object; None without a mask head.
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    masks: Tensor | None = None


class Points(NamedTuple):
    """The points of all levels: centres of cells [N, 2] (x, y), sizes of cells [N, 2], numbers of levels [N]."""

    centres: Tensor
    strides: Tensor
    levels: Tensor


class Detector(nn.Module):
    """Detector from features [B, channels, h, w].

    Args:
        channels: Of the features, of any number of cells.
        classes: K.
        masks: Whether there is a mask head.
        width: Channels of all convolutions.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int, classes: int, *, masks: bool = False, width: int = 64) -> None:
        super().__init__()
        self.classes = classes
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.reduce = _conv(channels, width, 1)
        self.tower = nn.Sequential(*(_conv(width, width, 3) for _ in range(2)))
        self.predict = nn.Conv2d(width, classes + 5, 3, padding=1)
        self.mask = _mask_head(width) if masks else None
        nn.init.normal_(self.predict.weight, std=0.01)
        assert self.predict.bias is not None
        nn.init.zeros_(self.predict.bias)
        nn.init.constant_(self.predict.bias[:classes], -math.log(99))  # focal loss: 1 % at first

    def forward(self, features: Tensor, grid: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
        """Compute the levels, finest first, and what is predicted at their points, [B, N, K + 5].

        Args:
            features: [B, channels, h, w].
            grid: (h, w) of the low-resolution map.
        """
        standard = (features.float() - self.mean[:, None, None]) / self.deviation[:, None, None]
        finest = resize(self.reduce(standard), (grid[0] * LEVELS[0], grid[1] * LEVELS[0]))
        levels = [F.max_pool2d(finest, LEVELS[0] // cells) for cells in LEVELS]
        outputs = [self.predict(self.tower(level)).flatten(2).mT for level in levels]
        return levels, torch.cat(outputs, 1)

    def masks_of(self, finest: Tensor, boxes: Tensor) -> Tensor:
        """Compute the logits of masks [n, 28, 28] of boxes [n, 4] in a picture with the finest level [width, h, w]."""
        assert self.mask is not None
        logits: Tensor = self.mask(crop(finest, boxes, MASK_CELLS))[:, 0]
        return logits


def make_points(levels: Sequence[Tensor]) -> Points:
    """Make the points of levels [..., h, w]."""
    centres, strides, numbers = [], [], []
    for number, level in enumerate(levels):
        height, width = size_of(level)
        x = (torch.arange(width, device=level.device) + 0.5) / width
        y = (torch.arange(height, device=level.device) + 0.5) / height
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(-1, 2)
        centres.append(grid)
        strides.append(grid.new_tensor([1 / width, 1 / height]).expand_as(grid))
        numbers.append(torch.full((len(grid),), number, device=level.device))
    return Points(torch.cat(centres), torch.cat(strides), torch.cat(numbers))


def assign(points: Points, boxes: Tensor) -> Tensor:
    """Assign points to boxes [n, 4]: the number of the box of each point, [N] int64; -1 for none.

    A box belongs to the level of its size, and there to the points inside it near its centre, to that of the centre in
    any case. Of several boxes the smallest has the point.
    """
    if not len(boxes):
        return torch.full_like(points.levels, -1)
    middle, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    finest = points.strides[0]
    limits = torch.tensor(LIMITS, device=boxes.device)
    level = torch.bucketize((sides / finest).amax(1) / 2, limits[1:-1], right=True)
    away = (points.centres[:, None] - middle).abs()  # [N, n, 2]
    near, nearest = (away <= RADIUS * points.strides[:, None]), (away <= 0.5 * points.strides[:, None])
    inside = away <= sides / 2
    fits = (near & (inside | nearest)).all(2) & (points.levels[:, None] == level)
    areas = torch.where(fits, sides.prod(1), math.inf)
    smallest, index = areas.min(1)
    return torch.where(smallest.isfinite(), index, -1)


def decode(points: Points, outputs: Tensor) -> Tensor:
    """Compute boxes [..., N, 4] of the last four outputs at all points, [..., N, 4]."""
    middle = points.centres + outputs[..., :2] * points.strides
    half = outputs[..., 2:].clamp(max=4).exp() * (SIDE / 2) * points.strides
    return torch.cat([middle - half, middle + half], -1)


def detection_loss(detector: Detector, points: Points, outputs: Tensor, objects: Sequence[Objects]) -> Tensor:
    """Compute the loss of ``outputs`` [B, N, K + 5]: focal for classes, generalised IoU for boxes, their fit."""
    classes = detector.classes
    owner = torch.stack([assign(points, one.boxes) for one in objects])  # [B, N]
    positive = owner >= 0
    picture = positive.nonzero()[:, 0]
    starts = torch.tensor([0, *(len(one.boxes) for one in objects)], device=outputs.device).cumsum(0)
    chosen = owner[positive] + starts[picture]
    truth, names = (
        torch.cat([one.boxes for one in objects])[chosen],
        torch.cat([one.classes for one in objects])[chosen],
    )
    count = max(1, len(chosen))
    wanted = torch.zeros_like(outputs[..., :classes])
    wanted[positive] = F.one_hot(names, classes).to(wanted)
    at_points = outputs[positive]
    boxes = decode(points, outputs[..., classes + 1 :])[positive]
    overlap, generalised = iou(boxes, truth)
    fit = F.binary_cross_entropy_with_logits(at_points[:, classes], overlap.detach(), reduction="sum")
    return (focal_loss(outputs[..., :classes], wanted) + 2 * (1 - generalised).sum() + fit) / count


def focal_loss(logits: Tensor, wanted: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute the sum of the focal loss (Lin et al. 2017) of logits against ``wanted``, 0 or 1, of the same shape."""
    error = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    share = torch.where(wanted > 0, alpha, 1 - alpha)
    return (share * (logits.sigmoid() - wanted).abs() ** gamma * error).sum()


def iou(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the overlap of boxes [..., 4], pair by pair: intersection over union, and the generalised one."""
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    union = _area(first) + _area(second) - common
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    around = hull.prod(-1).clamp(min=1e-12)
    overlap = common / union.clamp(min=1e-12)
    return overlap, overlap - (around - union) / around


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, most: int = MOST) -> Tensor:
    """Find the numbers of the boxes [n, 4] that no better one of the same class overlaps much, the best first."""
    order = scores.argsort(descending=True, stable=True)
    boxes, classes = boxes[order], classes[order]
    covers = (iou(boxes[:, None], boxes[None])[0] > OVERLAP) & (classes[:, None] == classes[None])
    keep = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for number in range(len(boxes)):
        if keep[number]:
            keep[number + 1 :] &= ~covers[number, number + 1 :]
    return order[keep][:most]


def detect(detector: Detector, features: Tensor, grid: tuple[int, int]) -> Detections:
    """Detect the objects of one picture with features [C, h, w] and the low-resolution grid (h, w)."""
    levels, outputs = detector(features[None], grid)
    classes = detector.classes
    scores = (outputs[0, :, :classes].sigmoid() * outputs[0, :, classes : classes + 1].sigmoid()).sqrt().flatten()
    best, index = scores.topk(min(CANDIDATES, len(scores)))
    index = index[best > LEAST_SCORE]
    point, name = index // classes, index % classes
    boxes = decode(make_points(levels), outputs[0, :, classes + 1 :])[point].clamp(0, 1)
    kept = suppress(boxes, scores[index], name)
    masks = None if detector.mask is None else detector.masks_of(levels[0][0], boxes[kept]).sigmoid()
    return Detections(boxes[kept], name[kept], scores[index][kept], masks)


def crop(values: Tensor, boxes: Tensor, cells: int) -> Tensor:
    """Sample a map [C, h, w] at the centres of ``cells`` x ``cells`` cells of each box [n, 4]: [n, C, cells, cells]."""
    steps = (torch.arange(cells, device=boxes.device) + 0.5) / cells
    x = boxes[:, 0, None] + steps * (boxes[:, 2] - boxes[:, 0])[:, None]
    y = boxes[:, 1, None] + steps * (boxes[:, 3] - boxes[:, 1])[:, None]
    grid = torch.stack([x[:, None].expand(-1, cells, -1), y[:, :, None].expand(-1, -1, cells)], -1) * 2 - 1
    # All boxes in one tall grid: the map is not copied for each.
    sampled = F.grid_sample(values[None], grid.view(1, -1, cells, 2), padding_mode="border", align_corners=False)
    return sampled[0].unflatten(1, (-1, cells)).transpose(0, 1)


def fit_detector(
    features: Callable[[int], Tensor],
    objects: Sequence[Objects],
    detector: Detector,
    grid: tuple[int, int],
    schedule: Schedule,
    device: torch.device,
    *,
    progress: bool = False,
) -> Detector:
    """Train a detector in place.

    Args:
        features: Number of a picture -> [C, h, w], any floating point type, on any device; the same size for all.
        objects: Of all pictures.
        detector: Not trained yet.
        grid: (h, w) of the low-resolution map.
        schedule: Of the training.
        device: To train on.
        progress: Whether to show a bar on stderr.

    Returns:
        The detector on ``device``, in eval mode, without gradients.
    """
    first = torch.stack([features(number).float() for number in range(min(100, len(objects)))])
    detector.mean.copy_(first.mean((0, 2, 3)))
    detector.deviation.copy_(first.std((0, 2, 3)).clamp(min=1e-6))
    del first
    detector = detector.to(device).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=schedule.learning_rate, weight_decay=1e-4)
    batches = list(schedule.batches(len(objects)))
    for step, batch in enumerate(with_progress(batches, "training of the detector", progress)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.rate(step)
        truth = [objects[number].to(device) for number in batch]
        levels, outputs = detector(torch.stack([features(number) for number in batch]).to(device), grid)
        loss = detection_loss(detector, make_points(levels), outputs, truth)
        if detector.mask is not None:
            loss = loss + _mask_loss(detector, levels[0], truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
    return detector.eval().requires_grad_(False)


def _mask_loss(detector: Detector, finest: Tensor, objects: Sequence[Objects]) -> Tensor:
    """Average the cross-entropy of the masks of all true boxes; 0 without any."""
    pairs = [
        (detector.masks_of(level, one.boxes), one.masks)
        for level, one in zip(finest, objects, strict=True)
        if one.masks is not None and len(one.boxes)
    ]
    if not pairs:
        return finest.sum() * 0
    logits, masks = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return F.binary_cross_entropy_with_logits(logits, masks)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def _norm(width: int) -> nn.Module:
    return nn.GroupNorm(8, width)


def _conv(channels: int, width: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, _norm(width), nn.ReLU())


def _mask_head(width: int) -> nn.Sequential:
    larger = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), nn.ReLU())
    return nn.Sequential(_conv(width, width, 3), _conv(width, width, 3), larger, nn.Conv2d(width, 1, 1))
