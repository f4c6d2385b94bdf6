"""Layouts of segmentation data sets: pairs of image and label, and the meaning of the labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.layouts import class_names
from featsharp.evaluation.layouts.labels import VOID, LabelCode, LabelledImage, pair_by_stem, plain_code, read_values
from featsharp.evaluation.layouts.layout import Layout, choose_layout, has_folders

# Folders that archives unpack to, in which a data set is detected when their parent is given.
_ARCHIVE_ROOTS = (".", "ADEChallengeData2016", "VOCdevkit/VOC2012", "VOC2012", "VOCdevkit/VOC2010", "VOC2010")

# id in *_labelIds.png -> class; the other ids up to 33 are void.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

# Numbers below 182 that COCO-Stuff left out: things that COCO has names for, but no annotations.
_COCO_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


class SegmentationData(NamedTuple):
    """A data set: its layout's name, the meaning of labels, and the pairs of both splits (files may be missing)."""

    layout: str
    code: LabelCode
    train: list[LabelledImage]
    val: list[LabelledImage]


class FolderOptions(NamedTuple):
    """Options of the layout "folder" alone.

    ``classes``: their number, where there is no classes.txt; None: as many as the training labels show.
    ``ignore_index``: the label of void pixels.
    """

    classes: int | None = None
    ignore_index: int = 255


# Result of a layout's reader: the meaning of labels, training pairs, validation pairs.
Content = tuple[LabelCode, list[LabelledImage], list[LabelledImage]]


_DEFAULTS = FolderOptions()


def open_segmentation(root: Path, layout: str = "auto", options: FolderOptions = _DEFAULTS) -> SegmentationData:
    """List a data set; no image is opened.

    Args:
        root: Its folder, or the one that its archive was unpacked in.
        layout: One of ``LAYOUTS``; "auto" takes the first that fits.
        options: Of the layout "folder".

    Raises:
        ConfigError: For an unknown layout.
        DataError: When there is no such folder, it does not fit the layout, or a split is empty.
    """
    name, folder = choose_layout(LAYOUTS, layout, root, "segmentation", _ARCHIVE_ROOTS)
    code, train, val = LAYOUTS[name].read(folder, options)
    for split, pairs in (("training", train), ("validation", val)):
        if not pairs:
            raise DataError(f"{folder} has no {split} images; layout {name!r} expects {LAYOUTS[name].expected}")
    return SegmentationData(name, code, train, val)


def _read_ade20k(root: Path, options: FolderOptions) -> Content:
    code = LabelCode(class_names.ADE20K, {0: VOID} | {number + 1: number for number in range(150)})
    train, val = (pair_by_stem(root, f"images/{s}", f"annotations/{s}") for s in ("training", "validation"))
    return code, train, val


def _read_voc(root: Path, options: FolderOptions) -> Content:
    return plain_code(class_names.VOC, 255), *_voc_pairs(root, "Segmentation", "SegmentationClass")


def _read_context(root: Path, options: FolderOptions) -> Content:
    code = LabelCode(class_names.CONTEXT, {0: VOID, 255: VOID} | {number + 1: number for number in range(59)})
    return code, *_voc_pairs(root, "SegmentationContext", "SegmentationClassContext")


def _read_context60(root: Path, options: FolderOptions) -> Content:
    code = plain_code(("background", *class_names.CONTEXT), 255)
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
        stems = path.read_text(encoding="utf-8").split()
        splits.append([LabelledImage(root, f"JPEGImages/{stem}.jpg", f"{labels}/{stem}.png") for stem in stems])
    return splits[0], splits[1]


def _read_cityscapes(root: Path, options: FolderOptions) -> Content:
    if any((root / "gtFine").rglob("*_gtFine_labelIds.png")):
        ending = "_gtFine_labelIds"
        codes = dict.fromkeys((*range(34), 255), VOID) | {number: c for c, number in enumerate(_CITYSCAPES_IDS)}
        code = LabelCode(class_names.CITYSCAPES, codes)
    else:
        ending = "_gtFine_labelTrainIds"
        code = plain_code(class_names.CITYSCAPES, 255)
    train, val = (
        pair_by_stem(root, f"leftImg8bit/{split}", f"gtFine/{split}", ("_leftImg8bit", ending))
        for split in ("train", "val")
    )
    return code, train, val


