"""The detector's parts against plain loops and formulas, on odd and non-square sizes."""

import itertools
import math

import numpy as np
import pytest
import torch

from featsharp.evaluation.detector import (
    LIMITS,
    OVERLAP,
    RADIUS,
    Detector,
    Objects,
    assign,
    crop,
    decode,
    detect,
    detection_loss,
    fit_detector,
    focal_loss,
    iou,
    make_points,
    suppress,
)
from featsharp.evaluation.head import Schedule


def points_of(grid: tuple[int, int]):
    return make_points([torch.empty(1, 1, grid[0] * cells, grid[1] * cells) for cells in (4, 2, 1)])


def random_boxes(count: int, seed: int = 0, most: int = 20) -> torch.Tensor:
    """Boxes on a raster of ``most`` cells, none empty."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, most - 2, (count, 2))
    high = rng.integers(low + 1, most)
    return torch.from_numpy(np.concatenate([low, high], 1)).float()


def test_maps_of_all_factors_go_through_the_same_layers():
    detector = Detector(5, 3, width=8)
    small = torch.randn(2, 5, 3, 5)
    for factor in (1, 2, 3, 4, 8):
        levels, outputs = detector(torch.randn(2, 5, 3 * factor, 5 * factor), (3, 5))
        assert [level.shape for level in levels] == [(2, 8, 12, 20), (2, 8, 6, 10), (2, 8, 3, 5)]
        assert outputs.shape == (2, 12 * 20 + 6 * 10 + 15, 3 + 5)
    # The same content on more cells is the same to it.
    finer = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(detector(finer, (3, 5))[0][2], detector.reduce(small), atol=1e-4, rtol=1e-4)


def test_points_are_the_centres_of_cells():
    points = points_of((2, 3))
    assert points.centres[0].tolist() == pytest.approx([1 / 24, 1 / 16])
    assert points.centres[12].tolist() == pytest.approx([1 / 24, 3 / 16])
    assert points.strides[-1].tolist() == pytest.approx([1 / 3, 1 / 2])
    assert points.levels.bincount().tolist() == [96, 24, 6]


def test_points_are_assigned_as_a_loop_assigns_them():
    points = points_of((5, 7))
    boxes = torch.tensor(
        [  # the last one is smaller than a cell; no border or limit lies on a point
            [0.103, 0.107, 0.351, 0.309],
            [0.121, 0.129, 0.203, 0.257],
            [0.003, 0.005, 0.991, 0.987],
            [0.401, 0.603, 0.757, 0.911],
            [0.613, 0.111, 0.618, 0.116],
        ]
    )
    outcome = assign(points, boxes).tolist()
    finest = points.strides[0].tolist()
    for number, ((x, y), stride, level) in enumerate(zip(*(part.tolist() for part in points), strict=True)):
        best, least = -1, math.inf
        for index, (left, top, right, bottom) in enumerate(boxes.tolist()):
            half = max((right - left) / finest[0], (bottom - top) / finest[1]) / 2
            away = abs(x - (left + right) / 2), abs(y - (top + bottom) / 2)
            within = all(d <= RADIUS * s for d, s in zip(away, stride, strict=True))
            holds_centre = all(d <= 0.5 * s for d, s in zip(away, stride, strict=True))
            inside = left <= x <= right and top <= y <= bottom
            area = (right - left) * (bottom - top)
            if LIMITS[level] <= half < LIMITS[level + 1] and within and (inside or holds_centre) and area < least:
                best, least = index, area
        assert outcome[number] == best
    assert set(outcome) == {-1, 0, 1, 2, 3, 4}
    assert (assign(points, boxes[:0]) == -1).all()


def test_boxes_that_are_predicted_are_decoded():
    points = points_of((3, 4))
    outputs = torch.zeros(len(points.levels), 4)
    outputs[5] = torch.tensor([0.5, -0.25, math.log(2), math.log(0.5)])
    box = decode(points, outputs)[5]
    (x, y), (width, height) = points.centres[5], points.strides[5]
    x, y = x + 0.5 * width, y - 0.25 * height
    # Before training a box has four cells.
    expected = torch.stack([x - 4 * width, y - height, x + 4 * width, y + height])
    torch.testing.assert_close(box, expected)


def test_overlap_is_that_of_counted_cells():
    first, second = random_boxes(40), random_boxes(40, 1)
    overlap, generalised = iou(first, second)
    for index in range(40):
        cells = []
        for left, top, right, bottom in (first[index].int().tolist(), second[index].int().tolist()):
            cells.append(set(itertools.product(range(left, right), range(top, bottom))))
        union, common = len(cells[0] | cells[1]), len(cells[0] & cells[1])
        both = np.array(sorted(cells[0] | cells[1]))
        hull = np.prod(both.max(0) - both.min(0) + 1)
        assert overlap[index].item() == pytest.approx(common / union)
        assert generalised[index].item() == pytest.approx(common / union - (hull - union) / hull)


def test_suppression_is_greedy_within_a_class():
    boxes, scores = random_boxes(60, most=8), torch.rand(60)
    classes = torch.arange(60) % 2
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        rivals = [other for other in kept if classes[other] == classes[index]]
        if all(iou(boxes[index], boxes[other])[0] <= OVERLAP for other in rivals):
            kept.append(index)
    assert len(kept) < 60
    assert suppress(boxes, scores, classes).tolist() == kept
    assert suppress(boxes, scores, classes, 5).tolist() == kept[:5]
    assert suppress(boxes[:0], scores[:0], classes[:0]).tolist() == []


def test_the_focal_loss_is_its_formula():
    logits, wanted = torch.randn(6, 5, dtype=torch.float64), (torch.rand(6, 5) > 0.7).double()
    total = 0.0
    for logit, one in zip(logits.flatten().tolist(), wanted.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        total -= 0.25 * (1 - p) ** 2 * math.log(p) if one else 0.75 * p**2 * math.log(1 - p)
    assert focal_loss(logits, wanted).item() == pytest.approx(total)


def test_crops_sample_the_centres_of_their_cells():
    y, x = torch.meshgrid((torch.arange(9) + 0.5) / 9, (torch.arange(13) + 0.5) / 13, indexing="ij")
    boxes = torch.tensor([[0.2, 0.3, 0.8, 0.5], [0.1, 0.1, 0.3, 0.9]])
    crops = crop(torch.stack([x, y, 2 * x - y]), boxes, 5)
    for (left, top, right, bottom), one in zip(boxes.tolist(), crops, strict=True):
        for i, j in itertools.product(range(5), range(5)):
            u, v = left + (j + 0.5) / 5 * (right - left), top + (i + 0.5) / 5 * (bottom - top)
            assert one[:, i, j].tolist() == pytest.approx([u, v, 2 * u - v], abs=1e-5)


def test_the_loss_is_least_at_the_truth():
    grid, objects = (3, 4), Objects(torch.tensor([[0.2, 0.2, 0.7, 0.6], [0.6, 0.1, 0.75, 0.3]]), torch.tensor([1, 0]))
    detector, points = Detector(4, 2, width=8), points_of(grid)
    owner = assign(points, objects.boxes)
    outputs = torch.full((1, len(owner), 7), -9.0)
    for number, one in enumerate(owner.tolist()):
        if one >= 0:
            box, name = objects.boxes[one], objects.classes[one]
            middle, sides = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
            outputs[0, number, name], outputs[0, number, 2] = 9.0, 9.0
            outputs[0, number, 3:5] = (middle - points.centres[number]) / points.strides[number]
            outputs[0, number, 5:] = (sides / points.strides[number] / 4).log()
    assert detection_loss(detector, points, outputs, [objects]) < 0.01
    swapped = outputs[:, :, [1, 0, 2, 3, 4, 5, 6]]
    moved = outputs + torch.tensor([0, 0, 0, 1.0, 0, 0, 0])
    assert detection_loss(detector, points, swapped, [objects]) > 1
    assert detection_loss(detector, points, moved, [objects]) > 0.5
    nothing = Objects(torch.empty(0, 4), torch.empty(0, dtype=torch.long))
    assert detection_loss(detector, points, torch.full_like(outputs, -9.0), [nothing]) < 0.01


def test_a_picture_is_learnt_with_its_masks():
    """The whole loop on one picture: two squares, one of them half covered by its object."""
    grid, size = (4, 6), (8, 12)
    features = torch.zeros(3, *size)
    features[0, 1:4, 1:4], features[1, 4:8, 6:12] = 3, 3
    features[2, 4:8, 9:12] = 3
    boxes = torch.tensor([[1 / 12, 1 / 8, 4 / 12, 4 / 8], [6 / 12, 4 / 8, 1.0, 1.0]])
    masks = torch.ones(2, 28, 28)
    masks[1, :, :14] = 0
    objects = Objects(boxes, torch.tensor([0, 1]), masks)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = Detector(3, 2, masks=True, width=16)
    state = torch.random.get_rng_state()
    fit_detector(lambda number: features, [objects], detector, grid, Schedule(60, 4, 1e-2), torch.device("cpu"))
    assert torch.equal(state, torch.random.get_rng_state())
    found = detect(detector, features, grid)
    assert found.masks is not None
    for index, box in enumerate(boxes):
        best = int(found.scores.where(found.classes == index, torch.tensor(-1.0)).argmax())
        assert iou(found.boxes[best], box)[0] > 0.8
        assert ((found.masks[best] > 0.5) == masks[index].bool()).float().mean() > 0.9
        assert found.scores[best] > 0.5
