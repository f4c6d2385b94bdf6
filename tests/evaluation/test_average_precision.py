"""Average precision: hand-made cases, and faster-coco-eval used in its own usual way."""

import copy
import math

import numpy as np
import pytest

pytest.importorskip("faster_coco_eval")

from faster_coco_eval import COCO, COCOeval_faster

from featsharp.errors import DataError
from featsharp.evaluation.average_precision import METRICS, score_detections


def truth(category: int, x: float, y: float, side: float, *, crowd: int = 0) -> dict:
    return {"category_id": category, "bbox": [x, y, side, side], "area": side * side, "iscrowd": crowd}


def found(category: int, x: float, y: float, side: float, score: float) -> dict:
    return {"category_id": category, "bbox": [x, y, side, side], "score": score}


def picture(objects: list[dict], detections: list[dict]) -> dict:
    return {"size": [300, 400], "_truth": objects, "_found": detections}


def random_rows(count: int = 14) -> list[dict]:
    """Objects of all sizes in three categories with a gap, some missed, some shifted, crowds, and false ones."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        objects, detections = [], []
        for side in rng.choice([12, 20, 50, 80, 120, 180], 4):
            category = int(rng.choice([2, 5, 90]))
            x, y = rng.uniform(0, 200, 2)
            objects.append(truth(category, x, y, float(side), crowd=int(rng.random() < 0.15)))
            if rng.random() < 0.7:
                dx, dy = rng.normal(0, side / 12, 2)
                detections.append(found(category, x + dx, y + dy, float(side), float(rng.random())))
        detections += [
            found(int(rng.choice([2, 5, 90])), *rng.uniform(5, 150, 3), float(rng.random())) for _ in range(3)
        ]
        rows.append(picture(objects, detections))
    return rows


def library(rows: list[dict]) -> dict[str, float]:
    """The package as it is commonly used."""
    rows = copy.deepcopy(rows)
    quiet = {"print_function": lambda *text: None}
    annotations = [one | {"image_id": n} for n, row in enumerate(rows) for one in row["_truth"]]
    content = {
        "images": [{"id": n, "height": 300, "width": 400} for n in range(len(rows))],
        "annotations": [one | {"id": n} for n, one in enumerate(annotations, 1)],
        "categories": [{"id": one, "name": str(one)} for one in (2, 5, 90)],
    }
    known = COCO(content, **quiet)
    result = known.loadRes([one | {"image_id": n} for n, row in enumerate(rows) for one in row["_found"]])
    evaluator = COCOeval_faster(known, result, "bbox", **quiet)
    evaluator.run()
    names = {"all": "ap", "50": "ap50", "75": "ap75", "small": "ap_small", "medium": "ap_medium", "large": "ap_large"}
    return {metric: evaluator.stats_as_dict[f"AP_{name}"] for name, metric in names.items()}


def test_numbers_are_those_of_the_library_and_resamples_those_of_repeated_pictures():
    rows = random_rows()
    score = score_detections(rows, {2: "cat"})
    for metric, value in library(rows).items():
        assert score[metric].value == pytest.approx(value, abs=1e-12)
        assert score[metric].low <= value <= score[metric].high
    assert set(score["by_class"]) == {"cat", "5", "90"}
    assert np.mean(list(score["by_class"].values())) == pytest.approx(score["ap"].value)
    rng = np.random.default_rng(0)
    for draw in range(3):
        resampled = library([rows[index] for index in rng.integers(len(rows), size=len(rows))])
        for metric, value in resampled.items():
            assert score["draws"][metric][draw] == pytest.approx(value, abs=1e-5)


def test_perfect_detections_score_one():
    rows = random_rows()
    for row in rows:
        row["_found"] = [one | {"score": 0.5} for one in row["_truth"] if not one["iscrowd"]]
    score = score_detections(rows, {})
    for metric in METRICS:
        assert score[metric] == (1, 1, 1)


def test_nothing_found_scores_zero():
    rows = [row | {"_found": []} for row in random_rows()]
    assert all(score_detections(rows, {})[metric] == (0, 0, 0) for metric in METRICS)


def test_one_of_two_objects_is_half_the_recall():
    # A hit above a false one: precision 1 up to a recall of a half, at 51 of 101 thresholds.
    rows = [
        picture([truth(1, 10, 10, 40), truth(1, 200, 10, 40)], [found(1, 10, 10, 40, 0.9), found(1, 99, 99, 9, 0.8)])
    ]
    score = score_detections(rows, {})
    assert score["ap"].value == pytest.approx(51 / 101)
    assert "ap_small" not in score
    assert "ap_large" not in score
    # The false one first: precision a half there.
    rows[0]["_found"][1]["score"] = 0.95
    assert score_detections(rows, {})["ap"].value == pytest.approx(0.5 * 51 / 101)


def test_an_overlap_of_six_tenths_passes_three_of_ten_thresholds():
    # Intersection over union of boxes 40 wide, shifted by 10: 30 / 50. The thresholds are 0.5, 0.55, 0.6.
    rows = [picture([truth(1, 10, 10, 40)], [found(1, 20, 10, 40, 0.9)])]
    score = score_detections(rows, {})
    assert score["ap"].value == pytest.approx(0.3)
    assert score["ap50"].value == 1
    assert score["ap75"].value == 0


def test_detections_in_a_crowd_are_neither_right_nor_wrong():
    objects = [truth(1, 10, 10, 40), truth(1, 100, 100, 150, crowd=1)]
    detections = [found(1, 10, 10, 40, 0.5), found(1, 120, 120, 30, 0.9)]
    assert score_detections([picture(objects, detections)], {})["ap"].value == 1
    assert score_detections([picture(objects[:1], detections)], {})["ap"].value == pytest.approx(0.5)


def test_sizes_that_a_resample_lacks_are_left_out_of_its_interval():
    rows = [picture([truth(1, 10, 10, 12)], [found(1, 10, 10, 12, 0.5)]), picture([truth(1, 10, 10, 50)], [])]
    score = score_detections(rows, {})
    assert score["ap_small"] == (1, 1, 1)
    assert None in score["draws"]["ap_small"]
    assert not any(isinstance(draw, float) and math.isnan(draw) for draw in score["draws"]["ap_small"])


def test_pictures_without_objects_are_named():
    with pytest.raises(DataError, match="the 1 pictures that were measured have no objects"):
        score_detections([picture([], [found(1, 1, 1, 5, 0.5)])], {})