def _read_coco_stuff(root: Path, options: FolderOptions) -> Content:
    labels = next(name for name in _COCO_LABELS if _has_coco_maps(root / name))
    if any((root / labels / "val2017").glob("*_labelTrainIds.png")):
        code, ending = plain_code(class_names.COCO_STUFF, 255), "_labelTrainIds"
    else:
        numbers = [number for number in range(182) if number not in _COCO_GAPS]
        codes = {255: VOID} | {number: c for c, number in enumerate(numbers)}
        code, ending = LabelCode(class_names.COCO_STUFF, codes), ""
    train, val = (
        pair_by_stem(root, f"images/{split}", f"{labels}/{split}", ("", ending)) for split in ("train2017", "val2017")
    )
    return code, train, val


_COCO_LABELS = ("annotations", "stuffthingmaps")
# COCO's own folder "annotations" holds JSON files.
_has_coco_maps = has_folders("train2017", "val2017")


def _is_coco_stuff(root: Path) -> bool:
    return (root / "images/val2017").is_dir() and any(_has_coco_maps(root / name) for name in _COCO_LABELS)


def _read_camvid(root: Path, options: FolderOptions) -> Content:
    code = LabelCode(class_names.CAMVID, dict(plain_code(class_names.CAMVID, 255).codes) | {11: VOID})
    if (root / "trainannot").is_dir():
        train, val = (pair_by_stem(root, split, f"{split}annot") for split in ("train", "val"))
    else:
        train, val = _folder_pairs(root)
    return code, train, val


def _is_camvid(root: Path) -> bool:
    """Check for SegNet's folders, or plain ones whose classes.txt has its names."""
    segnet = has_folders("train", "trainannot")(root)
    return segnet or (_is_folder(root) and _read_class_names(root) == class_names.CAMVID)


def _read_folder(root: Path, options: FolderOptions) -> Content:
    train, val = _folder_pairs(root)
    listed = _read_class_names(root)
    if listed is not None and options.classes not in (None, len(listed)):
        raise ConfigError(f"{root}/classes.txt has {len(listed)} classes, the setting {options.classes}; leave it out")
    if listed is None:
        listed = tuple(map(str, range(options.classes or _count_classes(train, options.ignore_index))))
    return plain_code(listed, options.ignore_index), train, val


def _is_folder(root: Path) -> bool:
    return has_folders("images/train", "labels/train")(root) or has_folders("train/images", "train/labels")(root)


def _folder_pairs(root: Path) -> tuple[list[LabelledImage], list[LabelledImage]]:
    order = "images/{}" if (root / "images").is_dir() else "{}/images"
    train, val = (
        pair_by_stem(root, order.format(split), order.replace("images", "labels").format(split))
        for split in ("train", "val")
    )
    return train, val


def _read_class_names(root: Path) -> tuple[str, ...] | None:
    """Read the lines of classes.txt; None without that file."""
    path = root / "classes.txt"
    if not path.is_file():
        return None
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path}: expected one name per class and line, none of them twice")
    return names


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


_CONTEXT_FOLDERS = has_folders("JPEGImages", "SegmentationClassContext")

# By name; "auto" takes the first that fits. ``read`` takes the folder and FolderOptions and returns Content.
LAYOUTS: dict[str, Layout] = {
    "ade20k": Layout(
        "images/{training,validation} and annotations/{training,validation} (ADEChallengeData2016, 150 classes)",
        has_folders("images/training", "annotations/training"),
        _read_ade20k,
    ),
    "context": Layout(
        "JPEGImages, SegmentationClassContext and ImageSets/SegmentationContext/{train,val}.txt (Pascal Context, 59 "
        "classes without background)",
        _CONTEXT_FOLDERS,
        _read_context,
    ),
    "context60": Layout("the folders of context, with the background as a class", _CONTEXT_FOLDERS, _read_context60),
    "voc": Layout(
        "JPEGImages, SegmentationClass and ImageSets/Segmentation/{train,val}.txt (Pascal VOC 2012, 21 classes)",
        has_folders("JPEGImages", "SegmentationClass"),
        _read_voc,
    ),
    "cityscapes": Layout(
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png (or "
        "labelTrainIds; 19 classes)",
        has_folders("leftImg8bit/train", "gtFine/train"),
        _read_cityscapes,
    ),
    "coco-stuff": Layout(
        "images/{train2017,val2017} and annotations or stuffthingmaps/{train2017,val2017} with png files (171 classes)",
        _is_coco_stuff,
        _read_coco_stuff,
    ),
    "camvid": Layout(
        "{train,val} and {trainannot,valannot}, or the layout folder with the names of CamVid in classes.txt (11 "
        "classes, 11 is void)",
        _is_camvid,
        _read_camvid,
    ),
    "folder": Layout(
        "images/{train,val} and labels/{train,val}, or {train,val}/{images,labels}, with classes.txt if you have names",
        _is_folder,
        _read_folder,
    ),
}
