"""Tables of the papers, with what was measured here beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from featsharp.errors import DataError
from featsharp.evaluation.estimates import Estimate, estimate_from
from featsharp.evaluation.table_2 import TABLE_2, TASKS, collect_scores, table_2
from featsharp.files import read_file
from featsharp.settings import PlainTask, Quality, setting
from featsharp.terminal import align

# Columns of average precision: metric of `featsharp eval detection` by heading.
COLUMNS = {"AP": "ap", "AP50": "ap50", "Sm": "ap_small", "Md": "ap_medium", "Lg": "ap_large"}

# FeatSharp (arXiv 2502.16025), table 1: boxes of COCO 2017, Detectron2, features at 2x: AP, small, medium, large.
TABLE_1: dict[str, dict[str, tuple[float, float, float, float] | None]] = {
    "RADIOv2.5-L": {
        "baseline": (51.38, 28.73, 56.56, 73.72),
        "bilinear": (51.61, 28.43, 56.98, 74.14),
        "SAPA": (41.44, 15.92, 45.08, 69.77),
        "ReSFU": (49.81, 26.22, 55.37, 73.55),
        "FeatUp": (46.71, 21.77, 52.01, 72.25),
        "FeatSharp": (54.83, 34.72, 59.40, 74.40),
    },
    "SigLIP2-SO400M-512": {
        "baseline": (52.66, 30.31, 57.94, 74.31),
        "bilinear": (52.69, 30.19, 57.84, 74.16),
        "SAPA": None,  # failed there: CUDA configuration error
        "ReSFU": (50.84, 28.45, 56.18, 73.69),
        "FeatUp": (47.42, 22.87, 53.17, 72.80),
        "FeatSharp": (55.93, 36.85, 61.00, 74.62),
    },
}


@dataclass
class TablesTask(PlainTask):
    """Print a table of a paper, marked as theirs, and results of `featsharp eval TASK --json`, marked as ours."""

    name: ClassVar[str] = "tables"

    table_: int = setting(1, "of FeatSharp, 1: detection, 2: distillation", type=int, choices=(1, 2))
    results: Sequence[Path] = setting(
        (), "files to set beside it; of an encoder in several (seeds) the mean", type=Path, nargs="+", metavar="F"
    )

    def run(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
        quality: Quality | None = None,
    ) -> dict[str, Any]:
        """Collect the rows: "theirs" and "ours", of table 1 by backbone, and by upsampler or encoder."""
        if self.table_ == 2:
            return {"theirs": TABLE_2, "ours": collect_scores(read_result(path, *TASKS) for path in self.results)}
        ours: dict[str, dict[str, list[Any]]] = {}
        for path in self.results:
            for label, encoder in read_result(path, "detection")[1].items():
                if "result" in encoder:
                    ours.setdefault(encoder["backbone"], {}).setdefault(label, []).append(encoder["result"])
        return {"theirs": TABLE_1, "ours": ours}

    def table(self, result: dict[str, Any]) -> list[str]:
        """Format the paper's rows and ours."""
        if self.table_ == 2:
            return table_2(result["ours"])
        lines = ["Detection, average precision in % (FeatSharp, arXiv 2502.16025, table 1).", ""]
        for backbone, rows in result["theirs"].items():
            first = next(iter(rows.values()))
            cells = [
                [name, *_paper_cells(row), "" if row is None or row is first else f"{row[1] - first[1]:+.2f}"]
                for name, row in rows.items()
            ]
            lines += [f"theirs: {backbone}, COCO 2017", *align(["upsampler", *COLUMNS, "gain Sm"], cells), ""]
        for backbone, encoders in result["ours"].items():
            lines += [f"ours: {backbone}, 95 % intervals over pictures", *detection_table(encoders), ""]
        return lines[:-1]


def detection_table(encoders: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Format average precision in per cent and the gain for small objects over :func:`find_reference`.

    Args:
        encoders: Results of the task ``detection`` as JSON by encoder, one for each seed.
    """
    pooled = {label: pool_seeds(results) for label, results in encoders.items()}
    if not pooled:
        return []
    reference = find_reference({label: results[0].get("factor") for label, results in encoders.items()})
    seeds = any(len(results) > 1 for results in encoders.values())
    rows = []
    for label, metrics in pooled.items():
        cells = [_format(estimate_from(*metrics[name])) if name in metrics else "-" for name in COLUMNS.values()]
        gain = "" if label == reference else _gain(metrics, pooled[reference], "ap_small")
        rows.append([label, *([str(len(encoders[label]))] if seeds else []), *cells, gain])
    return align(["encoder", *(["seeds"] if seeds else []), *COLUMNS, f"gain Sm over {reference}"], rows)


def find_reference(factors: Mapping[str, float | None]) -> str:
    """Return the label that gains are over: the first of factor 1, the backbone itself; without one the first."""
    return next((label for label, factor in factors.items() if factor == 1), next(iter(factors)))


def pool_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, np.ndarray]]:
    """Average the metrics of several seeds, which saw the same pictures: value and draws of each."""
    known = set.intersection(*(set(result["draws"]) for result in results))
    return {
        name: (
            float(np.mean([result[name]["value"] for result in results])),
            np.mean([np.array(result["draws"][name], dtype=np.float64) for result in results], axis=0),
        )
        for name in known
    }


def read_result(path: Path, *tasks: str) -> tuple[str, dict[str, Any]]:
    """Read a result of ``featsharp eval TASK --json``: the task, one of ``tasks``, and its encoders.

    Raises:
        DataError: For another file.
    """
    expected = " or ".join(tasks)
    try:
        content = json.loads(read_file(path))
        if content["task"] not in tasks:
            raise DataError(f"{path.name} is a result of the task {content['task']}; expected one of {expected}")
        return content["task"], dict(content["encoders"])
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path.name} is no result of featsharp eval {expected} --json ({error})") from error


def _gain(metrics: Mapping[str, Any], first: Mapping[str, Any], name: str) -> str:
    if name not in metrics or name not in first:
        return "-"
    (value, draws), (before, draws_before) = metrics[name], first[name]
    return _format(estimate_from(value - before, draws - draws_before), "+")


def _format(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (100 * number for number in estimate)
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _paper_cells(row: tuple[float, float, float, float] | None) -> list[str]:
    if row is None:
        return ["failed", *["-"] * 4]
    whole, *sizes = (f"{value:.2f}" for value in row)
    return [whole, "-", *sizes]
