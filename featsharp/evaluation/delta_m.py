"""Delta_m: the mean relative change of a table of different benchmarks.

The mean over groups of benchmarks of the relative change against a baseline in per cent, signed so that positive is
better (Maninis et al., CVPR 2019, for the multi-task measure; FeatSharp, arXiv 2502.16025, table 2, for its groups).
"""

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from featsharp.errors import ConfigError, DataError, unknown_name
from featsharp.files import read_file
from featsharp.settings import PlainTask, Quality, setting
from featsharp.terminal import align

LAYOUT = (
    "expected CSV with a header (the first cell is free, then a benchmark per column), the optional rows 'group' and "
    "'better' (higher or lower), and a row of scores per candidate; or JSON "
    '{"benchmarks": {NAME: {"group": ..., "better": ...}}, "scores": {CANDIDATE: {NAME: score}}}'
)


class Scores(NamedTuple):
    """A table of raw scores."""

    benchmarks: dict[str, tuple[str, str]]  # name -> its group, and "higher" or "lower" for the better direction
    candidates: dict[str, dict[str, float]]  # name -> score by benchmark


@dataclass
class DeltaMTask(PlainTask):
    """Rank candidates by their mean relative change against a baseline, from a table of scores of any benchmarks."""

    name: ClassVar[str] = "delta-m"

    data: Path = setting(Path("."), "CSV or JSON of scores", type=Path, metavar="FILE", required=True)
    baseline: str = setting("", "the candidate that others are compared with", required=True, metavar="NAME")

    def run(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
        quality: Quality | None = None,
    ) -> dict[str, Any]:
        """Compute "delta_m" and "changes" by group, in per cent, by candidate, the best first."""
        scores = read_scores(self.data)
        changes = {candidate: group_changes(scores, candidate, self.baseline) for candidate in scores.candidates}
        ranked = sorted(changes, key=lambda candidate: -delta_m(changes[candidate].values()))
        return {name: {"delta_m": delta_m(changes[name].values()), "changes": changes[name]} for name in ranked}

    def table(self, result: dict[str, Any]) -> list[str]:
        """Format a line per candidate, under a header."""
        groups = list(next(iter(result.values()))["changes"])
        rows = [
            (name, f"{row['delta_m']:+.2f}", *(f"{row['changes'][group]:+.2f}" for group in groups))
            for name, row in result.items()
        ]
        return align(("candidate", "Delta_m %", *groups), rows)


def delta_m(changes: Iterable[float]) -> float:
    """Compute the mean of signed relative changes, one per group, in their unit.

    Raises:
        ConfigError: For no change at all.
    """
    values = list(changes)
    if not values:
        raise ConfigError("Delta_m is a mean over groups of benchmarks; got none")
    return math.fsum(values) / len(values)


def relative_change(score: float, baseline: float, better: str) -> float:
    """Compute the change against the baseline in per cent of its size, positive where the score is better.

    Raises:
        ConfigError: For a baseline of 0.
    """
    if baseline == 0:
        raise ConfigError("a change relative to a baseline of 0 is not defined; leave the benchmark out")
    return 100 * (score - baseline if better == "higher" else baseline - score) / abs(baseline)


def group_changes(scores: Scores, candidate: str, baseline: str) -> dict[str, float]:
    """Compute by group, in per cent, the mean of the relative changes of its benchmarks.

    Raises:
        ConfigError: For a name that is not in the table, and where the baseline has a score of 0.
    """
    for name in (candidate, baseline):
        if name not in scores.candidates:
            raise unknown_name("candidate", name, scores.candidates)
    changes: dict[str, list[float]] = {}
    for name, (group, better) in scores.benchmarks.items():
        change = relative_change(scores.candidates[candidate][name], scores.candidates[baseline][name], better)
        changes.setdefault(group, []).append(change)
    return {group: delta_m(of_group) for group, of_group in changes.items()}


def read_scores(path: Path) -> Scores:
    """Read a table of raw scores from a CSV or JSON file.

    A benchmark without a group is a separate group; higher is better where the table has no direction.

    Raises:
        DataError: For a file of another kind, a score that is missing or no finite number, a direction that is neither
            higher nor lower, and a candidate or benchmark named twice.
    """
    try:
        text = read_file(path).decode("utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else _parse_csv(text, path)
        rows = {str(name): dict(row) for name, row in content["scores"].items()}
        about = dict(content.get("benchmarks", {}))
        for row in rows.values():
            about |= {name: {} for name in row if name not in about}
        benchmarks = {name: (str(of.get("group", name)), of.get("better", "higher")) for name, of in about.items()}
    except DataError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path.name} is no table of scores ({type(error).__name__}: {error}); {LAYOUT}") from error
    if not benchmarks or not rows:
        raise DataError(f"{path.name} holds no scores; {LAYOUT}")
    for name, (_, better) in benchmarks.items():
        if better not in ("higher", "lower"):
            raise DataError(f"{path.name}, benchmark {name!r}: better is 'higher' or 'lower', got {better!r}")
    return Scores(benchmarks, {name: _parse_row(name, row, benchmarks, path) for name, row in rows.items()})


def _parse_csv(text: str, path: Path) -> dict[str, Any]:
    """Convert to the content of a JSON file of the same scores."""
    table = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if any(map(str.strip, row))]
    if not table:
        raise DataError(f"{path.name} is empty; {LAYOUT}")
    (_, *names), *body = table
    if len(set(names)) < len(names):
        raise DataError(f"{path.name}: a benchmark is named twice in {', '.join(names)}")
    rows: dict[str, dict[str, str]] = {}
    for first, *cells in body:
        if len(cells) != len(names):
            raise DataError(f"{path.name}, row {first!r}: {len(cells)} cells for {len(names)} benchmarks")
        if first in rows:
            raise DataError(f"{path.name}: {first!r} is there twice")
        rows[first] = dict(zip(names, cells, strict=True))
    about = {key: rows.pop(key, {}) for key in ("group", "better")}
    benchmarks = {name: {key: row[name] for key, row in about.items() if row.get(name)} for name in names}
    return {"benchmarks": benchmarks, "scores": rows}


def _parse_row(name: str, row: dict[str, Any], benchmarks: Iterable[str], path: Path) -> dict[str, float]:
    try:
        scores = {benchmark: float(row[benchmark]) for benchmark in benchmarks}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path.name}, candidate {name!r}: a score is missing or no number ({error}); only complete rows compare"
        ) from error
    if not all(map(math.isfinite, scores.values())):
        raise DataError(f"{path.name}, candidate {name!r}: a score is not finite")
    return scores
