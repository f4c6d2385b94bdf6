"""What accuracy costs (LiFT, arXiv 2403.14625, figure 1): a quality number of any task against operations or time."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.errors import ConfigError, DataError
from featsharp.visualization.figures.results import Entry, Number, axis_name, entries, line_names, number
from featsharp.visualization.style import (
    FAINT,
    SMALL,
    amount_axis,
    error_bars,
    label_points,
    legend_below,
    line_handle,
    line_style,
    new_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By task: the number of a row that is the cost, and the units of an axis from small to large, each with its size.
COSTS = {
    "flops": ("total", (("MFLOP", 1e6), ("GFLOP", 1e9))),
    "throughput": ("ms_per_image", (("milliseconds", 1.0),)),
}
NOTE = "costs are those of the upsamplers' default options"


class Trade(NamedTuple):
    """One encoder."""

    line: str  # the upsampler, or the encoder's label
    factor: float
    cost: float
    quality: Number


def read_cost(
    costs: Sequence[Mapping[str, Any]], qualities: Iterable[Mapping[str, Any]], metric: str
) -> tuple[list[Trade], str]:
    """Encoders with what they cost and how good they are, and what the axis of costs is called.

    An encoder's cost is that of an untrained one with the same backbone, upsampler and factor at the backbone's native
    size, and with the upsampler's default options, which the encoder itself need not have.

    Args:
        costs: Results of ``featsharp eval flops``, or of ``featsharp eval throughput``.
        qualities: Results of any task with encoders, at the native size too.
        metric: Name of the number of those results.

    Raises:
        ConfigError: For costs of both kinds, or a number that is not there.
        DataError: When the cost of an encoder was not measured, or measured at another size; it says how to do so. For
            two encoders of one label and factor.
    """
    tasks = sorted({content["task"] for content in costs})
    if len(tasks) != 1:
        raise ConfigError(f"costs of {' and '.join(tasks)} cannot share an axis; give files of one of them")
    known = _known_costs(costs, tasks[0])
    found = [(content, entry) for content in qualities for entry in entries(content)]
    trades = []
    for line, (content, entry) in zip(line_names([("", entry) for _, entry in found]), found, strict=True):
        file = content["file"]
        cost = known.get((entry.backbone, entry.upsampler, entry.factor))
        if cost is None:
            raise DataError(
                f"no file holds the cost of {entry.label!r} of {file}; measure it: featsharp eval "
                f"{tasks[0]} --backbone {entry.backbone} --upsampler {entry.upsampler} --factors {entry.factor:g} "
                "--json FILE"
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


class _Cost(NamedTuple):
    """What one image costs, in operations or milliseconds."""

    value: float
    native_size: tuple[int, int]  # pixels of the low-resolution pass


def _known_costs(costs: Sequence[Mapping[str, Any]], task: str) -> dict[tuple[str, str, float], _Cost]:
    """Costs by backbone, upsampler and factor."""
    known: dict[tuple[str, str, float], _Cost] = {}
    for content in costs:
        try:
            result = content["result"]
            height, width = result["native_size"]
            for row in result["rows"]:
                key = result["backbone"], row["curve"], float(row["factor"])
                known[key] = _Cost(float(row[COSTS[task][0]]), (height, width))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{content['file']} is incomplete ({error!r}); measure anew: featsharp eval {task}"
            ) from error
    return known


def _check_size(content: Mapping[str, Any], entry: Entry, native: tuple[int, int]) -> None:
    """Refuse a quality that was measured at another size than the cost; files that name none are of the native size."""
    size = entry.result.get("low_res_size") or (content.get("settings") or {}).get("low_res_size") or native
    if tuple(size) != native:
        raise DataError(
            f"{content['file']}: {entry.label!r} was measured at {size[0]}x{size[1]} pixels, but costs are of the "
            f"native size of {entry.backbone}, {native[0]}x{native[1]}; evaluate at that size: without --low-res-size"
        )


def draw_cost(trades: Sequence[Trade], cost: str, metric: str) -> "Figure":
    """The figure: a line for each upsampler, the factor beside each point.

    Args:
        trades: At least one.
        cost: What the axis of costs is called, with its unit.
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
    style_axes(axes, x=cost, y=name)
    axes.set_title(NOTE, fontsize=SMALL, color=FAINT)
    amount_axis(axes, [t.cost for t in trades])
    axes.margins(x=0.08, y=0.08)
    legend_below(figure, handles)
    points = [(t.cost, scale * t.quality.value) for t in trades]
    label_points(axes, points, [f"{t.factor:g}x" for t in trades])
    return figure
