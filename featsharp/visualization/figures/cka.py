"""Similarity (linear CKA) of features between input sizes: a heat map per encoder (LiFT, arXiv 2403.14625)."""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.errors import DataError
from featsharp.visualization.results import add_results, entries, read_result
from featsharp.visualization.style import INK, SMALL, TEXT, TITLE, new_figure, wrap

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

# Most panels to a line.
PER_LINE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_results(parser, "cka")


def make_figure(arguments: argparse.Namespace) -> "Figure":
    return draw_cka(read_cka(read_result(path, "cka") for path in arguments.results))


class Matrix(NamedTuple):
    """CKA between all pairs of sizes for one encoder."""

    label: str
    sizes: list[str]
    values: "np.ndarray"  # [n, n], rows are the source, columns the destination


def read_cka(contents: Iterable[Mapping[str, Any]]) -> list[Matrix]:
    """Read the matrices of results of ``featsharp eval cka``."""
    import numpy as np

    matrices = []
    for content in contents:
        for entry in entries(content):
            try:
                sizes = [str(size) for size in entry.result["sizes"]]
                values = np.array(entry.result["matrix"], dtype=np.float64)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{content['file']}: {entry.label!r} has no matrix of CKA ({error!r})") from error
            if values.shape != (len(sizes), len(sizes)):
                raise DataError(
                    f"{content['file']}: {entry.label!r} has {len(sizes)} sizes but a matrix of {values.shape}"
                )
            matrices.append(Matrix(entry.label, sizes, values))
    return matrices


def draw_cka(matrices: Sequence[Matrix]) -> "Figure":
    """Draw all panels on one scale from 0 to 1, every value in its cell."""
    import numpy as np

    side = max(1.9, 0.42 * max(len(matrix.sizes) for matrix in matrices) + 0.5)
    lines = math.ceil(len(matrices) / PER_LINE)
    columns = math.ceil(len(matrices) / lines)  # so that all lines are about as long
    figure = new_figure(side * columns + 0.9, (side + 0.4) * lines, compressed=True)
    all_axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, matrix in zip(all_axes, matrices, strict=False):
        picture = axes.imshow(matrix.values, vmin=0, vmax=1, cmap="viridis")
        for (row, column), value in np.ndenumerate(matrix.values):
            # White on the dark half of the colour map, ink on the bright one.
            colour = "white" if value < 0.6 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=SMALL, color=colour)
        axes.set_title(wrap(matrix.label, side - 0.3, TITLE), fontsize=TITLE, color=INK)
        ticks = range(len(matrix.sizes))
        axes.set_xticks(ticks, matrix.sizes, rotation=45 if max(map(len, matrix.sizes)) > 3 else 0)
        axes.set_yticks(ticks, matrix.sizes)
        axes.tick_params(labelsize=SMALL, length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
    for axes in all_axes[len(matrices) :]:
        axes.remove()
    figure.supxlabel("input size, destination (pixels)", fontsize=TEXT, color=INK)
    figure.supylabel("input size, source (pixels)", fontsize=TEXT, color=INK)
    bar = figure.colorbar(picture, ax=all_axes[: len(matrices)], aspect=22, pad=0.01, ticks=[0, 0.5, 1])
    bar.set_label("linear CKA", fontsize=TEXT, color=INK)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)
    return figure
