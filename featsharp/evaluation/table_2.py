"""Table 2 of FeatSharp (arXiv 2502.16025): what students gain from teachers with upsampled features, in per cent.

A column is a group of benchmarks; ours are proxies that a machine without their data can run. VILA has none: it trains
a language model on the student's tokens, for which neither such a model nor its data nor the time is at hand.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from featsharp.errors import DataError
from featsharp.evaluation.delta_m import delta_m, relative_change
from featsharp.terminal import align

GROUPS = ("Classification", "Dense", "Probe3D", "Retrieval", "Pascal Context", "NYUDv2", "VILA")

# Relative changes in per cent against a student of the same recipe whose teachers are not upsampled.
TABLE_2: dict[str, tuple[float, ...]] = {
    "RADIOv2.5-L": (-0.47, -0.09, -1.05, -0.45, 0.62, -2.26, 2.24),
    "baseline": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "tile": (-0.03, 0.30, -0.08, -0.23, -0.02, 1.33, -3.17),
    "S2": (-0.05, 0.15, -0.03, -0.44, 0.13, 1.33, -0.89),
    "FeatUp": (-0.07, 0.14, 0.23, -0.07, 0.14, 0.32, -1.58),
    "FeatSharp": (0.06, 0.16, 0.83, 0.13, 0.17, 0.93, 0.43),
}

BASELINE = "baseline"
TASKS = ("neighbours", "segmentation", "room", "depth")


class Benchmark(NamedTuple):
    """A number of a result of ``featsharp eval``."""

    group: str
    task: str
    metric: str
    better: str = "higher"
    data: str = ""  # layout: results of two data sets are no seeds of one


# Scores of a student by benchmark, one for each seed.
Scores = dict[Benchmark, list[float]]


def benchmarks_of(task: str, result: Mapping[str, Any]) -> list[Benchmark]:
    """List the proxies that a result of one encoder has."""
    layout = str(result.get("layout", ""))
    if task == "neighbours":
        return [Benchmark("Classification", task, "knn"), Benchmark("Retrieval", task, "map")]
    if task == "segmentation":
        group = "Pascal Context" if layout.startswith("context") else "Dense"
        return [Benchmark(group, task, "miou", data=layout)]
    if task == "depth" and layout.startswith("nyu"):
        return [Benchmark("NYUDv2", task, "rmse", "lower", layout)]
    return [Benchmark("Probe3D", task, "d1" if task == "depth" else "room@20", data=layout)]


def collect_scores(results: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Scores]:
    """Collect scores by label from (task, encoders) of several results; files of one task and label are seeds.

    Raises:
        DataError: For a result without its numbers, and where no encoder is called "baseline".
    """
    scores: dict[str, Scores] = {}
    for task, encoders in results:
        for label, encoder in encoders.items():
            for benchmark in benchmarks_of(task, encoder.get("result", {})) if "result" in encoder else ():
                try:
                    value = float(encoder["result"][benchmark.metric]["value"])
                except (KeyError, TypeError, ValueError) as error:
                    raise DataError(f"the result {label!r} of {task} has no number {benchmark.metric!r}") from error
                scores.setdefault(label, {}).setdefault(benchmark, []).append(value)
    if scores and BASELINE not in scores:
        raise DataError(
            f"no result is called {BASELINE!r}, only {', '.join(scores)}; name the encoder of the student whose "
            f"teachers are not upsampled: --upsampler {BASELINE}=identity-1x"
        )
    return scores


def changes_of(scores: Scores, baseline: Scores) -> dict[str, list[float]]:
    """Compute the changes in per cent by group, for each seed; only of groups whose benchmarks are all there.

    Raises:
        ConfigError: For a score of 0 of the baseline.
    """
    changes: dict[str, list[float]] = {}
    for group in GROUPS:
        known = [benchmark for benchmark in baseline if benchmark.group == group]
        if known and all(benchmark in scores for benchmark in known):
            seeds = min(len(scores[benchmark]) for benchmark in known)
            changes[group] = [
                delta_m(relative_change(scores[b][seed], fmean(baseline[b]), b.better) for b in known)
                for seed in range(seeds)
            ]
    return changes


def table_2(scores: Mapping[str, Scores]) -> list[str]:
    """Format the paper's rows, and ours below: means over seeds, with their standard deviation."""
    theirs = [[name, *(f"{x:+.2f}" for x in row), f"{delta_m(row):+.2f}"] for name, row in TABLE_2.items()]
    head = ["upsampler", *GROUPS, "Delta_m %"]
    lines = ["Students of upsampled teachers, change in % (FeatSharp, arXiv 2502.16025, table 2).", ""]
    lines += ["theirs: RADIOv2.5-L's recipe", *align(head, theirs)]
    if not scores:
        return lines
    rows = []
    for name, own in scores.items():
        changes = changes_of(own, scores[BASELINE])
        complete = {b.group for b in scores[BASELINE]} == set(changes)
        cells = [_format(changes[group]) if group in changes else "-" for group in GROUPS]
        pooled = [delta_m(seed) for seed in zip(*changes.values(), strict=False)]
        rows.append([name, *cells, _format(pooled) if complete else "-"])
    raw = [
        [
            f"{b.group}: {b.task}{b.data and ' on '}{b.data}, {b.metric}",
            *(_scores(own.get(b, [])) for own in scores.values()),
        ]
        for b in sorted(scores[BASELINE], key=lambda b: GROUPS.index(b.group))
    ]
    lines += ["", "ours: proxies, each column against the baseline's mean", *align(head, rows)]
    return [*lines, "", "ours: the scores", *align(["proxy", *scores], raw)]


def _format(changes: Sequence[float]) -> str:
    spread = f" ±{stdev(changes):.2f}" if len(changes) > 1 else ""
    return f"{fmean(changes):+.2f}{spread}"


def _scores(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values) or "-"
