"""Layouts of data sets on disk, and detection of the one of a folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL.Image import Image

from featsharp.errors import DataError, unknown_name

E = TypeVar("E")

AUTO = "auto"


class Layout(NamedTuple):
    """A layout.

    Attributes:
        expected: Files and folders, for messages.
        fits: Returns whether a folder has it, by the names of a few files and folders.
        read: Lists the data set in a folder; further arguments are those of its kind. No image is opened.
    """

    expected: str
    fits: Callable[[Path], bool]
    read: Callable[..., Any]


class Sample(NamedTuple):
    """A picture with a value for each of its pixels, neither of them read yet; both readers raise DataError.

    Attributes:
        name: Unique within the data set.
        key: JSON values that change with the content.
        read_image: Reads the RGB picture.
        read_target: Reads the values [H, W] of its pixels: classes, or depth.
    """

    name: str
    key: object
    read_image: Callable[[], Image]
    read_target: Callable[[], np.ndarray]


def choose_layout(
    layouts: Mapping[str, Layout], name: str, root: Path, kind: str, inside: Sequence[str] = (".",)
) -> tuple[str, Path]:
    """Choose the layout of a data set; returns its name, and the folder.

    Args:
        layouts: By name.
        name: One of them; "auto" takes the first that fits.
        root: Folder of the data set.
        kind: Of data set, for messages.
        inside: Folders of ``root`` in which the data set may be.

    Raises:
        ConfigError: For an unknown layout.
        DataError: When there is no such folder, or it does not fit.
    """
    if name not in (AUTO, *layouts):
        raise unknown_name("layout", name, [AUTO, *layouts])
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder of a {kind} data set")
    candidates = layouts if name == AUTO else {name: layouts[name]}
    for candidate, layout in candidates.items():
        for folder in (root / path for path in inside):
            if layout.fits(folder):
                return candidate, folder
    expected = "; ".join(f"{candidate}: {layout.expected}" for candidate, layout in candidates.items())
    raise DataError(f"{root} has no known layout of a {kind} data set; expected {expected}")


def has_folders(*folders: str) -> Callable[[Path], bool]:
    """Make a check that a folder has others in it."""
    return lambda root: all((root / folder).is_dir() for folder in folders)


def spread(entries: Sequence[E], *limits: int | None) -> list[E]:
    """Choose as many entries of a split as the smallest limit says, evenly; None is no limit."""
    count = min(len(entries), *(limit or len(entries) for limit in limits))
    return [entries[number * len(entries) // count] for number in range(count)]
