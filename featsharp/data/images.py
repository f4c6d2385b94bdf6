"""Pictures: what counts as one, and its decoding into upright 8-bit RGB.

Convention:
    Pixels are upright (EXIF orientation applied), 8 bits per channel, RGB. Transparent pixels are composited over
    mid-grey, on which neither black nor white line art disappears. 16-bit levels map 0..65535 onto 0..255. Animations
    and files of several pages give their first picture. Colour profiles are not applied. docs/pictures.md has every
    pixel format.
"""

import functools
import io
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from featsharp.data._arrays import BACKGROUND, TAKEN, array_to_image, check_array, composite, describe, to_8_bits
from featsharp.errors import DataError, FeatSharpError, InputError
from featsharp.files import is_hidden, is_special
from featsharp.urls import redact_setting

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS: tuple[str, ...] = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)

# A path; the content of an image file, or the file open for reading; a Pillow image; the pixels, see `check_array`.
Picture: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[Any] | Tensor
)


def decode_image(data: Picture, *, name: str | None = None, upright: bool = True) -> Image.Image:
    """Decode one picture to upright 8-bit RGB.

    Args:
        data: The path of an image file, its content (bytes, or a file open for reading, read from its beginning), a
            Pillow image of any mode, or the pixels: an array or tensor [H, W], [H, W, c] or [c, H, W] of grey (c = 1),
            RGB or RGBA, with uint8 0..255, uint16 0..65535, bool or floating point in [0, 1]. It is left unchanged.
        name: Of the picture in errors; the path when there is one, else "image".
        upright: False leaves the EXIF orientation alone: labels and points belong to the pixels as they are stored.
            A TIFF that Pillow loaded from an open file, not a path, stays as Pillow turned it.

    Returns:
        A new Pillow image of mode RGB.

    Raises:
        DataError: The file is missing, empty, truncated, damaged, no image, larger than ``PIL.Image.MAX_IMAGE_PIXELS``,
            or of a pixel format without a known range (floating point, 32 bits; a Pillow image of mode I beyond 65535)
            or that is not read, which is named; or a loaded Pillow image no longer tells which format its file had.
            Damaged EXIF data alone is no error: the image counts as upright, as in viewers.
        InputError: The object is no picture: a URL, a batch, floats outside of [0, 1], a closed image, None ...
    """
    name = name or _name_of(data)
    try:
        image = _open(data)
        _check_size(image)
        header = _find_header(image)
        _refuse_unknown_pixels(header)
        tags = getattr(header, "tag_v2", None)
        stored_as = tags.get(ExifTags.Base.Orientation) if tags and not upright else None
        image = _load(image, header)
        if upright:
            image = _upright(image)
        elif stored_as in _TO_STORED:  # Pillow turns a TIFF while it loads it
            image = image.transpose(_TO_STORED[stored_as])
        return _to_rgb(image, tags)
    except FeatSharpError as error:
        raise type(error)(f"{name}: {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name}: {_TOO_LARGE} ({error})") from error
    except Exception as error:  # decoders raise any kind of exception for damaged files, from OSError to KeyError
        closed = isinstance(error, AssertionError | AttributeError) or "closed" in str(error)
        if isinstance(data, Image.Image) and closed:
            raise InputError(f"{name}: the PIL image is closed; call its load() before its file is closed") from error
        raise DataError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


