"""Label files: a class number per pixel, in a grey or palette image."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from featsharp.errors import DataError

# The class of pixels that count neither in training nor in scores.
VOID = -1

# What is lossless: JPEG would mix the numbers of neighbouring classes.
_FORMATS = ("PNG", "BMP", "GIF", "TIFF", "PPM")
_INTEGER_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
# Pillow spreads grey of 2 and 4 bits over 0..255.
_SPREAD = {"L;2": 85, "L;4": 17}
_LARGEST = 65535
_UNKNOWN = -2


@dataclass(frozen=True)
class LabelCode:
    """What the numbers in label files mean.

    Attributes:
        classes: Names; class c is the c-th, from 0.
        codes: Number in a file -> class, or VOID. Other numbers are errors.
    """

    classes: tuple[str, ...]
    codes: Mapping[int, int]

    def read(self, path: Path, name: str) -> np.ndarray:
        """Classes of all pixels of a file, [H, W] int16 with VOID.

        Args:
            path: A lossless one-channel image.
            name: What errors call it.

        Raises:
            DataError: When it is missing or damaged, has several channels, or holds a number that has no meaning.
        """
        values = read_values(path, name)
        classes = self._table[np.clip(values, 0, _LARGEST)]
        unknown = (classes == _UNKNOWN) | (values < 0) | (values > _LARGEST)
        if unknown.any():
            raise DataError(f"{name}: label {values[unknown][0]} is out of range; allowed are {self.allowed}")
        return classes

    @property
    def allowed(self) -> str:
        """The numbers that mean something, for people."""
        void = ranges(number for number, meaning in self.codes.items() if meaning == VOID)
        return ranges(number for number, meaning in self.codes.items() if meaning != VOID) + (
            f", and {void} for void" if void else ""
        )

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.full(_LARGEST + 1, _UNKNOWN, np.int16)
        table[list(self.codes)] = list(self.codes.values())
        return table


def read_values(path: Path, name: str) -> np.ndarray:
    """The numbers in a label file, integers [H, W]; errors as of :meth:`LabelCode.read`."""
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=_FORMATS) as image:
            step = _SPREAD.get(_raw_mode(image), 1)
            image.load()
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such label file") from error
    except Exception as error:  # decoders meet damaged files with any kind of exception
        raise DataError(
            f"{name}: cannot be read as labels, which are a lossless image such as png "
            f"({type(error).__name__}: {error})"
        ) from error
    if image.mode not in _INTEGER_MODES:
        raise DataError(
            f"{name}: labels are one number per pixel in a grey or palette image; this one is {image.mode}, with "
            f"{len(image.getbands())} channels"
        )
    return np.asarray(image).astype(np.int32) // step


def ranges(numbers: Iterable[int]) -> str:
    """``0..3, 7`` of 0, 1, 2, 3, 7."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in found)


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the pixels of an image that is not loaded yet are packed in the file."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else ""
