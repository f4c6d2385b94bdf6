"""Accuracy against cost (LiFT, arXiv 2403.14625, figure 1): a quality number of any task against operations or time.

A point joins two results of one encoder by the key of its content, so that the cost is of the same weights.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.errors import ConfigError, DataError
from featsharp.visualization.results import (
    Entry,
    Number,
    add_results,
    axis_name,
    entries,
    line_names,
    number,
    read_result,
)
from featsharp.visualization.style import (
    FAINT,
    SMALL,
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

# By task: the key of the cost in a row, and the units of an axis from small to large, each with its size.
COSTS = {
    "flops": ("total", (("MFLOP", 1e6), ("GFLOP", 1e9))),
    "throughput": ("ms_per_image", (("milliseconds", 1.0),)),
}
# Positions of factors beside their points, line by line: (right, up).
CORNERS = ((1, -1), (-1, 1), (1, 1), (-1, -1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_results(parser, "flops or featsharp eval throughput, with the same --checkpoint and --upsampler as --accuracy")
    parser.add_argument("--accuracy", nargs="+", type=Path, required=True, metavar="JSON", help="of any other task")
    parser.add_argument("--metric", required=True, metavar="NAME", help="name of its number to draw, such as pck@0.1")


def make_figure(arguments: argparse.Namespace) -> "Figure":
    costs = [read_result(path, "flops", "throughput") for path in arguments.results]
    qualities = [read_result(path) for path in arguments.accuracy]
    return draw_cost(*read_cost(costs, qualities, arguments.metric), arguments.metric)


class Trade(NamedTuple):
    """One encoder."""

    line: str  # the upsampler, or the encoder's label
    factor: float
    cost: float
    quality: Number


def read_cost(
    costs: Sequence[Mapping[str, Any]], qualities: Iterable[Mapping[str, Any]], metric: str
) -> tuple[list[Trade], str]:
    """Join costs and qualities of the same weights, and name the axis of costs.

    Args:
        costs: Results of ``featsharp eval flops``, or of ``featsharp eval throughput``.
        qualities: Results of any task with encoders, at the native size too.
        metric: Name of the number of those results.

    Raises:
        ConfigError: For costs of both kinds, or a missing number.
        DataError: When the cost of an encoder was not measured, or measured at another size, with the command to do so;
            for a result without a key of its weights, and for two encoders of one label and factor.
    """
    tasks = sorted({content["task"] for content in costs})
    if len(tasks) != 1:
        raise ConfigError(f"costs of {' and '.join(tasks)} cannot share an axis; give files of one of them")
    known = _costs_by_key(costs, tasks[0])
    pairs = [(content, entry) for content in qualities for entry in entries(content)]
    trades = []
    for line, (content, entry) in zip(line_names([("", entry) for _, entry in pairs]), pairs, strict=True):
        file = content["file"]
        if entry.key is None:
            raise DataError(
                f"{file} does not say which weights {entry.label!r} has, so no cost is known to be theirs; evaluate "
                f"anew: featsharp eval {content['task']}"
            )
        cost = known.get(entry.key)
        if cost is None:
            raise DataError(
                f"no file holds the cost of {entry.label!r} of {file}, with these weights; measure it: featsharp eval "
                f"{tasks[0]} --backbone {entry.backbone} --checkpoint FILE --json FILE; what needs no training: "
                f"--upsampler {entry.upsampler} --factors {entry.factor:g}"
            )
        _check_size(content, entry, cost.native_size)
        trades.append(Trade(line, entry.factor, cost.value, number(entry, metric, file)))
    twice = [key for key, count in Counter(trade[:2] for trade in trades).items() if count > 1]
    if twice:
        line, factor = twice[0]
        raise DataError(
            f"two results for {line!r} at {factor:g}x; leave one file out, or evaluate with other labels: LABEL=..."
        )
    units = COSTS[tasks[0]][1]
    largest = max(trade.cost for trade in trades)
    name, unit = next((some for some in reversed(units) if some[1] <= largest), units[0])
    return [trade._replace(cost=trade.cost / unit) for trade in trades], f"cost ({name} per image)"


def draw_cost(trades: Sequence[Trade], cost: str, metric: str) -> "Figure":
    """Draw a line for each upsampler, the factor beside each point.

    Args:
        trades: At least one.
        cost: Name of the axis of costs, with its unit.
        metric: Name of the number; shares are drawn in percent.
    """
    name, scale = axis_name(metric)
    figure = new_figure(4.6, 3.3)
    axes = figure.subplots()
    handles = []
    for index, line in enumerate(dict.fromkeys(trade.line for trade in trades)):
        some = sorted((t for t in trades if t.line == line), key=lambda t: t.factor)
        values = [t.quality for t in some]
        axes.errorbar(
            [t.cost for t in some],
            [scale * value.value for value in values],
            error_bars(values, scale),
            label=line,
            elinewidth=0.8,
            ecolor=FAINT,
            **line_style(index),
        )
        handles.append(line_handle(line, **line_style(index)))
        right, up = CORNERS[index % len(CORNERS)]
        for trade in some:
            axes.annotate(
                f"{trade.factor:g}x",
                (trade.cost, scale * trade.quality.value),
                xytext=(5 * right, 3 * up),
                textcoords="offset points",
                ha="left" if right > 0 else "right",
                va="bottom" if up > 0 else "top",
                fontsize=SMALL,
                color=line_style(index)["color"],
            )
    style_axes(axes, x=cost, y=name)
    amount_axis(axes, [t.cost for t in trades])
    axes.margins(x=0.12, y=0.08)
    legend_beside(figure, handles)
    return figure


class _Cost(NamedTuple):
    """Operations or milliseconds for one image."""

    value: float
    native_size: tuple[int, int]  # pixels of the low-resolution pass


def _costs_by_key(costs: Sequence[Mapping[str, Any]], task: str) -> dict[str, _Cost]:
    """Collect costs by the key of the encoder's content; untrained weights have none."""
    known: dict[str, _Cost] = {}
    for content in costs:
        try:
            height, width = content["result"]["native_size"]
            for row in content["result"]["rows"]:
                if row.get("key") is not None:
                    known[row["key"]] = _Cost(float(row[COSTS[task][0]]), (height, width))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{content['file']} is incomplete ({error!r}); measure anew: featsharp eval {task}"
            ) from error
    return known


def _check_size(content: Mapping[str, Any], entry: Entry, native: tuple[int, int]) -> None:
    """Raise DataError for a quality of another size than the cost; files without a size are of the native size."""
    size = entry.result.get("low_res_size") or (content.get("settings") or {}).get("low_res_size") or native
    if tuple(size) != native:
        raise DataError(
            f"{content['file']}: {entry.label!r} was measured at {size[0]}x{size[1]} pixels, but costs are of the "
            f"native size of {entry.backbone}, {native[0]}x{native[1]}; evaluate at that size: without --low-res-size"
        )
