"""Segmentation quality by upsampling factor, a panel per input size (FeatSharp, arXiv 2502.16025, figure 3)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.errors import DataError
from featsharp.visualization.figures.results import Entry, Number, entries, line_names, number
from featsharp.visualization.style import error_bars, factor_axis, legend_below, line_style, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Size(NamedTuple):
    """Pixels of the low-resolution pass."""

    height: int
    width: int


class Point(NamedTuple):
    """One encoder at one input size."""

    size: Size
    line: str  # the upsampler
    factor: float
    miou: Number


def read_miou(contents: Iterable[Mapping[str, Any]], metric: str = "miou") -> list[Point]:
    """The points of results of ``featsharp eval segmentation``.

    Raises:
        DataError: For two encoders of one label, size and factor.
    """
    found: list[tuple[Size, Entry, Number]] = []
    for content in contents:
        for entry in entries(content):
            try:
                height, width = entry.result["low_res_size"]
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{content['file']}: {entry.label!r} does not say its low_res_size") from error
            found.append((Size(height, width), entry, number(entry, metric, content["file"])))
    lines = line_names([(size, entry) for size, entry, _ in found])
    points = [Point(size, line, entry.factor, value) for line, (size, entry, value) in zip(lines, found, strict=True)]
    twice = [key for key, count in Counter(point[:3] for point in points).items() if count > 1]
    if twice:
        size, line, factor = twice[0]
        raise DataError(
            f"two results for {line!r} at {factor:g}x and {size.height}x{size.width} pixels; leave one file out, or "
            "evaluate with other labels: LABEL=..."
        )
    return points


def draw_miou(points: Sequence[Point]) -> "Figure":
    """The figure: mIoU in percent with its 95 % interval."""
    sizes = sorted({point.size for point in points})
    lines = list(dict.fromkeys(point.line for point in points))
    figure = new_figure(0.4 + 2.9 * len(sizes), 3.1)
    places = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for axes, size in zip(places, sizes, strict=True):
        for index, line in enumerate(lines):
            some = sorted((p for p in points if p.size == size and p.line == line), key=lambda p: p.factor)
            axes.errorbar(
                [p.factor for p in some],
                [100 * p.miou.value for p in some],
                error_bars([p.miou for p in some], 100),
                label=line,
                elinewidth=0.8,
                capsize=2,
                **line_style(index),
            )
        style_axes(
            axes,
            x="upsampling factor",
            y="mIoU (%)" if axes is places[0] else "",
            title=f"input {size.height} x {size.width}",
        )
        factor_axis(axes, [p.factor for p in points if p.size == size])
    legend_below(figure, places[0])
    return figure
