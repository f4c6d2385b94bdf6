"""Pictures in rows and columns: captions on top, row labels at the left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from featsharp.errors import InputError
from featsharp.visualization.style import FAINT, INK, SMALL, TITLE, line_height, new_figure, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """One row of pictures.

    Attributes:
        pictures: By caption: [3, h, w] in [0, 1] in colours, [h, w] in [0, 1] for the colour map, or a text that says
            why there is none.
        aspect: Height over width of all of them, whatever grid they have: that of the image.
        label: At the left; "" for none.
    """

    pictures: Mapping[str, Tensor | str]
    aspect: float
    label: str = ""


def picture_grid(
    rows: Sequence[Row], *, cell: float = 2.0, colour_map: str = "viridis"
) -> tuple["Figure", list[dict[str, "Axes"]]]:
    """A figure of all rows; cells of feature maps stay visible as squares.

    Args:
        rows: At least one. Columns are the captions of all rows; a row that lacks one has a gap there.
        cell: Width of a picture in inches.
        colour_map: Of matplotlib, for pictures of one channel.

    Returns:
        The figure, and for every row its axes by caption, in which one unit is one cell of the map.

    Raises:
        InputError: For no rows.
    """
    captions = list(dict.fromkeys(caption for row in rows for caption in row.pictures))
    if not captions:
        raise InputError("a figure of pictures needs at least one row with one picture")
    heights = [cell * row.aspect for row in rows]
    titles = {caption: wrap(caption, cell, TITLE) for caption in captions}
    labels = [wrap(row.label, height, SMALL) for row, height in zip(rows, heights, strict=True)]
    margin = max((label.count("\n") + 1) * line_height(SMALL) if label else 0.0 for label in labels)
    lines_of_titles = 1 + max(title.count("\n") for title in titles.values())
    figure = new_figure(cell * len(captions) + 1.8 * margin, sum(heights) + lines_of_titles * line_height(TITLE) + 0.13)
    lines = figure.subplots(len(rows), len(captions), squeeze=False, height_ratios=heights)
    found = []
    for row, line, label in zip(rows, lines, labels, strict=True):
        for caption, axes in zip(captions, line, strict=True):
            _fill(axes, row.pictures.get(caption, ""), row.aspect, colour_map)
        line[0].set_ylabel(label, fontsize=SMALL, color=INK)
        found.append(dict(zip(captions, line, strict=True)))
    for caption, axes in zip(captions, lines[0], strict=True):
        axes.set_title(titles[caption], fontsize=TITLE, color=INK)
    return figure, found


def _fill(axes: "Axes", picture: Tensor | str, aspect: float, colour_map: str) -> None:
    axes.set_box_aspect(aspect)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if isinstance(picture, str):
        axes.text(0.5, 0.5, picture, transform=axes.transAxes, ha="center", va="center", fontsize=SMALL, color=FAINT)
        return
    pixels = picture.detach().float().clamp(0, 1).cpu()
    pixels = pixels.movedim(0, -1) if pixels.ndim == 3 else pixels
    axes.imshow(pixels.numpy(), aspect="auto", interpolation="nearest", cmap=colour_map, vmin=0, vmax=1)
