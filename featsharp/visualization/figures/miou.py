"""Segmentation quality by upsampling factor, a panel per input size (FeatSharp, arXiv 2502.16025, figure 3)."""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.errors import DataError
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
    error_bars,
    factor_axis,
    legend_beside,
    line_handle,
    line_style,
    new_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_results(parser, "segmentation")
    parser.add_argument("--metric", default="miou", help="name of the number to draw; default: miou")


def make_figure(arguments: argparse.Namespace) -> "Figure":
    results = [read_result(path, "segmentation") for path in arguments.results]
    return draw_miou(read_miou(results, arguments.metric), arguments.metric)


class Size(NamedTuple):
    """Pixels of the low-resolution pass."""

    height: int
    width: int


class Point(NamedTuple):
    """One encoder at one input size."""

    size: Size
    line: str  # the upsampler, or the encoder's label
    factor: float
    miou: Number
    backbone: str = ""
    identity: bool = False  # features of the backbone without an upsampler


def read_miou(contents: Iterable[Mapping[str, Any]], metric: str = "miou") -> list[Point]:
    """Read the points of results of ``featsharp eval segmentation``.

    Raises:
        DataError: For two encoders of one label, size and factor.
    """
    sized: list[tuple[Size, Entry, Number]] = []
    for content in contents:
        for entry in entries(content):
            try:
                height, width = entry.result["low_res_size"]
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{content['file']}: {entry.label!r} does not say its low_res_size") from error
            sized.append((Size(height, width), entry, number(entry, metric, content["file"])))
    lines = line_names([(size, entry) for size, entry, _ in sized])
    points = [
        Point(size, line, entry.factor, value, entry.backbone, entry.upsampler == "identity")
        for line, (size, entry, value) in zip(lines, sized, strict=True)
    ]
    twice = [key for key, count in Counter(point[:3] for point in points).items() if count > 1]
    if twice:
        size, line, factor = twice[0]
        raise DataError(
            f"two results for {line!r} at {factor:g}x and {size.height}x{size.width} pixels; leave one file out, or "
            "evaluate with other labels: LABEL=..."
        )
    return points


def draw_miou(points: Sequence[Point], metric: str = "miou") -> "Figure":
    """Draw mIoU in percent, or another number, with its 95 % interval.

    Where the features of the backbone itself were measured ("identity"), the lines of all upsamplers without a point at
    factor 1 start there.
    """
    name, scale = axis_name(metric)
    sizes = sorted({point.size for point in points})
    lines = list(dict.fromkeys(point.line for point in points))
    figure = new_figure(0.4 + 2.9 * len(sizes), 3.1)
    all_axes = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for axes, size in zip(all_axes, sizes, strict=True):
        for index, line in enumerate(lines):
            some = sorted((p for p in points if p.size == size and p.line == line), key=lambda p: p.factor)
            start = _start(points, some)
            if start is not None:
                ends = (start, some[0])
                style = {**line_style(index), "marker": "", "zorder": 1}
                axes.plot([p.factor for p in ends], [scale * p.miou.value for p in ends], **style)
            axes.errorbar(
                [p.factor for p in some],
                [scale * p.miou.value for p in some],
                error_bars([p.miou for p in some], scale),
                label=line,
                elinewidth=0.8,
                capsize=2,
                **line_style(index),
            )
        style_axes(
            axes,
            x="upsampling factor",
            y=name if axes is all_axes[0] else "",
            title=f"input {size.height} x {size.width}",
        )
        factor_axis(axes, [p.factor for p in points if p.size == size])
    legend_beside(figure, [line_handle(line, **line_style(index)) for index, line in enumerate(lines)])
    return figure


def _start(points: Sequence[Point], line: Sequence[Point]) -> Point | None:
    """Find the point of the backbone that a line starts from, if the line has no point at factor 1."""
    if not line or line[0].factor <= 1:
        return None
    starts = [p for p in points if p.identity and (p.size, p.backbone) == (line[0].size, line[0].backbone)]
    return starts[0] if len(starts) == 1 else None
