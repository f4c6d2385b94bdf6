"""Pictures side by side with captions, as tensors; matplotlib is not needed."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from featsharp.files import write_file
from featsharp.ops.resize import resize

# Pixels: white between captioned pictures, and letters at their largest and smallest.
GAP, LETTERS, LEAST_LETTERS = 8, 20, 8
# Longer side in pixels of each picture of a comparison.
PICTURE_SIDE = 448


def panel(pictures: Sequence[Tensor], size: tuple[int, int], captions: Sequence[str] = ()) -> Tensor:
    """Join RGB pictures in a row, each enlarged to one size with visible cells.

    Args:
        pictures: [3, h, w] each, in [0, 1]; h and w need not agree.
        size: (H, W) in pixels of each picture.
        captions: Texts, one per picture, for a white line above the pictures, which then have gaps; () for none.

    Returns:
        [3, H, n * W] in [0, 1], float32 on the CPU; with captions [3, H + line, n * W + (n - 1) * GAP].
    """
    enlarged = [F.interpolate(picture[None].cpu().float(), size, mode="nearest")[0] for picture in pictures]
    if not captions:
        return torch.cat(enlarged, -1)
    height = _font_size(captions, size[1])
    columns: list[Tensor] = []
    for picture, text in zip(enlarged, captions, strict=True):
        columns += [
            torch.cat([_line_of_text(text, size[1], height), picture], 1),
            torch.ones(3, 1, GAP, dtype=torch.float32, device="cpu"),
        ]
    total = columns[0].shape[1]
    return torch.cat([column.expand(3, total, -1) for column in columns[:-1]], -1)


def compare_maps(
    image: Tensor,
    low_res: Tensor,
    high_res: Tensor,
    colour: Callable[[Tensor], Tensor],
    label: str,
    title: str = "image",
) -> Tensor:
    """Draw a picture, its low-resolution and its sharp features side by side, with captions.

    Of several maps stacked on the channel axis (S2) the last one, of the largest scale, is drawn.

    Args:
        image: RGB [3, h, w] in [0, 1].
        low_res: [1, C, h, w].
        high_res: [1, n * C, H, W].
        colour: From [1, C, h, w] to RGB [1, 3, h, w] in [0, 1].
        label: Caption of the sharp features, beside their size.
        title: Caption of the picture.

    Returns:
        [3, H, W] in [0, 1], the longer side of each picture :data:`PICTURE_SIDE` pixels.
    """
    scale = PICTURE_SIDE / max(image.shape[1:])
    shape = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[2] * scale)))
    # Cells that the picture has no room for are left out first: a map with a cell per pixel may exceed the memory.
    down, right = (max(1, cells // side) for cells, side in zip(high_res.shape[2:], shape, strict=True))
    shown = high_res[:, -low_res.shape[1] :, down // 2 :: down, right // 2 :: right]
    pictures = [resize(image[None], shape)[0], colour(low_res)[0], colour(shown)[0]]
    return panel(pictures, shape, [title, f"low resolution {size_text(low_res)}", f"{label} {size_text(high_res)}"])


def size_text(features: Tensor) -> str:
    """Format the size of a map [..., h, w] as ``hxw``."""
    return "x".join(map(str, features.shape[-2:]))


def save_picture(picture: Tensor, path: Path) -> None:
    """Write an RGB picture [3, h, w] in [0, 1] as PNG."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    write_file(path, encoded.getvalue())


def _font_size(captions: Sequence[str], width: int) -> int:
    """Compute the largest size in pixels in which every caption is at most ``width`` pixels wide."""
    sizes = range(LETTERS, LEAST_LETTERS, -1)
    fonts = {size: ImageFont.load_default(size) for size in sizes}
    fitting = (size for size in sizes if all(fonts[size].getlength(text) <= width for text in captions))
    return next(fitting, LEAST_LETTERS)


def _line_of_text(text: str, width: int, size: int) -> Tensor:
    """Draw black text in the middle of a white line [3, 1.5 * size, width]; wider text is cut off."""
    line = Image.new("RGB", (width, round(1.5 * size)), "white")
    middle = (width / 2, line.height / 2)
    ImageDraw.Draw(line).text(middle, text, fill="black", font=ImageFont.load_default(size), anchor="mm")
    return torch.from_numpy(np.array(line)).permute(2, 0, 1).float() / 255
