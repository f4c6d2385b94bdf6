"""Time and memory by upsampling factor (FeatSharp, arXiv 2502.16025, figure 14).

Left: time per token of the result. Middle: time per image with its quartiles, and of the upsampler alone, dashed. Both
with the time if every token took as long as at factor 1 ("linear"). Right: peak memory.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.errors import DataError
from featsharp.visualization.results import read_result
from featsharp.visualization.style import (
    FAINT,
    INK,
    TEXT,
    error_bars,
    factor_axis,
    legend_beside,
    line_handle,
    line_style,
    new_figure,
    style_axes,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Medians of fewer runs are drawn as hollow markers, without quartiles.
ENOUGH_RUNS = 5
HOLLOW: dict[str, Any] = {"markerfacecolor": "white"}
ALONE: dict[str, Any] = {"linestyle": "--", "linewidth": 1.0, "marker": ""}
LINEAR: dict[str, Any] = {"color": FAINT, "linestyle": ":", "linewidth": 1.4, "label": "linear"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", type=Path, metavar="JSON", help="of featsharp eval throughput")


def make_figure(arguments: argparse.Namespace) -> "Figure":
    return draw_throughput(*read_throughput(read_result(arguments.result, "throughput")))


class Speed(NamedTuple):
    """One curve at one factor."""

    curve: str
    factor: float
    cells: int
    us_per_token: float
    ms_per_image: tuple[float, float, float]  # median, first and third quartile
    alone_ms_per_image: float  # without its backbone passes: the upsampler; noise may take it below 0
    linear_ms_per_image: float
    peak_bytes: int
    runs: int


def read_throughput(content: Mapping[str, Any]) -> tuple[list[Speed], str]:
    """Read the points of a result of ``featsharp eval throughput``, and a line with the settings and the machine.

    Raises:
        DataError: When the file is incomplete.
    """
    try:
        result, machine = content["result"], content["machine"]
        speeds = [_speed(row, result["batch_size"]) for row in result["rows"]]
        device = machine["device"]
        attention = [name.removeprefix("scaled_dot_product_").replace("_", " ") for name in result["attention"]]
        parts = [
            result["backbone"],
            machine["processor"] if device == "cpu" else device,
            result["autocast"] or "float32",
            f"batch {result['batch_size']}",
            " and ".join(attention) or "attention of the backbone's own, or none",
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{content['file']} is incomplete ({error!r}); measure anew: featsharp eval throughput"
        ) from error
    if not speeds:
        raise DataError(f"{content['file']} holds no time; measure anew: featsharp eval throughput")
    return speeds, ", ".join(parts)


def draw_throughput(speeds: Sequence[Speed], measured_on: str = "") -> "Figure":
    """Draw times and memory by factor, a line for each curve, under the heading ``measured_on``."""
    figure = new_figure(9.0, 3.0)
    per_token, per_image, memory = figure.subplots(1, 3)
    handles = []
    for index, curve in enumerate(dict.fromkeys(speed.curve for speed in speeds)):
        some = sorted((speed for speed in speeds if speed.curve == curve), key=lambda speed: speed.factor)
        style = line_style(index)
        handles.append(line_handle(curve, **style))
        _plot(per_token, some, lambda speed: speed.us_per_token, style)
        _plot(per_image, some, lambda speed: speed.ms_per_image[0], style)
        _plot_quartiles(per_image, some, style["color"])
        alone = [speed for speed in some if speed.alone_ms_per_image > 0]
        times = [speed.alone_ms_per_image for speed in alone]
        per_image.plot([speed.factor for speed in alone], times, label=f"{curve} alone", **style | ALONE)
        memory.plot([speed.factor for speed in some], [speed.peak_bytes / 2**20 for speed in some], **style)
    _plot_linear(per_token, per_image, speeds)
    if any(speed.alone_ms_per_image > 0 for speed in speeds):
        handles.append(line_handle("upsampler alone", color=INK, **ALONE))
    handles.append(line_handle(**LINEAR))
    if any(speed.runs < ENOUGH_RUNS for speed in speeds):
        handles.append(
            line_handle(f"fewer than {ENOUGH_RUNS} runs", marker="o", color=INK, linestyle="", **HOLLOW, markersize=4.5)
        )
    style_axes(per_token, x="upsampling factor", y="microseconds", title="time per token")
    style_axes(per_image, x="upsampling factor", y="milliseconds", title="time per image")
    style_axes(memory, x="upsampling factor", y="MiB", title="peak memory")
    for axes in (per_token, per_image, memory):
        factor_axis(axes, [speed.factor for speed in speeds])
        axes.set_ylim(bottom=0)
    if measured_on:
        figure.suptitle(wrap(measured_on, figure.get_figwidth(), TEXT), fontsize=TEXT, color=FAINT)
    legend_beside(figure, handles)
    return figure


def _plot(axes: "Axes", speeds: Sequence[Speed], time: Callable[[Speed], float], style: Mapping[str, Any]) -> None:
    """Draw a line through the times, with hollow markers where there were few runs."""
    axes.plot([speed.factor for speed in speeds], [time(speed) for speed in speeds], **style)
    few = [speed for speed in speeds if speed.runs < ENOUGH_RUNS]
    if few:
        hollow = {**style, **HOLLOW, "linestyle": ""}
        axes.plot([speed.factor for speed in few], [time(speed) for speed in few], **hollow)


def _plot_quartiles(axes: "Axes", speeds: Sequence[Speed], colour: str) -> None:
    some = [speed for speed in speeds if speed.runs >= ENOUGH_RUNS]
    if some:
        times = [speed.ms_per_image for speed in some]
        bars: dict[str, Any] = {"fmt": "none", "ecolor": colour, "elinewidth": 0.8, "capsize": 2}
        axes.errorbar([speed.factor for speed in some], [time[0] for time in times], error_bars(times), **bars)


def _plot_linear(per_token: "Axes", per_image: "Axes", speeds: Sequence[Speed]) -> None:
    """Draw the times if every token took as long as at factor 1; tokens grow with the square of the factor."""
    import numpy as np

    first = min(speeds, key=lambda speed: speed.factor)
    factors = np.geomspace(first.factor, max(speed.factor for speed in speeds), 101)
    per_image.plot(factors, first.linear_ms_per_image * (factors / first.factor) ** 2, **LINEAR, zorder=1)
    per_token.plot(factors[[0, -1]], 2 * [1000 * first.linear_ms_per_image / first.cells], **LINEAR, zorder=1)


def _speed(row: Mapping[str, Any], batch_size: int) -> Speed:
    median, low, high = (float(row["time"][name]) / batch_size for name in ("median", "low", "high"))
    return Speed(
        curve=str(row["curve"]),
        factor=float(row["factor"]),
        cells=int(row["cells"]),
        us_per_token=float(row["us_per_token"]),
        ms_per_image=(median, low, high),
        alone_ms_per_image=float(row["ms_per_image"]) - float(row["backbone_ms_per_image"]),
        linear_ms_per_image=float(row["linear_ms_per_image"]),
        peak_bytes=int(row["peak_bytes"]),
        runs=int(row["time"]["runs"]),
    )
