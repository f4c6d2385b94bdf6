"""One look for all figures: size, fonts, colours, grids, files.

Figures are matplotlib's, made without pyplot, so nothing is shared between them. Matplotlib is optional and imported
when the first figure is made.
"""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featsharp.errors import ConfigError, MissingDependencyError
from featsharp.files import write_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, which colour-blind readers tell apart; their yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Markers differ too: for prints in grey.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT, GRID = "#222222", "#767676", "#DDDDDD"
# Points: axis names and titles, numbers and captions, what may be small.
TITLE, TEXT, SMALL = 10, 9, 8
# Where a label may stand: (right, up, distance). Corners first, since lines and bars run through the sides.
LABEL_PLACES = [
    (right, up, distance)
    for distance in (1, 2.5)
    for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (0, 1), (0, -1), (-1, 0))
]

# What a figure can be written as; pictures of dots at twice matplotlib's 100 per inch.
FORMATS = ("png", "pdf", "svg")
DOTS_PER_INCH = 200


def new_figure(width: float, height: float) -> "Figure":
    """An empty white figure of that many inches, whose parts are laid out without overlap.

    Raises:
        MissingDependencyError: Without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingDependencyError('figures need: pip install "featsharp[viz]"') from error
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: "Axes", *, x: str, y: str, title: str = "") -> None:
    """Names of both axes with their units, thin grid behind the data, no box."""
    axes.set_xlabel(x, fontsize=TEXT, color=INK)
    axes.set_ylabel(y, fontsize=TEXT, color=INK)
    if title:
        axes.set_title(title, fontsize=TITLE, color=INK)
    axes.tick_params(labelsize=SMALL, color=FAINT, labelcolor=INK, width=0.6, length=3)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=FAINT, linewidth=0.6)


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the ``number``-th line of a figure; the first 28 differ."""
    turn, place = divmod(number, len(COLOURS))
    dashes = ("-", "--", ":", "-.")[turn % 4]
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": dashes, "linewidth": 1.5, "markersize": 4.5}


def factor_axis(axes: "Axes", factors: Sequence[float]) -> None:
    """A logarithmic x axis with a tick at every factor: 1x, 2x, 4x."""
    ticks = sorted(set(factors))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()


def amount_axis(axes: "Axes", values: Sequence[float]) -> None:
    """An x axis with plain numbers, 1, 2, 5, 10, 20: logarithmic, but linear where all values are close."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if 0 < 8 * low <= high:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e4 * low else (1.0,)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))


def error_bars(intervals: Sequence[tuple[float, float, float]], scale: float = 1.0) -> list[list[float]]:
    """(value, low, high) each to the lengths below and above the values that matplotlib's errorbar takes."""
    # Rounding, or a bootstrap far from its statistic, may leave a value outside of its own interval.
    return [
        [scale * max(0.0, value - low) for value, low, _ in intervals],
        [scale * max(0.0, high - value) for value, _, high in intervals],
    ]


def line_handle(label: str, **style: Any) -> "Line2D":
    """An entry of a legend: a line with its marker."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def legend_below(figure: "Figure", handles: Sequence["Artist"], *, columns: int = 4) -> None:
    """One legend for a whole figure, under everything, in as many columns as fit its width, at most ``columns``.

    The figure grows by the height of the legend, so that the panels keep theirs.
    """
    labels = [wrap(str(handle.get_label()), figure.get_figwidth() - 0.5, SMALL) for handle in handles]
    for count in range(min(columns, len(labels)), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=count, fontsize=SMALL, frameon=False)
        box = legend.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        if box.width <= figure.bbox.width or count == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def wrap(text: str, width: float, size: float) -> str:
    """Text broken into lines of at most about ``width`` inches, for letters of ``size`` points."""
    # A letter of matplotlib's font is 0.6 of its size wide on average.
    return textwrap.fill(text, max(1, int(width * 72 / (0.6 * size))))


def line_height(size: float) -> float:
    """Inches from line to line of text of ``size`` points."""
    return 1.25 * size / 72


def label_points(axes: "Axes", points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Write a label beside each point, where it covers no point, no other label and, if possible, no line.

    Call it when the limits of the axes are final. A label without a free place goes to the upper right.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    figure.draw_without_rendering()  # so that positions in pixels are final
    renderer = figure.canvas.get_renderer()
    lines = _drawn_paths(axes)
    reach = 5 * figure.dpi / 72  # half the side of a marker with some air
    marks = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in marks]
    for number, (point, label) in enumerate(zip(points, labels, strict=True)):
        others = taken[:number] + taken[number + 1 :]
        note = axes.annotate(label, point, (0, 0), textcoords="offset points", fontsize=SMALL, color=INK)
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])  # readable where it crosses a line
        free: list[tuple[int, int, tuple[int, int, float]]] = []
        for place in LABEL_PLACES:
            _put(note, *place)
            box = note.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and axes.bbox.y0 <= box.y0
            if inside and not any(box.overlaps(other) for other in others):
                crossed = sum(path.intersects_bbox(box.padded(2), filled=False) for path in lines)
                free.append((crossed, len(free), place))
        _put(note, *(min(free)[2] if free else LABEL_PLACES[0]))
        taken.append(note.get_window_extent(renderer))


def _put(note: Any, right: int, up: int, distance: float) -> None:
    """Move a label to a side or corner of its point, ``distance`` times as far as the nearest place."""
    horizontal, vertical = ("center", "left", "right")[right], ("center", "bottom", "top")[up]
    # Points from the mark; corners are farther away than sides.
    offset = (distance * right * (4 if up else 6), distance * up * (3 if right else 6))
    note.set(position=offset, ha=horizontal, va=vertical)


def _drawn_paths(axes: "Axes") -> list[Any]:
    """Lines and error bars as paths in pixels."""
    lines: list[Any] = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    bars: list[Any] = [
        collection.get_transform().transform_path(path)
        for collection in axes.collections
        for path in collection.get_paths()
    ]
    return [path for path in (*lines, *bars) if len(path.vertices) > 1]


def check_output(path: Path) -> Path:
    """The path of a figure, if it can be written as its suffix says.

    Raises:
        ConfigError: For another suffix than .png, .pdf or .svg.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise ConfigError(f"figures are .png, .pdf or .svg files; got {path.name!r}")
    return path


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, PDF or SVG by the suffix of ``path``: the same bytes for the same figure.

    Raises:
        ConfigError: For another suffix.
        FeatSharpError: When it cannot be written.
    """
    from matplotlib import rc_context

    kind = check_output(path).suffix.lower().removeprefix(".")
    undated: dict[str, Any] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    encoded = io.BytesIO()
    # Letters as text of a scalable font in PDFs, and SVG names that do not change from run to run.
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "featsharp"}):
        figure.savefig(
            encoded, format=kind, dpi=DOTS_PER_INCH, metadata=undated[kind], bbox_inches="tight", pad_inches=0.04
        )
    write_file(path, encoded.getvalue())
