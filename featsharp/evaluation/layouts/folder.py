"""Plain folders of images and labels, with the names of the classes in a file where there are names."""

from collections.abc import Sequence
from pathlib import Path

from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.layouts.labels import (
    FolderOptions,
    LabelledImage,
    SegmentationContent,
    pair_by_stem,
    plain_code,
    read_values,
)
from featsharp.evaluation.layouts.layout import Layout, has_folders


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
    """Read the lines of classes.txt; None without that file."""
    path = root / "classes.txt"
    if not path.is_file():
        return None
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path}: expected one name per class and line, none of them twice")
    return names


def _read_folder(root: Path, options: FolderOptions) -> SegmentationContent:
    train, val = list_folder(root)
    listed = read_class_names(root)
    if listed is not None and options.classes not in (None, len(listed)):
        raise ConfigError(f"{root}/classes.txt has {len(listed)} classes, the setting {options.classes}; leave it out")
    if listed is None:
        listed = tuple(map(str, range(options.classes or _count_classes(train, options.ignore_index))))
    return plain_code(listed, options.ignore_index), train, val


def _count_classes(pairs: Sequence[LabelledImage], ignore_index: int) -> int:
    """Compute the largest number in the labels, plus one; unreadable files are reported when they are needed."""
    if not pairs:
        return 0
    largest = -1
    for pair in pairs:
        try:
            values = read_values(pair.root / pair.label, pair.label)
        except DataError:
            continue
        largest = max(largest, int(values[values != ignore_index].max(initial=-1)))
    if largest < 0:
        raise DataError(
            f"no training label shows how many classes there are, the first is {pairs[0].label}; write their names "
            "into classes.txt, one per line"
        )
    return largest + 1


LAYOUT = Layout(
    "images/{train,val} and labels/{train,val}, or {train,val}/{images,labels}, with classes.txt if you have names",
    is_folder,
    _read_folder,
)
