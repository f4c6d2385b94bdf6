"""PCA panels (FeatSharp, arXiv 2502.16025, figure 1): one basis for all maps of a row, so that colours mean the same.

The basis and the range of colours are those of the best map of the row: the backbone itself on the enlarged image where
it takes one, else the last column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL.Image import Image
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.model import SharpEncoder
from featsharp.visualization.figures.grid import Row, picture_grid
from featsharp.visualization.figures.maps import feature_maps, real_caption
from featsharp.visualization.pca import FeaturePCA

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PCARow:
    """Maps of one image by one backbone.

    Attributes:
        image: RGB [3, H, W] in [0, 1].
        maps: By caption, [1, C, h, w] each.
        best: Caption of the map that the basis is fitted on.
        label: At the left of the row.
        absent: By caption, why a map is missing.
    """

    image: Tensor
    maps: Mapping[str, Tensor]
    best: str
    label: str = ""
    absent: Mapping[str, str] | None = None


def pca_row(image: Image, encoders: Mapping[str, SharpEncoder], *, real: bool = True, label: str = "") -> PCARow:
    """Run one image through all encoders of one backbone."""
    backbone = next(iter(encoders.values())).backbone
    maps = feature_maps(image, encoders, real=real)
    caption = real_caption(max(encoder.factor for encoder in encoders.values()))
    absent = {}
    if real and caption not in maps:
        absent[caption] = "takes only\n{} x {} pixels".format(*backbone.input_size)
    best = caption if caption in maps else list(maps)[-1]
    return PCARow(image_to_tensor(image), maps, best, label, absent)


def pca_pictures(maps: Mapping[str, Tensor], best: str) -> dict[str, Tensor]:
    """Maps [1, C, h, w] by caption to RGB pictures [3, h, w], in the basis and range of the map ``best``."""
    colours = FeaturePCA(maps[best])
    return {caption: colours(features)[0] for caption, features in maps.items()}


def draw_pca(rows: Sequence[PCARow]) -> "Figure":
    """The figure: the image, the low resolution, the real high resolution, then the encoders."""
    return picture_grid([_row(row) for row in rows])[0]


def _row(row: PCARow) -> Row:
    drawn: dict[str, Tensor | str] = {**pca_pictures(row.maps, row.best)}
    low_res, *others = drawn
    pictures = {"image": row.image, low_res: drawn[low_res], **(row.absent or {}), **{k: drawn[k] for k in others}}
    return Row(pictures, row.image.shape[1] / row.image.shape[2], row.label)
