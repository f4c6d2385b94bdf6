"""Plain folders of images and labels, with the names of the classes in a file where there are names."""

import re
from pathlib import Path

import numpy as np

from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.layouts.conventions import ClassTable, LabelSurvey, find_code
from featsharp.evaluation.layouts.label_files import pack
from featsharp.evaluation.layouts.labels import (
    FolderOptions,
    LabelCode,
    LabelledImage,
    SegmentationContent,
    pair_by_stem,
)
from featsharp.evaluation.layouts.layout import Layout, has_folders
from featsharp.files import read_lines

# Files with the names of classes: ours, and those of colour-coded data sets (CamVid, annotation programs).
TABLES = ("classes.txt", "class_dict.csv", "label_colors.txt", "labelmap.txt")
_COLOURED = re.compile(
    r"(?:(?P<before>\S.*?)[\s,:]+)?(?P<red>\d{1,9})[\s,]+(?P<green>\d{1,9})[\s,]+(?P<blue>\d{1,9})"
    r"(?:[\s,:]*|[\s,:]+(?P<after>[^\s,:].*))"
)
# Of a name and a colour: on long ones the expression would take long.
_LONGEST_LINE = 300


def is_folder(root: Path) -> bool:
    """Check for the folders of training images and labels."""
    return has_folders("images/train", "labels/train")(root) or has_folders("train/images", "train/labels")(root)


def list_folder(root: Path) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """List the pairs of the training and of the validation split."""
    order = "images/{}" if (root / "images").is_dir() else "{}/images"
    train, val = (
        pair_by_stem(root, order.format(split), order.replace("images", "labels").format(split))
        for split in ("train", "val")
    )
    return train, val


def read_class_names(root: Path) -> tuple[str, ...] | None:
    """Read the names of the classes of :func:`read_class_table`; None without such a file."""
    table = read_class_table(root)
    return None if table is None else table.names


def read_class_table(root: Path) -> ClassTable | None:
    """Read the first of :data:`TABLES` in a folder; None without one.

    A line has the name of a class, or its name and its colour in either order, with spaces, tabs, commas or colons
    between: ``road 128 64 128``, ``128 64 128<tab>Road``, ``road:128,64,128::``.
    """
    path = next((root / name for name in TABLES if (root / name).is_file()), None)
    if path is None:
        return None
    lines = list(filter(None, read_lines(path)))
    if lines[:1] == ["__ignore__"]:  # of labelme, which calls it class -1
        lines = lines[1:]
    if path.name != TABLES[0] and lines and not _match_colour(lines[0]):
        lines = lines[1:]  # a heading
    coloured = [match for line in lines if (match := _match_colour(line))]
    names = tuple(match["after"] or match["before"] or "" for match in coloured) or tuple(lines)
    if not all(names) or not names or len(set(names)) < len(names):
        raise DataError(f"{path}: expected one name per class and line, none of them twice")
    if not coloured:
        return ClassTable(names)
    colours = np.array([[int(number) for number in match.group("red", "green", "blue")] for match in coloured])
    packed = tuple(pack(colours).tolist())
    if len(coloured) < len(lines) or colours.max() > 255 or len(set(packed)) < len(packed):
        raise DataError(f"{path}: expected for each class a line NAME R G B, with a colour of its own in 0..255")
    return ClassTable(names, packed)


def _match_colour(line: str) -> re.Match[str] | None:
    return _COLOURED.fullmatch(line) if len(line) <= _LONGEST_LINE else None


def _read_folder(root: Path, options: FolderOptions) -> SegmentationContent:
    train, val = list_folder(root)
    table = read_class_table(root)
    if table is not None and options.classes not in (None, len(table.names)):
        raise ConfigError(
            f"{root}/classes.txt has {len(table.names)} classes, the setting {options.classes}; leave it out"
        )
    if not train or not val:  # which is reported for all layouts alike
        return LabelCode((), {}), train, val
    return find_code(LabelSurvey(root, train, val, table.colours if table else ()), table, options), train, val


LAYOUT = Layout(
    "images/{train,val} and labels/{train,val}, or {train,val}/{images,labels}, with classes.txt if you have names "
    "(docs/usage.md: label maps)",
    is_folder,
    _read_folder,
)
