"""What sharpness costs in time and memory, by factor (FeatSharp, arXiv 2502.16025, figure 14).

Left: time per token of the result. Middle: time per image, beside what it would be if every token took as long as at
factor 1 ("linear"). Right: peak memory.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.errors import DataError
from featsharp.visualization.style import (
    FAINT,
    TEXT,
    error_bars,
    factor_axis,
    legend_below,
    line_style,
    new_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Speed(NamedTuple):
    """One way to a map, at one factor."""

    curve: str
    factor: float
    us_per_token: float
    ms_per_image: tuple[float, float, float]  # median, first and third quartile
    linear_ms_per_image: float
    peak_bytes: int


def read_throughput(content: Mapping[str, Any]) -> tuple[list[Speed], str]:
    """The points of a result of ``featsharp eval throughput``, and what they were measured on.

    Raises:
        DataError: When the file lacks what that task writes.
    """
    try:
        result, machine = content["result"], content["machine"]
        speeds = [_speed(row, result["batch_size"]) for row in result["rows"]]
        parts = [
            result["backbone"],
            machine["device"],
            result["autocast"] or "float32",
            f"batch {result['batch_size']}",
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{content['file']} is incomplete ({error!r}); measure anew: featsharp eval throughput"
        ) from error
    if not speeds:
        raise DataError(f"{content['file']} holds no time; measure anew: featsharp eval throughput")
    return speeds, ", ".join(parts)


def draw_throughput(speeds: Sequence[Speed], measured_on: str = "") -> "Figure":
    """The figure.

    Args:
        speeds: A line for each curve.
        measured_on: The heading.
    """
    figure = new_figure(9.0, 3.3)
    per_token, per_image, memory = figure.subplots(1, 3)
    for index, curve in enumerate(dict.fromkeys(speed.curve for speed in speeds)):
        some = sorted((speed for speed in speeds if speed.curve == curve), key=lambda speed: speed.factor)
        factors = [speed.factor for speed in some]
        style = {**line_style(index), "label": curve}
        times = [speed.ms_per_image for speed in some]
        per_token.plot(factors, [speed.us_per_token for speed in some], **style)
        medians = [median for median, _, _ in times]
        per_image.errorbar(factors, medians, error_bars(times), elinewidth=0.8, capsize=2, **style)
        memory.plot(factors, [speed.peak_bytes / 2**20 for speed in some], **style)
    linear = sorted({speed.factor: speed.linear_ms_per_image for speed in speeds}.items())
    per_image.plot(*zip(*linear, strict=True), color=FAINT, linestyle="--", linewidth=1.2, label="linear", zorder=1)
    style_axes(per_token, x="upsampling factor", y="microseconds", title="time per token")
    style_axes(per_image, x="upsampling factor", y="milliseconds", title="time per image")
    style_axes(memory, x="upsampling factor", y="MiB", title="peak memory")
    for axes in (per_token, per_image, memory):
        factor_axis(axes, [speed.factor for speed in speeds])
        axes.set_ylim(bottom=0)
    if measured_on:
        figure.suptitle(measured_on, fontsize=TEXT, color=FAINT)
    legend_below(figure, per_image, columns=8)
    return figure


def _speed(row: Mapping[str, Any], batch_size: int) -> Speed:
    median, low, high = (float(row["time"][name]) / batch_size for name in ("median", "low", "high"))
    return Speed(
        str(row["curve"]),
        float(row["factor"]),
        float(row["us_per_token"]),
        (median, low, high),
        float(row["linear_ms_per_image"]),
        int(row["peak_bytes"]),
    )