def picture_to_tensor(picture: Picture) -> Tensor:
    """Convert a picture to a tensor [3, H, W], float32 in [0, 1].

    Floating-point pixels keep their precision; everything else is decoded to 8 bits by :func:`decode_image`, which
    says what is taken and which errors there are.
    """
    if isinstance(picture, (np.ndarray, Tensor)):
        array = check_array(picture)
        if array.dtype.kind == "f":
            return torch.from_numpy(composite(array)).permute(2, 0, 1).contiguous()
    return image_to_tensor(decode_image(picture))


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a tensor [3, H, W], float32 in [0, 1]; InputError for any other mode."""
    if image.mode != "RGB":
        raise InputError(f"expected an image of mode RGB, got {image.mode}; pass it through decode_image first")
    # In order while it is small: a copy of the largest picture as float32 takes a gigabyte.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(255)


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
    """Return whether a file or tar member counts as an image by name: known extension, no hidden part.

    Blanks and dots after the extension, as downloads have them, do not matter.
    """
    return not is_hidden(name) and PurePosixPath(name.rstrip(" .\r\n\t")).suffix.lower() in IMAGE_EXTENSIONS


# Pillow also opens formats that start other programs (EPS) or hold no photographs: not for data from anywhere.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
_STORE = "store it with 8 or 16 bits per channel"
_STORE_RGB = "store it as RGB with 8 or 16 bits per channel"
_LOST = "loaded already, it no longer tells the depth of its file; give the file or its bytes"
_FLOAT = f"floating-point pixels have no known range; {_STORE}"

Tags: TypeAlias = TiffImagePlugin.ImageFileDirectory_v2
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _COLOURS = 258, 259, 262, 284, 320
_INK_SET, _EXTRA, _SAMPLE_FORMAT, _SUB_FILES, _DNG = 332, 338, 339, 330, 50706
_WHITE_IS_ZERO, _UNCOMPRESSED, _APART = 0, 1, 2
_PHOTOMETRICS = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab", 32803: "raw sensor"}
_SAMPLES = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_BIG_ENDIAN = (b"MM\x00\x2a", b"MM\x2a\x00")

# Others that people try, by their first bytes.
_FOREIGN = {
    b"\xff\xd8\xff": "a JPEG that is lossless, of 12 bits, or has a damaged header",
    b"PF": "a PFM of floating-point colours",
    b"P7": "a PAM file",
    b"8BPS": "a Photoshop file",
    b"v/1\x01": "an OpenEXR file",
    b"\xff\x0a": "a JPEG XL file",
    b"\x00\x00\x00\x0cJXL ": "a JPEG XL file",
}
_TOO_LARGE = "too many pixels; raise PIL.Image.MAX_IMAGE_PIXELS if the file can be trusted"
# From upright to stored pixels, by EXIF orientation.
_TO_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# A scheme of two letters or more, which no drive has; a Path keeps one of the slashes.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/|(data):", re.IGNORECASE)


def _open(data: Picture) -> Image.Image:
    """Open a picture of any kind; nothing is decoded yet, except for arrays."""
    if isinstance(data, Image.Image):
        return data
    if isinstance(data, (np.ndarray, Tensor)):
        return array_to_image(check_array(data))
    if isinstance(data, (bytes, bytearray, memoryview)):
        if isinstance(data, memoryview) and (data.ndim != 1 or data.itemsize != 1):
            shape = " x ".join(map(str, data.shape or ()))
            raise InputError(
                f"a memoryview of {shape} items of {data.itemsize} bytes is no content of a file; give pixels as the "
                "array that it views"
            )
        return _open_file(bytes(data))
    if isinstance(data, (str, os.PathLike)):
        return _open_file(_read_path(os.fsdecode(data)))
    if callable(getattr(data, "read", None)):
        return _open_file(_read_file(data))
    raise InputError(f"{describe(data)} is no picture; {TAKEN}")


def _read_path(path: str) -> bytes:
    if not path:
        raise InputError(f"an empty path is no picture; {TAKEN}")
    if (scheme := _SCHEME.match(path)) and not os.path.exists(path):
        if scheme[2]:
            raise InputError("a data: URI is not read; give its bytes: base64.b64decode(text.partition(',')[2])")
        advice = "give the path alone" if scheme[1].lower() == "file" else "download it, and give the file or its bytes"
        raise InputError(f"{scheme[1]}: addresses are not read; {advice}")
    if "\0" in path:
        raise InputError(f"a string with null characters is no path; {TAKEN}")
    if is_special(path):
        raise DataError("a pipe or a device, whose end may never come; give its bytes, or the file open for reading")
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError("no such file") from error
    except (OSError, ValueError) as error:  # the latter for names that the file system cannot have
        if os.path.isdir(path):
            raise DataError("a folder; give a file, or a list of files") from error
        raise DataError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read_file(file: IO[bytes]) -> bytes:
    """Read the whole of an open file, wherever it stands."""
    if getattr(file, "closed", False):
        raise InputError("the file is closed; give it while it is open, or give its path")
    if hasattr(file, "readable") and not file.readable():
        raise InputError("the file is open for writing alone; open it with 'rb'")
    if file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek"):
        file.seek(0)
    encoded: object = file.read()
    if not isinstance(encoded, (bytes, bytearray)):
        raise InputError(f"the file gives {type(encoded).__name__} instead of bytes; open it with 'rb'")
    return bytes(encoded)


def _name_of(data: object) -> str:
    if not isinstance(data, (str, os.PathLike)):
        data = getattr(data, "filename", None) or getattr(data, "name", None)
    if not isinstance(data, (str, bytes, os.PathLike)):
        return "image"
    text = redact_setting(os.fsdecode(data))
    return (text if len(text) <= 300 else f"{text[:60]}...") or "image"


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"the image has no pixels ({width} x {height})")
    # Pillow only warns up to twice its limit.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise DataError(f"{_TOO_LARGE} ({width} x {height} pixels)")


def _upright(image: Image.Image) -> Image.Image:
    try:
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if rotated else image
    except Exception as error:  # damaged metadata around intact pixels, common in scraped photographs
        logger.debug("EXIF data cannot be read, the image counts as upright: %s", error)
        return image


def _open_file(encoded: bytes) -> Image.Image:
    """Open an image file of a known format; DataError says what another one is."""
    if not encoded:
        raise DataError("the file is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(encoded), formats=_known_formats())
    except UnidentifiedImageError as error:
        # Pillow lacks big-endian 16-bit grey of which 0 is white, and has the one of which 0 is black.
        mended = _black_is_zero(encoded)
        if mended is None:
            raise DataError(_describe_file(encoded)) from error
        image = Image.open(io.BytesIO(mended), formats=("TIFF",))
        image.tag_v2[_PHOTOMETRIC] = _WHITE_IS_ZERO  # type: ignore[attr-defined]
        return image


def _find_header(image: Image.Image) -> Image.Image:
    """Open the file of a loaded image again, as loading forgets the depth; without a file returns the image."""
    path = os.fsdecode(getattr(image, "filename", ""))
    if getattr(image, "tile", None) or image.format not in ("PNG", "TIFF", "JPEG2000") or not os.path.isfile(path):
        return image
    try:
        header = _open_file(_read_path(path))
        if image.format == "TIFF":
            header.seek(image.tell())
    except Exception:  # the file has changed
        return image
    return header if (header.format, header.mode) == (image.format, image.mode) else image


def _refuse_unknown_pixels(image: Image.Image) -> None:
    """Raise DataError for an opened image whose pixels have no known meaning, or that Pillow would misread."""
    reason = None
    if image.mode == "F":
        reason = _FLOAT
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        reason = _refuse_tiff(image.tag_v2)
        tile = image.tile[0] if image.tile and image.tag_v2.get(_PHOTOMETRIC) == 6 else None
        if not reason and tile and tile[0] == "raw" and "RGBX" in (tile[3] or ()):  # four bytes a pixel, before 13
            reason = f"a TIFF of uncompressed YCbCr, which Pillow before 13 misreads; {_STORE_RGB}"
    elif isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode == "CMYK" and "adobe" not in image.info:
        reason = "a CMYK JPEG without Adobe's marker; that says whether 0 is no ink or all of it, store it as RGB"
    elif image.mode == "RGB" and isinstance(key := image.info.get("transparency"), tuple):
        if max(key) > 255 or _raw_mode(image) == "RGB;16B":
            reason = "a PNG with a transparent colour of 16 bits per channel (tRNS); store it with an alpha channel"
        elif image.format == "PNG" and not _raw_mode(image):
            reason = f"a PNG with a transparent colour; {_LOST}"
    elif image.format == "JPEG2000":
        reason = _refuse_jpeg2000(image)
    if reason:
        raise DataError(reason)


def _load(image: Image.Image, header: Image.Image) -> Image.Image:
    """Load the pixels; where the transparent level of a PNG has other units than they have, returns a mended copy."""
    # Pillow spreads grey of 1, 2 and 4 bits over 0..255, and leaves the transparent level as it was (1 bit: before 11).
    raw_mode = _raw_mode(header) or ("1" if image.mode == "1" else "")
    step = {"1": 255, "L;2": 85, "L;4": 17}.get(raw_mode, 1)
    image.load()
    key = image.info.get("transparency")
    if image.mode == "L" and image.format in ("PNG", None) and not raw_mode and isinstance(key, int) and 0 < key < 16:
        levels = np.unique(np.asarray(image))
        if not (levels % 17).any() and {17 * key, 85 * key} & set(levels.tolist()):  # or 8 bits, nothing transparent
            raise DataError(f"a picture of few grey levels with a transparent one; {_LOST}")
    if step > 1 and isinstance(key, int):
        image = image.copy()
        image.info["transparency"] = min(255, key * step)
    return image


def _to_rgb(image: Image.Image, tags: Tags | None) -> Image.Image:
    """Convert a loaded image to a new one of mode RGB; ``tags`` are those of a TIFF."""
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        return _grey16_to_rgb(image, tags)
    if mode == "La":
        image = image.convert("LA")
    if mode in ("P", "PA") and tags and max(tags[_COLOURS]) < 256:
        image = image.copy()  # the colours of old writers have 8 bits, of which Pillow keeps the upper 8 of 16
        image.putpalette(bytes(tags[_COLOURS]), "RGB;L")
    if image.has_transparency_data:
        front = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), front).convert("RGB")
    return image.convert("RGB")


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """List those of our formats that this build of Pillow can read."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of how the pixels of a PNG lie in the file; "" once they are loaded."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if tiles and image.format == "PNG" else ""


