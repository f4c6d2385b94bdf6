"""Precision against recall of boundaries, with the best F of each encoder and, in grey, lines of equal F."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.errors import DataError
from featsharp.visualization.results import Number, add_results, entries, number, read_result
from featsharp.visualization.style import (
    FAINT,
    GRID,
    SMALL,
    legend_beside,
    line_handle,
    line_style,
    new_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EQUAL_F = (0.2, 0.4, 0.6, 0.8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_results(parser, "boundaries")


def make_figure(arguments: argparse.Namespace) -> "Figure":
    return draw_pr(read_pr(read_result(path, "boundaries") for path in arguments.results))


class Curve(NamedTuple):
    """Precision and recall of one encoder, a pair for each threshold."""

    label: str
    precision: list[float]
    recall: list[float]
    best: tuple[float, float]  # (recall, precision) at the threshold of the best F
    ods: Number


def read_pr(contents: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Read the curves of results of ``featsharp eval boundaries``, the best F first."""
    curves = []
    for content in contents:
        for entry in entries(content):
            try:
                points = [(float(p["precision"]), float(p["recall"])) for p in entry.result["curve"]]
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{content['file']}: {entry.label!r} has no curve of precision and recall") from error
            recall, precision, ods = (
                number(entry, name, content["file"]) for name in ("ods_recall", "ods_precision", "ods_f")
            )
            best = (recall.value, precision.value)
            curves.append(Curve(entry.label, [p for p, _ in points], [r for _, r in points], best, ods))
    return sorted(curves, key=lambda curve: -curve.ods.value)


def draw_pr(curves: Sequence[Curve]) -> "Figure":
    """Draw the curves, without thresholds at which nothing was detected (precision and recall 0)."""
    import numpy as np

    figure = new_figure(4.2, 4.2)
    axes = figure.subplots()
    for f in EQUAL_F:
        recall = np.linspace(f / (2 - f) + 1e-6, 1, 200)
        axes.plot(recall, f * recall / (2 * recall - f), color=GRID, linewidth=0.8, zorder=0)
        axes.annotate(
            f"F {f:g}", (1, f / (2 - f)), xytext=(3, 0), textcoords="offset points", va="center", fontsize=SMALL,
            color=FAINT, annotation_clip=False,
        )  # fmt: skip
    handles = []
    for index, curve in enumerate(curves):
        drawn = [(r, p) for p, r in zip(curve.precision, curve.recall, strict=True) if p + r > 0]
        style = line_style(index)
        label = f"{curve.label}, F {curve.ods.value:.3f}" + ("" if drawn else " (nothing found)")
        handles.append(line_handle(label, **style))
        marker = style.pop("marker")
        axes.plot([r for r, _ in drawn], [p for _, p in drawn], label=curve.label, clip_on=False, **style)
        axes.plot(
            *curve.best, marker, color=style["color"], markersize=7, markeredgecolor="white", zorder=3, clip_on=False
        )
    style_axes(axes, x="recall", y="precision")
    axes.grid(False)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    legend_beside(figure, handles)
    return figure
