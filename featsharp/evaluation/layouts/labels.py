"""Images with label files: a class number per pixel, in a grey or palette image."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL.Image import Image

from featsharp.data.images import is_image_name
from featsharp.errors import DataError
from featsharp.evaluation.keys import file_key
from featsharp.evaluation.layouts.frames import Frame, decode_labelled
from featsharp.evaluation.layouts.label_files import COLOUR, SUFFIXES, ranges, read_label_file, spell
from featsharp.files import list_files

# The class of pixels that are ignored in training and in scores.
VOID = -1
_UNKNOWN = -2
# The largest class is int16.
MAX_CLASSES = 2**15


class LabelMap(NamedTuple):
    """Classes of all pixels, [H, W] int16 with VOID, and the pixels of the picture that they lie on."""

    classes: np.ndarray
    frame: Frame


class LabelledImage(NamedTuple):
    """An image with its label file: names relative to the folder of the data set."""

    root: Path
    image: str
    label: str

    def decode(self, frame: Frame) -> Image:
        """Decode the RGB picture, whose labels lie on the pixels ``frame``; DataError as of ``decode_labelled``."""
        return decode_labelled(self.root / self.image, self.image, frame)

    def keys(self) -> list[object]:
        """Return JSON values that change with the picture, and with its label."""
        return [file_key(self.root, self.image), file_key(self.root, self.label)]


@dataclass(frozen=True)
class LabelCode:
    """Meaning of the values in label files.

    Attributes:
        classes: Names; class c is the c-th, from 0.
        codes: Number (or colour, see ``label_files``) in a file -> class, or VOID. Others are errors.
        colours: See :func:`read_label_file`.
    """

    classes: tuple[str, ...]
    codes: Mapping[int, int]
    colours: tuple[int, ...] = ()

    def read(self, path: Path, name: str) -> LabelMap:
        """Read the classes of all pixels of a file.

        Args:
            path: A lossless image.
            name: Of the file in errors.

        Raises:
            DataError: When it cannot be read (:func:`read_label_file`), or has a value without a meaning.
        """
        values, frame, _ = read_label_file(path, name, self.colours)
        few = values.dtype == np.uint8
        classes = self._classify(np.arange(256))[values] if few else self._classify(values)
        if (classes == _UNKNOWN).any():
            value = int(values[classes == _UNKNOWN][0])
            if value >= COLOUR and not self.colours:
                raise DataError(
                    f"{name}: labels are one number per pixel in a grey or palette image; this one has colours, such "
                    f"as {spell(value)}"
                )
            raise DataError(f"{name}: label {spell(value)} is out of range; allowed are {self.allowed}")
        return LabelMap(classes, frame)

    @property
    def allowed(self) -> str:
        """Numbers and colours with a meaning, as text."""
        void, meant = (
            [value for value, meaning in self.codes.items() if (meaning == VOID) == is_void]
            for is_void in (True, False)
        )
        return _list_values(meant) + (f", and {_list_values(void)} for void" if void else "")

    def _classify(self, values: np.ndarray) -> np.ndarray:
        """Map values to classes, VOID or _UNKNOWN, int16."""
        places = np.searchsorted(self._values[:-1], values)
        return np.where(self._values[places] == values, self._meanings[places], np.int16(_UNKNOWN))

    @cached_property
    def _values(self) -> np.ndarray:
        """All values with a meaning, sorted; then an impossible one, for numbers beyond the last."""
        return np.array([*sorted(self.codes), 2 * COLOUR], np.int64)

    @cached_property
    def _meanings(self) -> np.ndarray:
        return np.array([self.codes[value] for value in sorted(self.codes)] + [VOID], np.int16)


# Result of a layout's reader: the meaning of labels, training pairs, validation pairs.
SegmentationContent = tuple[LabelCode, list[LabelledImage], list[LabelledImage]]


class FolderOptions(NamedTuple):
    """Options of the layout "folder" alone.

    ``classes``: their number, where there is no classes.txt; None: as many as the training labels show.
    ``ignore_index``: the number of void pixels; None: 255, where that leaves classes to tell apart.
    """

    classes: int | None = None
    ignore_index: int | None = None


def plain_code(classes: tuple[str, ...], void: int) -> LabelCode:
    """Make the code of numbers that are the classes themselves, and one for void, which takes precedence."""
    return LabelCode(classes, {number: number for number in range(len(classes))} | {void: VOID})


def pair_by_stem(root: Path, images: str, labels: str, endings: tuple[str, str] = ("", "")) -> list[LabelledImage]:
    """List all images of a folder at any depth, by name, each with the label file of the same name in another folder.

    Both folders are listed by :func:`featsharp.files.list_files`.

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
    of_stem: dict[str, str] = {}
    for name in list_files(root / labels):
        stem = _stem(name, endings[1])
        if stem is None or PurePosixPath(name).suffix.lower() not in SUFFIXES:
            continue
        if stem in of_stem:
            raise DataError(f"{root / labels}: {of_stem[stem]} and {name} are labels of one image; keep one")
        of_stem[stem] = name
    pairs = []
    for name in list_files(root / images):
        stem = _stem(name, endings[0])
        if stem is not None and is_image_name(name):
            label = of_stem.get(stem, f"{stem}{endings[1]}.png")
            pairs.append(LabelledImage(root, f"{images}/{name}", f"{labels}/{label}"))
    return pairs


def _stem(name: str, ending: str) -> str | None:
    """Strip suffix and ending; None without the ending."""
    stem = PurePosixPath(name).with_suffix("").as_posix()
    return stem.removesuffix(ending) if stem.endswith(ending) else None


def _list_values(values: list[int]) -> str:
    colours = ", ".join(spell(value) for value in sorted(values) if value >= COLOUR)
    return ", ".join(filter(None, (ranges(value for value in values if value < COLOUR), colours)))
