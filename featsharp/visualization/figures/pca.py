"""PCA panels (FeatSharp, arXiv 2502.16025, figure 1): one basis for all maps of a row, so that colours mean the same.

The basis and the range of colours are those of the best map of the row: the backbone itself on the enlarged image where
it takes one, else the last encoder.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featsharp.visualization.encoders import add_encoders, feature_maps, load_encoders, real_caption
from featsharp.visualization.grid import Row, picture_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from featsharp.builder import SharpEncoder
    from featsharp.data.images import Picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    add_encoders(parser)


def make_figure(arguments: argparse.Namespace) -> "Figure":
    by_backbone = load_encoders(arguments)
    return draw_pca(
        [
            pca_row(path, encoders, real=arguments.real, label=name if len(by_backbone) > 1 else "")
            for path in arguments.images
            for name, encoders in by_backbone.items()
        ]
    )


@dataclass(frozen=True)
class PCARow:
    """Maps of one image by one backbone.

    Attributes:
        image: RGB [3, H, W] in [0, 1].
        maps: By caption, [1, C, h, w] each.
        best: Caption of the map that the basis is fitted on.
        label: At the left of the row.
        absent: Reasons for missing maps, by caption.
    """

    image: "Tensor"
    maps: "Mapping[str, Tensor]"
    best: str
    label: str = ""
    absent: Mapping[str, str] | None = None


def pca_row(
    picture: "Picture", encoders: "Mapping[str, SharpEncoder]", *, real: bool = True, label: str = ""
) -> PCARow:
    """Encode one picture by all encoders of one backbone."""
    from featsharp.data.images import decode_image, image_to_tensor

    image = decode_image(picture)
    backbone = next(iter(encoders.values())).backbone
    maps = feature_maps(image, encoders, real=real)
    caption = real_caption(max(encoder.factor for encoder in encoders.values()))
    absent = {}
    if real and caption not in maps:
        absent[caption] = "takes only\n{} x {} pixels".format(*backbone.input_size)
    return PCARow(image_to_tensor(image), maps, list(maps)[-1], label, absent)


def pca_pictures(maps: "Mapping[str, Tensor]", best: str) -> "dict[str, Tensor]":
    """Turn maps [1, C, h, w] by caption into RGB pictures [3, h, w], in the basis and range of the map ``best``."""
    from featsharp.visualization.pca import FeaturePCA

    colours = FeaturePCA(maps[best])
    return {caption: colours(features)[0] for caption, features in maps.items()}


def draw_pca(rows: Sequence[PCARow]) -> "Figure":
    """Draw for each row the image, the low resolution, the encoders, then the backbone on the enlarged image."""
    return picture_grid(
        [
            Row(
                {"image": row.image, **pca_pictures(row.maps, row.best), **(row.absent or {})},
                row.image.shape[1] / row.image.shape[2],
                row.label,
            )
            for row in rows
        ]
    )[0]
