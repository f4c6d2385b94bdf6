"""Pixels that labels lie on: those of a picture as they are stored, or turned upright by its EXIF orientation.

An orientation applies to pictures, never to labels alone. Labels lie on the stored pixels, or on the upright ones where
their size shows it; where nothing shows it, as for a square picture, the pair is refused.
"""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from featsharp.data.images import decode_image
from featsharp.errors import DataError

# From this orientation on, height and width change places.
_ON_ITS_SIDE = 5
# One of them is in every PNG with an orientation, which Pillow finds by decoding the whole file.
_PNG_WORDS = (b"eXIf", b"exif", b"rientation")


class Frame(NamedTuple):
    """Pixels that labels lie on.

    Attributes:
        labels: Name of the labels, for messages.
        size: (h, w), None where the labels do not say it.
        orientation: EXIF orientation of the label file, 1 to 8; 1 for none.
        upright: Whether it was applied on reading, which Pillow does for TIFF alone.
    """

    labels: str
    size: tuple[int, int] | None = None
    orientation: int = 1
    upright: bool = False


def decode_labelled(picture: Path | bytes, name: str, frame: Frame) -> Image.Image:
    """Decode a picture to RGB, with the pixels that its labels lie on.

    Args:
        picture: Its file, or the content.
        name: Of the picture in errors.
        frame: Of its labels.

    Raises:
        DataError: As of :func:`decode_image`; when picture and labels have different sizes or orientations; and when
            nothing shows whether the labels lie on the stored or on the upright pixels.
    """
    with contextlib.suppress(OSError):  # decode_image says what is wrong
        picture = picture if isinstance(picture, bytes) else picture.read_bytes()
    image = decode_image(picture, name=name, upright=False)
    orientation = read_orientation(picture) if isinstance(picture, bytes) else 1
    size = (image.height, image.width)
    if frame.orientation == orientation:
        upright = frame.upright
    elif frame.orientation != 1:
        raise DataError(
            f"{frame.labels}: the labels have EXIF orientation {frame.orientation}, the image {name} has "
            f"{orientation}; store both upright, or remove the tag where it is wrong"
        )
    elif frame.size is None or orientation < _ON_ITS_SIDE or size[0] == size[1]:
        raise DataError(
            f"{name}: {frame.labels} may be for the pixels as stored, or for those that EXIF orientation {orientation} "
            "turns upright; remove the tag in the first case, store the picture upright in the second"
        )
    else:
        upright = frame.size == size[::-1]
    if upright:
        image = decode_image(picture, name=name)
        size = (image.height, image.width)
    if frame.size is not None and frame.size != size:
        (h, w), (height, width) = frame.size, size
        raise DataError(f"{frame.labels}: the labels are {h}x{w} pixels, the image {name} is {height}x{width}")
    return image


def read_orientation(encoded: bytes) -> int:
    """Read the EXIF orientation of an image file, 1 to 8; 1 where there is none, or it is damaged."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.format == "PNG" and not any(word in encoded for word in _PNG_WORDS):
                return 1
            tags = getattr(image, "tag_v2", None)  # which loading a TIFF removes
            number = (image.getexif() if tags is None else tags).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata raise any kind of exception; a damaged image is reported where it is decoded
        return 1
    return number if number in range(1, 9) else 1
