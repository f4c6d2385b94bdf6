"""One look for all figures: size, fonts, colours, grids, files.

Figures are matplotlib's, made without pyplot, so nothing is shared between them. Matplotlib is optional and imported
when the first figure is made.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featsharp.data.files import write_file
from featsharp.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; their yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Markers differ too: for prints in grey.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT, GRID = "#222222", "#767676", "#DDDDDD"
# Points: axis names and titles, numbers and captions, what may be small.
TITLE, TEXT, SMALL = 10, 9, 8

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


def octave_axis(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic x axis with plain numbers: 16, 32, 64, with some between them where all values are close."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    wide = max(values) > 8 * min(values)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0,) if wide else (1.0, 1.25, 1.5, 1.75)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.minorticks_off()


def error_bars(intervals: Sequence[tuple[float, float, float]], scale: float = 1.0) -> list[list[float]]:
    """(value, low, high) each to the lengths below and above the values that matplotlib's errorbar takes."""
    # Rounding, or a bootstrap far from its statistic, may leave a value outside of its own interval.
    return [
        [scale * max(0.0, value - low) for value, low, _ in intervals],
        [scale * max(0.0, high - value) for value, _, high in intervals],
    ]


def legend_below(figure: "Figure", axes: "Axes", *, columns: int = 4) -> None:
    """One legend for a whole figure: the lines of ``axes``, under everything, in at most ``columns`` columns."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), fontsize=SMALL, frameon=False
    )


def label_points(axes: "Axes", points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Write a label beside each point, where it covers neither a point nor another label.

    Call it when the limits of the axes are final. A label without a free place goes to the upper right.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    figure.draw_without_rendering()  # so that positions in pixels are final
    renderer = figure.canvas.get_renderer()
    reach = 5 * figure.dpi / 72  # half the side of a marker with some air
    marks = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in marks]
    # Corners first: lines and bars run through the sides.
    places = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (0, 1), (0, -1), (-1, 0))
    for number, (point, label) in enumerate(zip(points, labels, strict=True)):
        others = taken[:number] + taken[number + 1 :]
        note = axes.annotate(label, point, (0, 0), textcoords="offset points", fontsize=SMALL, color=INK)
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])  # readable where it crosses a line
        for right, up in (*places, places[0]):
            horizontal, vertical = ("center", "left", "right")[right], ("center", "bottom", "top")[up]
            # Points from the mark; corners are farther away than sides.
            offset = (right * (4 if up else 6), up * (3 if right else 6))
            note.set(position=offset, ha=horizontal, va=vertical)
            box = note.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and axes.bbox.y0 <= box.y0
            if inside and not any(box.overlaps(other) for other in others):
                break
        taken.append(note.get_window_extent(renderer))


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
