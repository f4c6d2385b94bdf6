"""Cityscapes: 19 classes."""

from pathlib import Path

from featsharp.evaluation.layouts.class_names import CITYSCAPES
from featsharp.evaluation.layouts.labels import (
    VOID,
    FolderOptions,
    LabelCode,
    SegmentationContent,
    pair_by_stem,
    plain_code,
)
from featsharp.evaluation.layouts.layout import Layout, has_folders
from featsharp.files import list_files

# Ids in *_labelIds.png by class; the other ids up to 33 are void.
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def _read_cityscapes(root: Path, options: FolderOptions) -> SegmentationContent:
    if any(name.endswith("_gtFine_labelIds.png") for name in list_files(root / "gtFine")):
        ending = "_gtFine_labelIds"
        codes = dict.fromkeys((*range(34), 255), VOID) | {number: c for c, number in enumerate(_IDS)}
        code = LabelCode(CITYSCAPES, codes)
    else:
        ending = "_gtFine_labelTrainIds"
        code = plain_code(CITYSCAPES, 255)
    train, val = (
        pair_by_stem(root, f"leftImg8bit/{split}", f"gtFine/{split}", ("_leftImg8bit", ending))
        for split in ("train", "val")
    )
    return code, train, val


LAYOUT = Layout(
    "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png (or "
    "labelTrainIds; 19 classes)",
    has_folders("leftImg8bit/train", "gtFine/train"),
    _read_cityscapes,
)
