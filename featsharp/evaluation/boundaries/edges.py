"""Where a feature map changes: the distance between neighbouring cells, at every pixel, thinned to lines.

Distances are between features of unit length, so they have the same scale for every backbone and one loud token is no
edge. The distance between two neighbours sits on the border between them: differences around the centre of a cell would
see a sharp step twice and blur it. Changes along either axis are thinned along that axis, apart from each other: where
one thing's corner or several things meet there is no single direction to look across. The price is that slanted edges
come out up to two pixels thick.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import InputError
from featsharp.ops.resize import resize, size_of

__all__ = ["neighbour_distances", "thin_edges"]


def neighbour_distances(features: Tensor) -> tuple[Tensor, Tensor]:
    """The root of the squared differences between neighbours of unit length, summed over channels: from 0 to 2.

    Args:
        features: [C, h, w] floating point, at least 2 x 2 cells.

    Returns:
        Between the cells above and below [h - 1, w], and to the left and right [h, w - 1], float32.
    """
    if min(size_of(features)) < 2:
        raise InputError(f"edges need a map of at least 2x2 cells; got {tuple(features.shape[-2:])}")
    cells = F.normalize(features.float(), dim=0)
    return cells.diff(dim=1).norm(dim=0), cells.diff(dim=2).norm(dim=0)


def thin_edges(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Edge strength of a feature map on the lines where it is largest, zero elsewhere.

    Args:
        features: [C, h, w], covering the whole picture; one finer than its pixels is averaged first.
        size: (H, W) of the picture.

    Returns:
        [H, W] float32 on the device of the features: :func:`neighbour_distances` of either axis, bilinearly enlarged,
        where neither pixel next to it along that axis is larger (non-maximum suppression); the larger of both axes.
    """
    h, w = size_of(features)
    vertical, horizontal = neighbour_distances(resize(features[None].float(), (min(h, size[0]), min(w, size[1])))[0])
    return torch.maximum(_ridges(_enlarge(vertical, size, 0)), _ridges(_enlarge(horizontal, size, 1).T).T)


def _ridges(values: Tensor) -> Tensor:
    """[H, W] values larger than those above and not smaller than those below, else 0; one pixel of a plateau stays."""
    padded = F.pad(values[None], (0, 0, 1, 1), mode="replicate")[0]
    return values * ((values > padded[:-2]) & (values >= padded[2:]))


def _enlarge(values: Tensor, size: tuple[int, int], between: int) -> Tensor:
    """Bilinear to [H, W] pixels; along the axis ``between`` the values sit on the borders between cells."""
    # Nothing changes across the frame of the picture: 0 there keeps the outermost borders peaks.
    values = F.pad(values, (0, 0, 1, 1) if between == 0 else (1, 1))
    axes = []
    for axis, (pixels, count) in enumerate(zip(size, values.shape, strict=True)):
        cells, first = (count - 1, 0.0) if axis == between else (count, 0.5)
        position = (torch.arange(pixels, device=values.device) + 0.5) * (cells / pixels) - first
        axes.append(position * (2 / max(count - 1, 1)) - 1)  # -1 and 1: the first and the last value
    y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([x, y], -1)[None]
    return F.grid_sample(values[None, None], grid, align_corners=True, padding_mode="border")[0, 0]
