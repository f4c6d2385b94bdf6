"""Quality per pass, or per second: a panel for each measure, and the line of those that none is better than."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.errors import DataError
from featsharp.visualization.results import Number, entries, number, read_result
from featsharp.visualization.style import (
    FAINT,
    amount_axis,
    error_bars,
    legend_beside,
    line_handle,
    line_style,
    new_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {"passes": "passes through the backbone", "seconds": "seconds"}
PANELS_IN_A_ROW = 4


class Point(NamedTuple):
    """One encoder."""

    label: str
    cost: float
    measures: Mapping[str, Number]  # by name; shares in percent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help="of featsharp eval pareto")
    parser.add_argument("--cost", choices=tuple(AXES), default="passes", help="the axis; default: passes")


def make_figure(arguments: argparse.Namespace) -> "Figure":
    contents = [read_result(path, "pareto") for path in arguments.results]
    return draw_pareto(read_points(contents, arguments.cost), AXES[arguments.cost])


def read_points(contents: Iterable[Mapping[str, Any]], cost: str) -> list[Point]:
    """Read the encoders of results of ``featsharp eval pareto``, cheapest first.

    Raises:
        DataError: For a result without costs or measures.
    """
    from featsharp.evaluation.measures import COLUMNS

    points = []
    for content in contents:
        for entry in entries(content):
            names = [name for name in COLUMNS if name in entry.result]
            if cost not in entry.result or not names:
                raise DataError(f"{content['file']}: {entry.label!r} has no {cost} or no measure; measure it anew")
            scales = {name: COLUMNS[name].scale for name in names}
            numbers = {
                name: Number(*(scales[name] * value for value in number(entry, name, content["file"])))
                for name in names
            }
            points.append(Point(entry.label, float(entry.result[cost]), numbers))
    return sorted(points, key=lambda point: point.cost)


def draw_pareto(points: Sequence[Point], cost: str) -> "Figure":
    """Draw each measure against the cost, with its intervals.

    Args:
        points: At least one.
        cost: Name of the axis of costs.
    """
    from featsharp.evaluation.measures import COLUMNS
    from featsharp.evaluation.pareto import find_front

    names = [name for name in COLUMNS if any(name in point.measures for point in points)]
    rows = -(-len(names) // PANELS_IN_A_ROW)
    figure = new_figure(2.4 * min(len(names), PANELS_IN_A_ROW), 2.3 * rows)
    panels = list(figure.subplots(rows, min(len(names), PANELS_IN_A_ROW), squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        some = [(index, point) for index, point in enumerate(points) if name in point.measures]
        best = find_front({point.label: (point.cost, point.measures[name].value) for _, point in some})
        front = [point for _, point in some if point.label in best]
        axes.plot(
            [p.cost for p in front], [p.measures[name].value for p in front], color=FAINT, linewidth=1.0, zorder=1
        )
        for index, point in some:
            value = point.measures[name]
            style = {**line_style(index), "linestyle": ""}
            axes.errorbar([point.cost], [value.value], error_bars([value]), elinewidth=0.8, ecolor=FAINT, **style)
        style_axes(axes, x=cost, y="", title=name + " (%)" * (COLUMNS[name].scale == 100))
        amount_axis(axes, [point.cost for point in points])
        axes.margins(x=0.1, y=0.1)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    handles = [line_handle(p.label, **{**line_style(i), "linestyle": ""}) for i, p in enumerate(points)]
    legend_beside(figure, [*handles, line_handle("none is better at the cost", color=FAINT, linewidth=1.0)])
    return figure