def _grey16_to_rgb(image: Image.Image, tags: Tags | None) -> Image.Image:
    grey = np.asarray(image).astype(np.int32)
    top = 4095 if tags and tags.get(_BITS) == (12,) else 65535
    if grey.min() < 0 or grey.max() > top:
        raise DataError(f"grey values {grey.min()}..{grey.max()} are outside 0..{top}; {_STORE}")
    shown = to_8_bits(grey, top)
    if tags and tags.get(_PHOTOMETRIC, 0) == _WHITE_IS_ZERO:  # Pillow inverts up to 8 bits only
        shown = 255 - shown
    key = image.info.get("transparency")
    if key is not None:
        shown[grey == key] = BACKGROUND[0]
    return Image.fromarray(shown).convert("RGB")


def _refuse_tiff(tags: Tags) -> str | None:
    bits, extra = tags.get(_BITS, (1,)), tags.get(_EXTRA, ())
    formats, kind = set(tags.get(_SAMPLE_FORMAT, (1,))), tags.get(_PHOTOMETRIC)
    if 3 in formats:
        return _FLOAT
    if 2 in formats or max(bits) > 16:
        return f"a TIFF without a known range ({_samples(tags)}); {_STORE}"
    if tags.get(_INK_SET, 1) != 1:
        return "a TIFF of other inks than CMYK; store it as RGB"
    if _DNG in tags or (tags.get(254, 0) & 1 and _SUB_FILES in tags):
        return "a camera's raw file, of which only the preview would be read; convert it to an image"
    if tags.get(_PLANES, 1) == _APART and len(bits) > 1:
        plain = kind in (2, 5) and extra in ((), (2,)) and max(bits) == 8
        if kind in (0, 1, 8) or (tags.get(_COMPRESSION, 1) == _UNCOMPRESSED and not plain):
            return f"a TIFF with each channel apart ({_samples(tags)}); {_STORE_RGB}, the channels together"
    return None


