"""What accuracy costs (LiFT, arXiv 2403.14625, figure 1): a quality number of any task against operations or time."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.errors import ConfigError, DataError
from featsharp.visualization.figures.results import Number, entries, line_names, number
from featsharp.visualization.style import (
    FAINT,
    error_bars,
    label_points,
    legend_below,
    line_style,
    new_figure,
    octave_axis,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By task: the number of a row that is the cost, what it is divided by, and what the axis is called.
COSTS = {
    "flops": ("total", 1e9, "cost (GFLOP per image)"),
    "throughput": ("ms_per_image", 1.0, "cost (milliseconds per image)"),
}


class Trade(NamedTuple):
    """One encoder."""

    line: str  # the upsampler
    factor: float
    cost: float
    quality: Number


def read_cost(
    costs: Sequence[Mapping[str, Any]], qualities: Iterable[Mapping[str, Any]], metric: str
) -> tuple[list[Trade], str]:
    """Encoders with what they cost and how good they are, and what the axis of costs is called.

    An encoder's cost is that of its backbone, upsampler and factor: weights change none.

    Args:
        costs: Results of ``featsharp eval flops``, or of ``featsharp eval throughput``.
        qualities: Results of any task with encoders.
        metric: Name of the number of those results.

    Raises:
        ConfigError: For costs of both kinds, or a number that is not there.
        DataError: When the cost of an encoder was not measured; it says how to do so.
    """
    tasks = sorted({content["task"] for content in costs})
    if len(tasks) != 1:
        raise ConfigError(f"costs of {' and '.join(tasks)} cannot share an axis; give files of one of them")
    name, unit, title = COSTS[tasks[0]]
    known: dict[tuple[str, str, float], float] = {}
    for content in costs:
        try:
            result = content["result"]
            for row in result["rows"]:
                known[result["backbone"], row["curve"], float(row["factor"])] = float(row[name]) / unit
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{content['file']} is incomplete ({error!r}); measure anew: featsharp eval {tasks[0]}"
            ) from error
    found = [(content["file"], entry) for content in qualities for entry in entries(content)]
    trades = []
    for line, (file, entry) in zip(line_names([("", entry) for _, entry in found]), found, strict=True):
        cost = known.get((entry.backbone, entry.upsampler, entry.factor))
        if cost is None:
            raise DataError(
                f"no file holds the cost of {entry.label!r} of {file}; measure it: featsharp eval "
                f"{tasks[0]} --backbone {entry.backbone} --upsamplers {entry.upsampler} --factors {entry.factor:g} "
                "--json FILE"
            )
        trades.append(Trade(line, entry.factor, cost, number(entry, metric, file)))
    return trades, title


def draw_cost(trades: Sequence[Trade], cost: str, quality: str) -> "Figure":
    """The figure: a line for each upsampler, the factor beside each point.

    Args:
        trades: At least one.
        cost, quality: What the axes are called, with units.
    """
    figure = new_figure(4.6, 3.4)
    axes = figure.subplots()
    for index, line in enumerate(dict.fromkeys(trade.line for trade in trades)):
        some = sorted((t for t in trades if t.line == line), key=lambda t: t.factor)
        values = [t.quality for t in some]
        axes.errorbar(
            [t.cost for t in some],
            [value.value for value in values],
            error_bars(values),
            label=line,
            elinewidth=0.8,
            ecolor=FAINT,
            **line_style(index),
        )
    style_axes(axes, x=cost, y=quality)
    octave_axis(axes, [t.cost for t in trades])
    axes.margins(x=0.08, y=0.08)
    legend_below(figure, axes)
    label_points(axes, [(t.cost, t.quality.value) for t in trades], [f"{t.factor:g}x" for t in trades])
    return figure
