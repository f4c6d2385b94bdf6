"""Common style of all figures: size, fonts, colours, grids, files.

Figures are matplotlib's, made without pyplot and its global state. Matplotlib is optional and imported when the first
figure is made.
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

# Okabe and Ito's colours, which colour-blind readers can distinguish; their yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Markers differ too: for prints in grey.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT, GRID = "#222222", "#767676", "#DDDDDD"
# Points: captions of pictures, titles, names of axes, small text.
CAPTION, TITLE, TEXT, SMALL = 12, 10, 9, 8
# Inches of the widest legend.
LEGEND_WIDTH = 2.2
# File formats; raster images at twice matplotlib's 100 dots per inch.
FORMATS = ("png", "pdf", "svg")
DOTS_PER_INCH = 200


def new_figure(width: float, height: float, *, compressed: bool = False) -> "Figure":
    """Make an empty white figure, whose parts matplotlib lays out without overlap.

    Args:
        width: In inches.
        height: In inches.
        compressed: Whether axes of fixed aspect move together, leaving the rest of the figure empty at its borders.

    Raises:
        MissingDependencyError: Without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingDependencyError('figures need: pip install "featsharp[viz]"') from error
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04, wspace=0.02, hspace=0.02, compress=compressed)
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: "Axes", *, x: str, y: str, title: str = "") -> None:
    """Set names of both axes with their units, a thin grid behind the data, no box."""
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
    """Return colour, marker and dashes of the ``number``-th line of a figure; the first 28 differ."""
    cycle, index = divmod(number, len(COLOURS))
    dashes = ("-", "--", ":", "-.")[cycle % 4]
    return {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": dashes, "linewidth": 1.5, "markersize": 4.5}


def factor_axis(axes: "Axes", factors: Sequence[float]) -> None:
    """Set up a logarithmic x axis with a tick at every factor: 1x, 2x, 4x."""
    ticks = sorted(set(factors))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()


def amount_axis(axes: "Axes", values: Sequence[float]) -> None:
    """Set up an x axis with plain numbers, 1, 2, 5, 10, 20: logarithmic, but linear where all values are close."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = min(values), max(values)
    if 0 < 8 * low <= high:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e4 * low else (1.0,)))
        axes.minorticks_off()
    else:
        axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))


def error_bars(intervals: Sequence[tuple[float, float, float]], scale: float = 1.0) -> list[list[float]]:
    """Turn (value, low, high) each into the lengths below and above the values that matplotlib's errorbar takes."""
    # Rounding, or a bootstrap far from its statistic, may leave a value outside of its interval.
    return [
        [scale * max(0.0, value - low) for value, low, _ in intervals],
        [scale * max(0.0, high - value) for value, _, high in intervals],
    ]


def line_handle(label: str, **style: Any) -> "Line2D":
    """Make an entry of a legend: a line with its marker."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def legend_beside(figure: "Figure", handles: Sequence["Artist"]) -> None:
    """Add one legend at the right of a figure, which grows by the legend's width, so that panels keep theirs."""
    labels = [wrap(str(handle.get_label()), LEGEND_WIDTH, SMALL) for handle in handles]
    legend = figure.legend(handles, labels, loc="outside right upper", fontsize=SMALL, frameon=False)
    box = legend.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    figure.set_figwidth(figure.get_figwidth() + box.width / figure.dpi)


def wrap(text: str, width: float, size: float) -> str:
    """Break text into lines of at most about ``width`` inches, for letters of ``size`` points."""
    # A letter of matplotlib's font is 0.6 of its size wide on average.
    return textwrap.fill(text, max(1, int(width * 72 / (0.6 * size))))


def check_output(path: Path) -> Path:
    """Return the path of a figure after a check of its suffix.

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
    # Text in a scalable font in PDFs, and SVG names that do not change from run to run.
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "featsharp"}):
        figure.savefig(
            encoded, format=kind, dpi=DOTS_PER_INCH, metadata=undated[kind], bbox_inches="tight", pad_inches=0.04
        )
    write_file(path, encoded.getvalue())
