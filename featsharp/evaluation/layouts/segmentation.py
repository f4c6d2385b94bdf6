"""Layouts of segmentation data sets: pairs of image and label, and the meaning of the labels."""

from pathlib import Path
from typing import NamedTuple

from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.layouts import ade20k, camvid, cityscapes, coco_stuff, folder, voc
from featsharp.evaluation.layouts.labels import MAX_CLASSES, VOID, FolderOptions, LabelCode, LabelledImage
from featsharp.evaluation.layouts.layout import Layout, choose_layout

# By name; "auto" takes the first that fits. ``read``: (folder, FolderOptions) -> SegmentationContent.
LAYOUTS: dict[str, Layout] = {
    "ade20k": ade20k.LAYOUT,
    "context": voc.CONTEXT_LAYOUT,
    "context60": voc.CONTEXT60_LAYOUT,
    "voc": voc.LAYOUT,
    "cityscapes": cityscapes.LAYOUT,
    "coco-stuff": coco_stuff.LAYOUT,
    "coco-stuff-27": coco_stuff.LAYOUT_27,
    "camvid": camvid.LAYOUT,
    "folder": folder.LAYOUT,
}

# Folders that archives unpack to, in which a data set is detected when their parent is given.
_ARCHIVE_ROOTS = (
    ".", "ADEChallengeData2016", "VOCdevkit/VOC2012", "VOC2012", "VOCdevkit/VOC2010", "VOC2010", "dataset"
)  # fmt: skip

_DEFAULTS = FolderOptions()


class SegmentationData(NamedTuple):
    """A data set: its layout's name, the meaning of labels, and the pairs of both splits (files may be missing)."""

    layout: str
    code: LabelCode
    train: list[LabelledImage]
    val: list[LabelledImage]


def open_segmentation(root: Path, layout: str = "auto", options: FolderOptions = _DEFAULTS) -> SegmentationData:
    """List a data set; no image is opened, but the labels of the layout "folder" are read.

    Args:
        root: Its folder, or the one that its archive was unpacked in.
        layout: One of ``LAYOUTS``; "auto" takes the first that fits.
        options: Of the layout "folder".

    Raises:
        ConfigError: For an unknown layout, and options out of range or that contradict a layout with its own classes.
        DataError: When there is no such folder, it does not fit the layout, a split is empty, or the labels of the
            layout "folder" have no meaning that is certain.
    """
    void, count = options.ignore_index, options.classes
    if count is not None and count > MAX_CLASSES:
        raise ConfigError(f"there are at most {MAX_CLASSES} classes; got {count}")
    if void is not None and not -(2**31) <= void < 2**32:
        raise ConfigError(f"no label file holds the void number {void}; it has at most 32 bits")
    name, chosen = choose_layout(LAYOUTS, layout, root, "segmentation", _ARCHIVE_ROOTS)
    code, train, val = LAYOUTS[name].read(chosen, options)
    for split, pairs in (("training", train), ("validation", val)):
        if not pairs:
            raise DataError(f"{chosen} has no {split} images; layout {name!r} expects {LAYOUTS[name].expected}")
    if count not in (None, len(code.classes)) and name != "folder":
        raise ConfigError(f"layout {name!r} has {len(code.classes)} classes; leave out --classes {count}")
    if void is not None and code.codes.get(void, VOID) != VOID:
        raise ConfigError(f"layout {name!r} has class {void}; leave out --ignore-index {void}, or give --layout folder")
    return SegmentationData(name, code, train, val)
