"""Tiles and a thumbnail of an image as tokens for a vision-language model, and what sharp features cost instead.

    python examples/vlm_tiles.py photo.jpg --backbone siglip2 --max-tiles 9

Vision towers see one small size. Vision-language models therefore cut a large image into tiles of that size, laid out
as its shape asks for, and add a thumbnail, the whole image at that size; the language model reads the tokens of both.
FeatSharp began with these tiles. This example prepares such tokens with any backbone, checks their number against the
layout, and prints it beside that of a sharp map, which has the details of the tiles and the view of the thumbnail.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from featsharp import create_backbone, create_encoder
from featsharp.backbones import Backbone
from featsharp.data.images import decode_image, image_to_tensor
from featsharp.model import InputConditioner
from featsharp.ops.resize import resize, size_of
from featsharp.ops.tiling import join_tiles, split_tiles


class VisionTokens(NamedTuple):
    """Input of the language model: the thumbnail's tokens, then those of the tiles as one map, both row by row."""

    tokens: Tensor  # [thumbnail + tiles, C]
    thumbnail: tuple[int, int]  # grid of the thumbnail
    tiles: tuple[int, int]  # layout of the tiles
    tile_map: tuple[int, int]  # grid of all tiles together


def choose_layout(size: tuple[int, int], tile: tuple[int, int], max_tiles: int) -> tuple[int, int]:
    """(rows, columns) of tiles for an image of ``size``.

    Of all layouts with at most ``max_tiles``, the one that shows most of its pixels when the image is fitted into it,
    enlarging nothing; of equals the one that leaves least of the tiles empty.
    """
    if max_tiles < 1:
        raise ValueError(f"max_tiles must be at least 1; got {max_tiles}")

    def shown_and_wasted(layout: tuple[int, int]) -> tuple[float, float]:
        height, width = layout[0] * tile[0], layout[1] * tile[1]
        scale = min(1.0, height / size[0], width / size[1])
        shown = scale**2 * size[0] * size[1]
        return shown, shown - height * width

    layouts = [(rows, cols) for rows in range(1, max_tiles + 1) for cols in range(1, max_tiles // rows + 1)]
    return max(layouts, key=shown_and_wasted)


def vision_tokens(pixels: Tensor, backbone: Backbone, max_tiles: int = 9) -> VisionTokens:
    """Tokens of one image [3, H, W] in [0, 1]; thumbnail and tiles go through the backbone as one batch."""
    native, channels = backbone.input_size, backbone.embed_dim
    rows, cols = layout = choose_layout((pixels.shape[1], pixels.shape[2]), native, max_tiles)
    images = InputConditioner(backbone.mean, backbone.std)(pixels)[None]
    tiles = split_tiles(resize(images, (rows * native[0], cols * native[1])), layout)
    features = backbone(torch.cat([resize(images, native), tiles])).features
    tile_map = join_tiles(features[1:], layout)
    tokens = torch.cat([grid.reshape(channels, -1).T for grid in (features[:1], tile_map)])
    return VisionTokens(tokens, size_of(features), layout, size_of(tile_map))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="a picture")
    parser.add_argument("--backbone", default="toy-vit", help="see featsharp ls backbones")
    parser.add_argument("--max-tiles", type=int, default=9)
    arguments = parser.parse_args(given)
    backbone = create_backbone(arguments.backbone)
    pixels = image_to_tensor(decode_image(arguments.image))
    with torch.no_grad():
        result = vision_tokens(pixels, backbone, arguments.max_tiles)
        sharp = create_encoder(backbone, "tile", 2).encode_image(arguments.image).high_res
    (h, w), (rows, cols), (tiled_h, tiled_w) = result.thumbnail, result.tiles, result.tile_map
    assert len(result.tokens) == h * w * (1 + rows * cols)
    print(f"thumbnail {h}x{w} = {h * w} tokens")
    print(f"{rows}x{cols} tiles, together {tiled_h}x{tiled_w} = {tiled_h * tiled_w} tokens")
    print(f"in all {len(result.tokens)} tokens of {backbone.embed_dim} channels, {1 + rows * cols} images encoded")
    print(f"a 2x sharp map: {sharp.shape[2]}x{sharp.shape[3]} = {sharp[0, 0].numel()} tokens")


if __name__ == "__main__":
    main()
