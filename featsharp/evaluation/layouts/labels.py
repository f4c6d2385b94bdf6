"""Images with label files: a class number per pixel, in a grey or palette image."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from featsharp.data.images import is_image_name
from featsharp.errors import DataError

# The class of pixels that are ignored in training and in scores.
VOID = -1

# Lossless formats: JPEG would mix the numbers of neighbouring classes.
_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
_FORMATS = ("PNG", "BMP", "GIF", "TIFF", "PPM")
_INTEGER_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
# Pillow spreads grey of 2 and 4 bits over 0..255.
_SPREAD = {"L;2": 85, "L;4": 17}
_LARGEST = 65535
_UNKNOWN = -2


class LabelledImage(NamedTuple):
    """An image with its label file: names relative to the folder of the data set."""

    root: Path
    image: str
    label: str


@dataclass(frozen=True)
class LabelCode:
    """Meaning of the numbers in label files.

    Attributes:
        classes: Names; class c is the c-th, from 0.
        codes: Number in a file -> class, or VOID. Other numbers are errors.
    """

    classes: tuple[str, ...]
    codes: Mapping[int, int]

    def read(self, path: Path, name: str) -> np.ndarray:
        """Read the classes of all pixels of a file, [H, W] int16 with VOID.

        Args:
            path: A lossless one-channel image.
            name: Of the file in errors.

        Raises:
            DataError: When it is missing or damaged, has several channels, or a number without a meaning.
        """
        values = read_values(path, name)
        classes = self._table[np.clip(values, 0, _LARGEST)]
        unknown = (classes == _UNKNOWN) | (values < 0) | (values > _LARGEST)
        if unknown.any():
            raise DataError(f"{name}: label {values[unknown][0]} is out of range; allowed are {self.allowed}")
        return classes

    @property
    def allowed(self) -> str:
        """Numbers with a meaning, as text."""
        void = ranges(number for number, meaning in self.codes.items() if meaning == VOID)
        return ranges(number for number, meaning in self.codes.items() if meaning != VOID) + (
            f", and {void} for void" if void else ""
        )

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.full(_LARGEST + 1, _UNKNOWN, np.int16)
        table[list(self.codes)] = list(self.codes.values())
        return table


# Result of a layout's reader: the meaning of labels, training pairs, validation pairs.
SegmentationContent = tuple[LabelCode, list[LabelledImage], list[LabelledImage]]


class FolderOptions(NamedTuple):
    """Options of the layout "folder" alone.

    ``classes``: their number, where there is no classes.txt; None: as many as the training labels show.
    ``ignore_index``: the label of void pixels.
    """

    classes: int | None = None
    ignore_index: int = 255


def read_values(path: Path, name: str) -> np.ndarray:
    """Read the numbers in a label file, integers [H, W]; errors as of :meth:`LabelCode.read`."""
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=_FORMATS) as image:
            step = _SPREAD.get(_raw_mode(image), 1)
            image.load()
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such label file") from error
    except Exception as error:  # decoders raise any kind of exception for damaged files
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


def plain_code(classes: tuple[str, ...], void: int) -> LabelCode:
    """Make the code of numbers that are the classes themselves, and one for void, which takes precedence."""
    return LabelCode(classes, {number: number for number in range(len(classes))} | {void: VOID})


def check_sizes(pair: LabelledImage, picture_size: tuple[int, int], label_size: tuple[int, int]) -> None:
    """Raise DataError unless an image and its label file have as many pixels, sizes (h, w)."""
    if picture_size != label_size:
        (height, width), (h, w) = picture_size, label_size
        raise DataError(f"{pair.label}: the labels are {h}x{w} pixels, the image {pair.image} is {height}x{width}")


def pair_by_stem(root: Path, images: str, labels: str, endings: tuple[str, str] = ("", "")) -> list[LabelledImage]:
    """List all images of a folder at any depth, by name, each with the label file of the same name in another folder.

    Args:
        root: Of the data set.
        images: Folder of images in it.
        labels: Folder of labels in it.
        endings: Ends of the names of images and of labels, before the suffix, after the common stem.

    Returns:
        An image without a label is paired with a file that does not exist.

    Raises:
        DataError: When two files are labels of one image.
    """
    image_folder, label_folder = root / images, root / labels
    of_stem: dict[str, Path] = {}
    for path in sorted(label_folder.rglob("*.*")):
        stem = _stem(path.relative_to(label_folder), endings[1])
        if stem is None or path.suffix.lower() not in _SUFFIXES:
            continue
        if stem in of_stem:
            raise DataError(f"{label_folder}: {of_stem[stem].name} and {path.name} are labels of one image; keep one")
        of_stem[stem] = path
    pairs = []
    for path in sorted(image_folder.rglob("*.*")):
        inside = path.relative_to(image_folder)
        stem = _stem(inside, endings[0])
        if stem is None or not is_image_name(inside.as_posix()):
            continue
        label = of_stem.get(stem, label_folder / f"{stem}{endings[1]}.png")
        pairs.append(LabelledImage(root, path.relative_to(root).as_posix(), label.relative_to(root).as_posix()))
    return pairs


def ranges(numbers: Iterable[int]) -> str:
    """Format 0, 1, 2, 3, 7 as ``0..3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


def _stem(path: Path, ending: str) -> str | None:
    """Strip suffix and ending; None without the ending."""
    stem = path.with_suffix("").as_posix()
    return stem.removesuffix(ending) if stem.endswith(ending) else None


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Return the packing of the pixels in the file of an image that is not loaded yet."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else ""
