"""Label files: lossless images whose pixels are numbers, or colours.

Pillow prepares pixels for the eye; here they come as they are stored: numbers of few bits are not spread over 0..255,
and a TIFF whose zero is white is not inverted.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from featsharp.errors import DataError
from featsharp.evaluation.layouts.frames import Frame, read_orientation

# Lossless formats: JPEG would mix the numbers of neighbouring classes.
SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
_OTHER_SUFFIXES = (".jpg", ".jpeg", ".webp", ".npy", ".npz", ".mat", ".json", ".txt", ".xml")
_FORMATS = ("PNG", "BMP", "GIF", "TIFF", "PPM")
_NUMBER_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L")
# Steps between the numbers of 2 and 4 bits, which Pillow spreads.
_STEPS = {"2": 85, "4": 17}
_SAMPLE_FORMAT = 339  # of TIFF; 2: with a sign

# A value from here on is a colour: COLOUR + 65536 red + 256 green + blue.
COLOUR = 1 << 40


class LabelFile(NamedTuple):
    """A label file.

    Attributes:
        values: [H, W], integers: numbers or colours.
        frame: Pixels of the picture that they lie on.
        palette: [n, 3] where the values are its indices.
    """

    values: np.ndarray
    frame: Frame
    palette: np.ndarray | None = None


def read_label_file(path: Path, name: str, colours: Sequence[int] = ()) -> LabelFile:
    """Read the values of all pixels.

    Args:
        path: A lossless image of one page. An alpha channel that is the same everywhere is left out.
        name: Of the file in errors.
        colours: Of the classes, as values, where colours mean classes. Without them, RGB files are numbers where their
            channels are equal, and palette files are the indices, or the grey levels of a grey palette.

    Raises:
        DataError: When it is missing or damaged, or its pixels are neither numbers nor colours.
    """
    try:
        encoded = path.read_bytes()
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            pages = getattr(image, "n_frames", 1)
            packing, signed = _packing(image), 2 in _tag(image, _SAMPLE_FORMAT)
            image.load()
    except FileNotFoundError as error:
        other = next((suffix for suffix in _OTHER_SUFFIXES if path.with_suffix(suffix).is_file()), "")
        hint = f"; {path.stem}{other} is none, which is a lossless image such as png" if other else ""
        raise DataError(f"{name}: no such label file{hint}") from error
    except Exception as error:  # decoders raise any kind of exception for damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"no {', '.join(_FORMATS)} with known pixels" if unknown else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{name}: cannot be read as labels, which are a lossless image such as png ({reason})"
        ) from error
    if pages > 1:
        raise DataError(f"{name}: labels are an image of one page; this one has {pages}")
    if len(image.getbands()) > 1 and str(packing).startswith("16"):
        raise DataError(
            f"{name}: labels of several channels of 16 bits lose half of these; store one number per pixel in a grey "
            "image of 16 bits"
        )
    pixels, mode = _without_alpha(np.asarray(image), image.mode, name)
    orientation = read_orientation(encoded)
    turned = image.format == "TIFF" and orientation != 1
    frame = Frame(name, (image.height, image.width), orientation, turned)
    if mode == "RGB":
        coloured = bool(colours) or (pixels != pixels[..., :1]).any()
        return LabelFile(pack(pixels) if coloured else pixels[..., 0], frame)
    if mode == "P":
        palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
        values = _read_indices(pixels, palette, colours)
        return LabelFile(values, frame, palette if values is pixels else None)
    if mode not in _NUMBER_MODES:
        raise DataError(
            f"{name}: labels are one number per pixel in a grey or palette image; this one is {image.mode}, with "
            f"{len(image.getbands())} channel(s)"
        )
    if mode == "L" and signed:
        return LabelFile(pixels.view(np.int8), frame)
    return LabelFile(_restore(pixels, mode, packing), frame)


def pack(colours: np.ndarray) -> np.ndarray:
    """Make values [...] int64 of colours [..., 3], 0..255."""
    return COLOUR + colours.astype(np.int64) @ np.array([65536, 256, 1])


def spell(value: int) -> str:
    """Format a value: 7, or (128, 0, 0)."""
    return str(value) if value < COLOUR else str(tuple((value >> shift) & 255 for shift in (16, 8, 0)))


def ranges(numbers: Iterable[int]) -> str:
    """Format 0, 1, 2, 3, 7 as ``0..3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


def _read_indices(indices: np.ndarray, palette: np.ndarray, colours: Sequence[int]) -> np.ndarray:
    """Return the indices themselves, or the colours or greys that they stand for."""
    if indices.max(initial=0) >= len(palette):
        return indices
    if colours:
        packed = pack(palette)
        return indices if packed[: len(colours)].tolist() == list(colours) else packed[indices]
    # Programs that shrink files number the greys of an image anew.
    return palette[indices, 0] if (palette == palette[:, :1]).all() else indices


def _without_alpha(pixels: np.ndarray, mode: str, name: str) -> tuple[np.ndarray, str]:
    if mode not in ("LA", "PA", "RGBA"):
        return pixels, mode
    alpha = pixels[..., -1]
    if alpha.min() != alpha.max():
        raise DataError(
            f"{name}: an alpha channel from {alpha.min()} to {alpha.max()} has no meaning in labels; store them "
            "without, and pixels that are to be ignored as a number of their own (--ignore-index)"
        )
    return (pixels[..., :3] if mode == "RGBA" else pixels[..., 0]), mode[:-1]


def _restore(pixels: np.ndarray, mode: str, packing: str | int) -> np.ndarray:
    """Undo what Pillow does to grey levels on reading."""
    if mode == "1":
        return (pixels ^ ("I" in str(packing))).astype(np.uint8)
    if isinstance(packing, int):  # the largest level of a PGM
        most = 255 if mode == "L" else 65535
        return np.rint(pixels.astype(np.float64) * (packing / most)).astype(np.int64)
    if mode != "L":
        return pixels
    return (255 - pixels if "I" in packing else pixels) // _STEPS.get(packing.strip("IR"), 1)


def _packing(image: ImageFile.ImageFile) -> str | int:
    """Return how the levels lie in the file of an image that is not loaded yet: what follows ``;``, or a PGM's most."""
    if not image.tile:
        return ""
    codec, arguments = image.tile[0][0], image.tile[0][3]
    if isinstance(arguments, tuple) and codec.startswith("ppm") and isinstance(arguments[-1], int):
        return arguments[-1]
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw.partition(";")[2] if isinstance(raw, str) else ""


def _tag(image: ImageFile.ImageFile, number: int) -> tuple[int, ...]:
    """Return the values of a TIFF's tag; none for other formats."""
    value = getattr(image, "tag_v2", {}).get(number, ())
    return value if isinstance(value, tuple) else (value,)
