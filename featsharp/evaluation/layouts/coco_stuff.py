"""COCO-Stuff, with the things of COCO: 171 classes, or the 27 groups of its hierarchy."""

from pathlib import Path

from featsharp.evaluation.layouts.class_names import COCO_STUFF, COCO_STUFF_27
from featsharp.evaluation.layouts.labels import (
    VOID,
    FolderOptions,
    LabelCode,
    SegmentationContent,
    pair_by_stem,
    plain_code,
)
from featsharp.evaluation.layouts.layout import Layout, has_folders
from featsharp.files import list_files, read_lines

# Numbers below 182 that COCO-Stuff left out: things that COCO has names for, but no annotations.
_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)

# Of the pictures that are used with the groups, names without .jpg: 97,702 and 4,172 (of IIC, Ji et al., ICCV 2019).
_LIST = "curated/{}/Coco164kFull_Stuff_Coarse.txt"

_LABEL_FOLDERS = ("annotations", "stuffthingmaps")
# COCO's own folder "annotations" holds JSON files.
_has_maps = has_folders("train2017", "val2017")


def _read_coco_stuff(root: Path, options: FolderOptions) -> SegmentationContent:
    labels = next(name for name in _LABEL_FOLDERS if _has_maps(root / name))
    if any(name.endswith("_labelTrainIds.png") for name in list_files(root / labels / "val2017")):
        code, ending = plain_code(COCO_STUFF, 255), "_labelTrainIds"
    else:
        numbers = [number for number in range(182) if number not in _GAPS]
        codes = {255: VOID} | {number: c for c, number in enumerate(numbers)}
        code, ending = LabelCode(COCO_STUFF, codes), ""
    train, val = (
        pair_by_stem(root, f"images/{split}", f"{labels}/{split}", ("", ending)) for split in ("train2017", "val2017")
    )
    return code, train, val


def _read_coco_stuff_27(root: Path, options: FolderOptions) -> SegmentationContent:
    """Read :func:`_read_coco_stuff` with groups for classes, without the pictures that lists beside it leave out."""
    fine, *splits = _read_coco_stuff(root, options)
    groups = tuple(COCO_STUFF_27)
    of_name = {name: groups.index(group) for group, members in COCO_STUFF_27.items() for name in members}
    codes = {number: VOID if c == VOID else of_name[fine.classes[c]] for number, c in fine.codes.items()}
    kept = []
    for split, pairs in zip(("train2017", "val2017"), splits, strict=True):
        path = next((p for p in (root / _LIST.format(split), root.parent / _LIST.format(split)) if p.is_file()), None)
        listed = None if path is None else set(filter(None, read_lines(path)))
        kept.append([pair for pair in pairs if listed is None or Path(pair.image).stem in listed])
    return LabelCode(groups, codes), kept[0], kept[1]


def _is_coco_stuff(root: Path) -> bool:
    return (root / "images/val2017").is_dir() and any(_has_maps(root / name) for name in _LABEL_FOLDERS)


LAYOUT = Layout(
    "images/{train2017,val2017} and annotations or stuffthingmaps/{train2017,val2017} with png files (171 classes)",
    _is_coco_stuff,
    _read_coco_stuff,
)

LAYOUT_27 = Layout(
    "the folders of coco-stuff, with the 27 groups of its hierarchy as classes", _is_coco_stuff, _read_coco_stuff_27
)
