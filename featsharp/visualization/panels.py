"""Pictures side by side, as tensors; figures with captions need matplotlib."""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.data.files import write_file
from featsharp.errors import MissingDependencyError


def panel(pictures: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Join RGB pictures [3, h, w] in [0, 1] in a row, each enlarged to ``size`` with visible cells: [3, H, n * W]."""
    return torch.cat([F.interpolate(picture[None].cpu().float(), size, mode="nearest")[0] for picture in pictures], -1)


def save_picture(picture: Tensor, path: Path) -> None:
    """Write an RGB picture [3, h, w] in [0, 1] as PNG."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    write_file(path, encoded.getvalue())


def save_figure(rows: list[Mapping[str, Tensor]], path: Path, *, cell: float = 2.4) -> None:
    """Write a grid of captioned pictures.

    Args:
        rows: One mapping of caption to picture [3, h, w] per row; all rows have the same captions.
        path: PNG file.
        cell: Side of one picture in inches.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('figures need: pip install "featsharp[viz]"') from error
    captions = list(rows[0])
    # Rows as high as their first picture wants, so that wide pictures leave no gaps.
    heights = [cell * row[captions[0]].shape[-2] / row[captions[0]].shape[-1] for row in rows]
    figure = Figure(figsize=(cell * len(captions), sum(heights) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(captions), squeeze=False, height_ratios=heights)
    for line, row in zip(axes, rows, strict=True):
        for axis, caption in zip(line, captions, strict=True):
            axis.imshow(row[caption].clamp(0, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_axis_off()
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title(caption, fontsize=11)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=160)
    write_file(path, encoded.getvalue())
