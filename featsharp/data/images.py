"""Decoding of image files of any pixel format into 8-bit RGB.

Convention:
    Pixels are upright (EXIF orientation applied), 8 bits per channel, RGB. Transparent pixels are composited over
    mid-grey, on which neither black nor white line art disappears. 16-bit grey maps 0..65535 onto 0..255. Animations
    give their first frame. Colour profiles are not applied.
"""

import functools
import io
import logging
import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from featsharp.errors import DataError, InputError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS: tuple[str, ...] = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
BACKGROUND = (128, 128, 128)

# Pillow also opens formats that start other programs (EPS) or hold no photographs: not for data from anywhere.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")


def decode_image(
    data: bytes | str | os.PathLike[str] | Image.Image, *, name: str | None = None, upright: bool = True
) -> Image.Image:
    """Decode one image to upright 8-bit RGB.

    Args:
        data: Encoded bytes, the path of a file, or a Pillow image of any mode (left unchanged).
        name: Of the image in errors; the path when there is one, else "image".
        upright: False leaves the EXIF orientation alone: labels and points belong to the pixels as they are stored.

    Returns:
        A new Pillow image of mode RGB.

    Raises:
        DataError: The file is missing, empty, truncated, damaged, no image, larger than ``PIL.Image.MAX_IMAGE_PIXELS``,
            or of a pixel type without a known range (float, 32-bit integer beyond 65535). Damaged EXIF data alone is
            no error: the image counts as upright, as in viewers.
    """
    name = name or _name_of(data)
    try:
        if isinstance(data, Image.Image):
            image = data
        else:
            encoded = data if isinstance(data, bytes) else Path(data).read_bytes()
            if not encoded:
                raise DataError(f"{name}: the file is empty (0 bytes)")
            image = Image.open(io.BytesIO(encoded), formats=_known_formats())
        _check_size(image, name)
        image.load()
        return _to_rgb(_upright(image) if upright else image, name)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name}: {_TOO_LARGE} ({error})") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image that can be read; known are {', '.join(_known_formats())}") from error
    except Exception as error:  # decoders raise any kind of exception for damaged files, from OSError to KeyError
        raise DataError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a tensor [3, H, W], float32 in [0, 1]; InputError for any other mode."""
    if image.mode != "RGB":
        raise InputError(f"expected an image of mode RGB, got {image.mode}; pass it through decode_image first")
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).to(torch.float32).div_(255).contiguous()


class EncodedImage(NamedTuple):
    """Bytes of a file, and (name, reason) of those skipped since the one before; without a name only the latter."""

    name: str
    data: bytes
    skipped: list[tuple[str, str]]


def try_decode(image: EncodedImage, skipped: list[tuple[str, str]]) -> Image.Image | None:
    """Decode to 8-bit RGB; None where that fails. Skipped images, failures included, are added to ``skipped``."""
    skipped += image.skipped
    if not image.name:
        return None
    try:
        return decode_image(image.data, name=image.name)
    except DataError as error:
        skipped.append((image.name, str(error).removeprefix(f"{image.name}: ")))
        return None


def is_image_name(name: str) -> bool:
    """Return whether a file or tar member counts as an image by name: known extension, no hidden part (``.x``)."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") and part not in (".", "..") for part in path.parts)
    return not hidden and path.suffix.lower() in IMAGE_EXTENSIONS


_TOO_LARGE = "too many pixels; raise PIL.Image.MAX_IMAGE_PIXELS if the file can be trusted"


def _name_of(data: object) -> str:
    if isinstance(data, (str, os.PathLike)):
        return os.fspath(data)
    return str(getattr(data, "filename", "") or "image")


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """List those of our formats that this build of Pillow can read."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{name}: the image has no pixels ({width} x {height})")
    # Pillow only warns up to twice its limit.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise DataError(f"{name}: {_TOO_LARGE} ({width} x {height} pixels)")


def _upright(image: Image.Image) -> Image.Image:
    try:
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if rotated else image
    except Exception as error:  # damaged metadata around intact pixels, common in scraped photographs
        logger.debug("EXIF data cannot be read, the image counts as upright: %s", error)
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        return _grey16_to_rgb(image, name)
    if mode == "F":
        raise DataError(f"{name}: floating-point pixels have no known range; store it with 8 or 16 bits per channel")
    if mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        front = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), front).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image, name: str) -> Image.Image:
    grey = np.asarray(image).astype(np.int32)
    if grey.min() < 0 or grey.max() > 65535:
        levels = f"{grey.min()}..{grey.max()}"
        raise DataError(f"{name}: grey values {levels} are outside 0..65535; store it with 8 or 16 bits per channel")
    # 65535 / 255 = 257 exactly; Pillow's conversion would clip at 255 instead.
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
