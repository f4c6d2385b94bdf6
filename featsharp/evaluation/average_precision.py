"""Average precision by COCO's rules, as the package faster-coco-eval computes it, with intervals over pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from featsharp.errors import DataError, MissingDependencyError
from featsharp.evaluation.estimates import bootstrap_draws, estimate_from
from featsharp.evaluation.runner import Row, Summary

# By name: thresholds of overlap (0.5 to 0.95), range of areas (all, small, medium, large) of faster-coco-eval's result.
METRICS: dict[str, tuple[slice, int]] = {
    "ap": (slice(None), 0),
    "ap50": (slice(0, 1), 0),
    "ap75": (slice(5, 6), 0),
    "ap_small": (slice(None), 1),
    "ap_medium": (slice(None), 2),
    "ap_large": (slice(None), 3),
}
# Detections that count in a picture.
MOST = 100


def score_detections(rows: Sequence[Row], names: Mapping[int, str], *, kind: str = "bbox") -> Summary:
    """Score the detections of all pictures.

    Args:
        rows: "size" (H, W) of each picture; "_truth", its annotations; and "_found", its detections, in COCO's form
            without "id" and "image_id".
        names: Of categories by number, where they are known.
        kind: "bbox", or "segm" for masks.

    Returns:
        :data:`METRICS`, from 0 to 1, where there are objects of the size; "by_class", the average precision of each
        category; "draws" [resamples] of each metric.

    Raises:
        DataError: Without any object.
        MissingDependencyError: Without faster-coco-eval.
    """
    evaluator = _match(rows, kind)
    categories = evaluator.params.catIds
    # Of a category and a range of areas all pictures lie side by side.
    matches = np.array(evaluator._evalImgs_cpp, dtype=object).reshape(-1, len(rows))

    def measure(chosen: np.ndarray) -> list[float]:
        evaluator._evalImgs_cpp = matches[:, chosen].ravel().tolist()
        evaluator.accumulate()
        precision = evaluator.eval["precision"]
        return [_mean(precision[thresholds, :, :, size]) for thresholds, size in METRICS.values()]

    draws = bootstrap_draws(len(rows), measure)
    values = measure(np.arange(len(rows)))
    precision = evaluator.eval["precision"][:, :, :, 0]
    present = {name: (value, draws[:, i]) for i, (name, value) in enumerate(zip(METRICS, values, strict=True))}
    present = {name: pair for name, pair in present.items() if not np.isnan(pair[0])}
    by_class = {names.get(c, str(c)): _mean(precision[:, :, k]) for k, c in enumerate(categories)}
    return {
        **{name: estimate_from(value, of_name) for name, (value, of_name) in present.items()},
        "by_class": {name: value for name, value in by_class.items() if not np.isnan(value)},
        "draws": {
            name: [None if np.isnan(draw) else round(draw, 5) for draw in of_name]
            for name, (_, of_name) in present.items()
        },
    }


def _match(rows: Sequence[Row], kind: str) -> Any:
    """Match the detections of each picture to its objects."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise MissingDependencyError(
            "average precision needs the package faster-coco-eval: pip install 'featsharp[eval]'"
        ) from error
    truth = [one | {"image_id": number} for number, row in enumerate(rows) for one in row["_truth"]]
    found = [one | {"image_id": number} for number, row in enumerate(rows) for one in row["_found"]]
    if kind == "segm":  # the sizes of detections are then those of their masks
        found = [{name: value for name, value in one.items() if name != "bbox"} for one in found]
    if all(one["iscrowd"] for one in truth):
        raise DataError(f"the {len(rows)} pictures that were measured have no objects; measure more of them (--limit)")
    content = {
        "images": [{"id": n, "height": row["size"][0], "width": row["size"][1]} for n, row in enumerate(rows)],
        "annotations": [one | {"id": number} for number, one in enumerate(truth, 1)],
        "categories": [{"id": one, "name": str(one)} for one in sorted({one["category_id"] for one in truth})],
    }
    quiet = lambda *text: None  # noqa: E731
    known = COCO(content, print_function=quiet)
    result = known.loadRes(found)
    evaluator = COCOeval_faster(known, result, kind, print_function=quiet, separate_eval=True)
    evaluator.params.maxDets = [MOST]
    evaluator.evaluate()
    return evaluator


def _mean(precision: np.ndarray) -> float:
    """Average a precision over all but those of -1, which stand for categories without an object; NaN without any."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")