def _refuse_jpeg2000(image: Image.Image) -> str | None:
    """Refuse depths that Pillow scales wrongly: white overflows to black from 9 bits on, and is grey below 8."""
    file = getattr(image, "fp", None)
    if file is None:
        return None if image.mode.startswith("I") else f"a JPEG 2000; {_LOST}"
    file.seek(0)
    header = file.read(1 << 16)
    file.seek(0)
    start = header.find(b"\xff\x4f\xff\x51")  # beginning of the code stream and its size marker
    if start < 0:
        return None
    channels = int.from_bytes(header[start + 40 : start + 42], "big")
    bits = [(header[start + 42 + 3 * channel] & 127) + 1 for channel in range(channels)]
    if min(bits) < 8 or (max(bits) > 8 and channels > 1):
        return f"a JPEG 2000 of a depth that is not read ({channels} x {max(bits)} bits); store it with 8 bits"
    return None


def _samples(tags: Tags) -> str:
    """Describe the samples of a TIFF, such as "3 x 32-bit unsigned, RGB"."""
    bits = tags.get(_BITS, (1,))
    count = max(len(bits), tags.get(277, 1))
    form = _SAMPLES.get(max(tags.get(_SAMPLE_FORMAT, (1,))), "unknown")
    kind = tags.get(_PHOTOMETRIC, 0)
    return f"{count} x {max(bits)}-bit {form}, {_PHOTOMETRICS.get(kind, 'other colours')}"


