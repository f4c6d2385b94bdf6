"""Pictures in rows and columns: captions on top, row labels at the left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featsharp.errors import InputError
from featsharp.visualization.style import CAPTION, FAINT, INK, SMALL, TITLE, new_figure, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One row of pictures.

    Attributes:
        pictures: By caption: [3, h, w] in [0, 1] in colours, [h, w] in [0, 1] for the colour map, or text with the
            reason for none.
        aspect: Height over width of all of them for any grid: that of the image.
        label: At the left; "" for none.
    """

    pictures: Mapping[str, "Tensor | str"]
    aspect: float
    label: str = ""


def picture_grid(
    rows: Sequence[Row], *, cell: float = 1.6, colour_map: str = "viridis"
) -> tuple["Figure", list[dict[str, "Axes"]]]:
    """Draw all rows; cells of feature maps stay visible as squares.

    Args:
        rows: At least one. Columns are the captions of all rows; a row without a caption has a gap there.
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
    figure = new_figure(cell * len(captions) + 0.5, sum(heights) + 1.0, compressed=True)
    lines = figure.subplots(len(rows), len(captions), squeeze=False, height_ratios=heights)
    by_caption = []
    for row, height, line in zip(rows, heights, lines, strict=True):
        for caption, axes in zip(captions, line, strict=True):
            show_picture(axes, row.pictures.get(caption, ""), row.aspect, colour_map)
        line[0].set_ylabel(wrap(row.label, height, TITLE), fontsize=TITLE, color=INK)
        by_caption.append(dict(zip(captions, line, strict=True)))
    for caption, axes in zip(captions, lines[0], strict=True):
        axes.set_title(wrap(caption, cell, CAPTION), fontsize=CAPTION, color=INK)
    return figure, by_caption


def show_picture(axes: "Axes", picture: "Tensor | str", aspect: float, colour_map: str = "viridis") -> None:
    """Fill axes with a picture of a :class:`Row`, without frame and ticks."""
    axes.set_box_aspect(aspect)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if isinstance(picture, str):
        axes.text(0.5, 0.5, picture, transform=axes.transAxes, ha="center", va="center", fontsize=SMALL, color=FAINT)
        return
    pixels = picture.detach().float().clamp(0, 1).cpu()
    pixels = pixels.movedim(0, -1) if pixels.ndim == 3 else pixels
    axes.imshow(pixels.numpy(), aspect="auto", interpolation="nearest", cmap=colour_map, vmin=0, vmax=1)
