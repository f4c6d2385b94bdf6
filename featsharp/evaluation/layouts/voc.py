"""Pascal VOC 2012, and Pascal Context with and without the background."""

from pathlib import Path

from featsharp.errors import DataError
from featsharp.evaluation.layouts.class_names import CONTEXT, VOC
from featsharp.evaluation.layouts.labels import (
    VOID,
    FolderOptions,
    LabelCode,
    LabelledImage,
    SegmentationContent,
    plain_code,
)
from featsharp.evaluation.layouts.layout import Layout, has_folders
from featsharp.files import read_lines


def _read_voc(root: Path, options: FolderOptions) -> SegmentationContent:
    return plain_code(VOC, 255), *_voc_pairs(root, "Segmentation", "SegmentationClass")


def _read_context(root: Path, options: FolderOptions) -> SegmentationContent:
    code = LabelCode(CONTEXT, {0: VOID, 255: VOID} | {number + 1: number for number in range(59)})
    return code, *_voc_pairs(root, "SegmentationContext", "SegmentationClassContext")


def _read_context60(root: Path, options: FolderOptions) -> SegmentationContent:
    code = plain_code(("background", *CONTEXT), 255)
    return code, *_voc_pairs(root, "SegmentationContext", "SegmentationClassContext")


def _voc_pairs(root: Path, lists: str, labels: str) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """List the pairs that text files name, as in Pascal VOC."""
    splits = []
    for split in ("train", "val"):
        path = root / "ImageSets" / lists / f"{split}.txt"
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; it lists the images of the split {split!r}, a name without .jpg per line"
            )
        stems = filter(None, read_lines(path))
        splits.append([LabelledImage(root, f"JPEGImages/{stem}.jpg", f"{labels}/{stem}.png") for stem in stems])
    return splits[0], splits[1]


_CONTEXT_FOLDERS = has_folders("JPEGImages", "SegmentationClassContext")

LAYOUT = Layout(
    "JPEGImages, SegmentationClass and ImageSets/Segmentation/{train,val}.txt (Pascal VOC 2012, 21 classes)",
    has_folders("JPEGImages", "SegmentationClass"),
    _read_voc,
)

CONTEXT_LAYOUT = Layout(
    "JPEGImages, SegmentationClassContext and ImageSets/SegmentationContext/{train,val}.txt (Pascal Context, 59 "
    "classes without background)",
    _CONTEXT_FOLDERS,
    _read_context,
)

CONTEXT60_LAYOUT = Layout("the folders of context, with the background as a class", _CONTEXT_FOLDERS, _read_context60)