def _read_tags(encoded: bytes) -> Tags | None:
    """Read the tags of a TIFF's first page; None where that fails."""
    if not encoded.startswith((b"II", b"MM")):
        return None
    try:
        file = io.BytesIO(encoded)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if encoded[2] == 43 else 8))
        file.seek(tags.next)
        tags.load(file)
        return tags if _BITS in tags else None
    except Exception:  # a damaged directory raises anything
        return None


def _black_is_zero(encoded: bytes) -> bytes | None:
    """Return a big-endian TIFF of 16-bit grey with 0 for black instead of white; None for any other file."""
    if not encoded.startswith(_BIG_ENDIAN):
        return None
    tags = _read_tags(encoded)
    if tags is None or (tags[_BITS], tags.get(_PHOTOMETRIC), tags.get(_SAMPLE_FORMAT, (1,))) != ((16,), 0, (1,)):
        return None
    start = int.from_bytes(encoded[4:8], "big")
    entry = encoded.find(b"\x01\x06\x00\x03\x00\x00\x00\x01\x00\x00", start)  # the tag, SHORT, one value, white
    return None if entry < 0 else encoded[: entry + 9] + b"\x01" + encoded[entry + 10 :]


def _describe_file(encoded: bytes) -> str:
    """Say what a file is that Pillow does not read, and what to do."""
    if encoded.startswith(b"MM\x00\x2b"):
        return "a big-endian BigTIFF is not read; store it as a TIFF, or little-endian"
    tags = _read_tags(encoded)
    if tags is not None:
        return _refuse_tiff(tags) or f"a TIFF of samples that are not read ({_samples(tags)}); {_STORE_RGB}"
    if encoded[4:8] == b"ftyp" and encoded[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "a HEIC file is not read; convert it to JPEG or PNG"
    for start, what in _FOREIGN.items():
        if encoded.startswith(start):
            return f"{what} is not read; convert it to JPEG or PNG"
    text = os.fsdecode(encoded[:4096]).strip()
    if PurePosixPath(text).suffix.lower() in IMAGE_EXTENSIONS or ("\0" not in text and os.path.exists(text)):
        return "not the content of an image file but a path; give a path as a str or Path"
    return f"not an image that can be read; known are {', '.join(_known_formats())}"
