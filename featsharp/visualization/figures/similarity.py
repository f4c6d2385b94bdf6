"""Self-similarity maps (LiFT, arXiv 2403.14625): the cosine between the feature at one point and all others.

Drawn from 0 to 1; negative values are drawn as 0.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from featsharp.errors import ConfigError
from featsharp.visualization.encoders import add_encoders, feature_maps, load_encoders
from featsharp.visualization.grid import Row, picture_grid
from featsharp.visualization.style import INK, SMALL

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

CENTRE = (0.5, 0.5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--at", type=_parse_point, default=CENTRE, metavar="Y,X", help="the point, from 0 to 1; default: the centre"
    )
    parser.add_argument("--colours", choices=("viridis", "gray"), default="viridis")
    add_encoders(parser)


def make_figure(arguments: argparse.Namespace) -> "Figure":
    from featsharp.data.images import decode_image, image_to_tensor

    by_backbone = load_encoders(arguments)
    if len(by_backbone) > 1:
        raise ConfigError(f"a similarity figure is about one backbone; got {', '.join(by_backbone)}")
    (encoders,) = by_backbone.values()
    image = decode_image(arguments.image)
    maps = feature_maps(image, encoders, real=arguments.real)
    return draw_similarity(image_to_tensor(image), maps, at=arguments.at, colour_map=arguments.colours)


def draw_similarity(
    image: "Tensor", maps: "Mapping[str, Tensor]", *, at: tuple[float, float] = CENTRE, colour_map: str = "viridis"
) -> "Figure":
    """Draw the image and every map, a red marker at the point in all of them.

    Args:
        image: RGB [3, H, W] in [0, 1].
        maps: By caption, [1, C, h, w] each, of any size; the point is at the same position of the picture.
        at: (y, x) in [0, 1].
        colour_map: "viridis" or "gray".
    """
    from featsharp.visualization.similarity import self_similarity

    pictures: dict[str, Tensor] = {"image": image}
    pictures |= {caption: self_similarity(features, at).clamp(min=0) for caption, features in maps.items()}
    aspect = image.shape[1] / image.shape[2]
    figure, (by_caption,) = picture_grid([Row(pictures, aspect)], colour_map=colour_map)
    for caption, axes in by_caption.items():
        height, width = pictures[caption].shape[-2:]
        # Pixel i of a picture spans i - 0.5 to i + 0.5 in matplotlib.
        axes.plot(
            at[1] * width - 0.5, at[0] * height - 0.5, "o", color="#E00000", markersize=6, markeredgecolor="white"
        )
    last = list(by_caption.values())[-1]
    # As high as the pictures, which colorbar(ax=...) would not be.
    bar = figure.colorbar(last.images[0], cax=last.inset_axes((1.04, 0, 0.04, 1)), ticks=[0, 0.5, 1])
    bar.set_label("cosine,\nclipped to [0, 1]", fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)
    return figure


def _parse_point(text: str) -> tuple[float, float]:
    """Parse ``0.4,0.6`` to (0.4, 0.6), for argparse."""
    try:
        y, x = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no point; write Y,X from 0 to 1, for example 0.4,0.6") from error
    return y, x
