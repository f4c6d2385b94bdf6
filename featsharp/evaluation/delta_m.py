"""Delta_m: how much a candidate changes a table of unlike benchmarks, as one number.

The mean over groups of benchmarks of the relative change against a baseline in per cent, signed so that positive is
better (Maninis et al., CVPR 2019, for the multi-task measure; FeatSharp, arXiv 2502.16025, table 2, for its groups).
"""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from featsharp.errors import ConfigError, DataError, unknown_name
from featsharp.settings import setting
from featsharp.terminal import align

__all__ = ["Benchmark", "DeltaMTask", "Scores", "delta_m", "group_changes", "read_scores", "relative_change"]

Better = Literal["higher", "lower"]

LAYOUT = (
    "expected CSV with a header (the first cell is free, then a benchmark per column), the optional rows 'group' and "
    "'better' (higher or lower), and a row of scores per candidate; or JSON "
    '{"benchmarks": {NAME: {"group": ..., "better": ...}}, "scores": {CANDIDATE: {NAME: score}}}'
)


class Benchmark(NamedTuple):
    """A column of the table."""

    name: str
    group: str
    better: Better


class Scores(NamedTuple):
    """A table of raw scores: by candidate, in the order of the benchmarks."""

    benchmarks: tuple[Benchmark, ...]
    candidates: dict[str, tuple[float, ...]]


def delta_m(changes: Mapping[str, float] | Iterable[float]) -> float:
    """The mean of signed relative changes, one per group, in their unit.

    Raises:
        ConfigError: For no change at all.
    """
    values = list(changes.values() if isinstance(changes, Mapping) else changes)
    if not values:
        raise ConfigError("Delta_m is a mean over groups of benchmarks; got none")
    return math.fsum(values) / len(values)


def relative_change(score: float, baseline: float, better: Better) -> float:
    """Change against the baseline in per cent of its size, positive where the score is better.

    Raises:
        ConfigError: For a baseline of 0, against which nothing is relative.
    """
    if baseline == 0:
        raise ConfigError("a change relative to a baseline of 0 is not defined; leave the benchmark out")
    gain = score - baseline if better == "higher" else baseline - score
    return 100 * gain / abs(baseline)


def group_changes(scores: Scores, candidate: str, baseline: str) -> dict[str, float]:
    """By group, in per cent: the mean of the relative changes of its benchmarks.

    Raises:
        ConfigError: For a name that is not in the table, and where the baseline has a score of 0.
    """
    for name in (candidate, baseline):
        if name not in scores.candidates:
            raise unknown_name("candidate", name, scores.candidates)
    members: dict[str, list[float]] = {}
    rows = zip(scores.benchmarks, scores.candidates[candidate], scores.candidates[baseline], strict=True)
    for benchmark, score, reference in rows:
        members.setdefault(benchmark.group, []).append(relative_change(score, reference, benchmark.better))
    return {group: delta_m(changes) for group, changes in members.items()}


def read_scores(path: Path) -> Scores:
    """A table of raw scores from a CSV or JSON file.

    A benchmark without a group is a group by itself; higher is better where nothing else is said.

    Raises:
        DataError: For a file of another kind, a score that is missing or no finite number, a direction that is neither
            higher nor lower, and a candidate or benchmark named twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error})") from error
    columns, rows = _parse_json(text, path) if path.suffix == ".json" else _parse_csv(text, path)
    benchmarks = tuple(_benchmark(name, column, path) for name, column in columns.items())
    if not benchmarks or not rows:
        raise DataError(f"{path.name} holds no scores; {LAYOUT}")
    return Scores(benchmarks, {name: _score_row(name, row, columns, path) for name, row in rows.items()})


@dataclass
class DeltaMTask:
    """Rank candidates by their mean relative change against a baseline, from a table of scores of any benchmarks."""

    name: ClassVar[str] = "delta-m"
    title: ClassVar[str] = "how much does a candidate change a table of unlike benchmarks?"

    data: Path = setting(Path("."), "CSV or JSON of scores", type=Path, metavar="FILE", required=True)
    baseline: str = setting("", "the candidate that others are compared with", required=True, metavar="NAME")

    def run(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None, *, progress: bool = False
    ) -> dict[str, Any]:
        """By candidate, the best first: "delta_m" and "changes" by group, in per cent. The arguments have no effect."""
        scores = read_scores(self.data)
        found: dict[str, dict[str, Any]] = {}
        for candidate in scores.candidates:
            changes = group_changes(scores, candidate, self.baseline)
            found[candidate] = {"delta_m": delta_m(changes), "changes": changes}
        return dict(sorted(found.items(), key=lambda entry: -entry[1]["delta_m"]))

    def table(self, result: dict[str, Any]) -> list[str]:
        """A line per candidate, under a header."""
        groups = list(next(iter(result.values()))["changes"])
        rows = [
            (name, f"{row['delta_m']:+.2f}", *(f"{row['changes'][group]:+.2f}" for group in groups))
            for name, row in result.items()
        ]
        return align(("candidate", "Delta_m %", *groups), rows)


# What both formats are brought to: benchmark -> its group and direction, candidate -> benchmark -> score.
_Columns = dict[str, dict[str, Any]]
_Rows = dict[str, dict[str, Any]]


def _parse_csv(text: str, path: Path) -> tuple[_Columns, _Rows]:
    table = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    if not table:
        raise DataError(f"{path.name} is empty; {LAYOUT}")
    (_, *names), *body = [[cell.strip() for cell in row] for row in table]
    if len(set(names)) < len(names):
        raise DataError(f"{path.name}: a benchmark is named twice in {', '.join(names)}")
    rows: _Rows = {}
    for first, *cells in body:
        if len(cells) != len(names):
            raise DataError(f"{path.name}, row {first!r}: {len(cells)} cells for {len(names)} benchmarks")
        if first in rows:
            raise DataError(f"{path.name}: {first!r} is there twice")
        rows[first] = dict(zip(names, cells, strict=True))
    about = {key: rows.pop(key, {}) for key in ("group", "better")}
    return {name: {key: row[name] for key, row in about.items() if row.get(name)} for name in names}, rows


def _parse_json(text: str, path: Path) -> tuple[_Columns, _Rows]:
    try:
        content = json.loads(text)
        rows = {str(name): dict(row) for name, row in content["scores"].items()}
        columns = {str(name): dict(about) for name, about in content.get("benchmarks", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path.name} is no table of scores ({type(error).__name__}: {error}); {LAYOUT}") from error
    for row in rows.values():
        columns |= {name: {} for name in row if name not in columns}
    return columns, rows


def _benchmark(name: str, about: dict[str, Any], path: Path) -> Benchmark:
    better = about.get("better", "higher")
    if better not in ("higher", "lower"):
        raise DataError(f"{path.name}, benchmark {name!r}: better is 'higher' or 'lower', got {better!r}")
    return Benchmark(name, str(about.get("group", name)), better)


def _score_row(name: str, row: dict[str, Any], columns: _Columns, path: Path) -> tuple[float, ...]:
    try:
        values = tuple(float(row[column]) for column in columns)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path.name}, candidate {name!r}: a score is missing or no number ({error}); only complete rows compare"
        ) from error
    if not all(map(math.isfinite, values)):
        raise DataError(f"{path.name}, candidate {name!r}: a score is not finite")
    return values
