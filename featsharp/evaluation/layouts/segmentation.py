"""Layouts of segmentation data sets: pairs of image and label, and the meaning of the labels."""

from pathlib import Path
from typing import NamedTuple

from featsharp.errors import DataError
from featsharp.evaluation.layouts import ade20k, camvid, cityscapes, coco_stuff, folder, voc
from featsharp.evaluation.layouts.labels import FolderOptions, LabelCode, LabelledImage
from featsharp.evaluation.layouts.layout import Layout, choose_layout

# By name; "auto" takes the first that fits. ``read``: (folder, FolderOptions) -> SegmentationContent.
LAYOUTS: dict[str, Layout] = {
    "ade20k": ade20k.LAYOUT,
    "context": voc.CONTEXT_LAYOUT,
    "context60": voc.CONTEXT60_LAYOUT,
    "voc": voc.LAYOUT,
    "cityscapes": cityscapes.LAYOUT,
    "coco-stuff": coco_stuff.LAYOUT,
    "camvid": camvid.LAYOUT,
    "folder": folder.LAYOUT,
}

# Folders that archives unpack to, in which a data set is detected when their parent is given.
_ARCHIVE_ROOTS = (".", "ADEChallengeData2016", "VOCdevkit/VOC2012", "VOC2012", "VOCdevkit/VOC2010", "VOC2010")

_DEFAULTS = FolderOptions()


class SegmentationData(NamedTuple):
    """A data set: its layout's name, the meaning of labels, and the pairs of both splits (files may be missing)."""

    layout: str
    code: LabelCode
    train: list[LabelledImage]
    val: list[LabelledImage]


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
    name, chosen = choose_layout(LAYOUTS, layout, root, "segmentation", _ARCHIVE_ROOTS)
    code, train, val = LAYOUTS[name].read(chosen, options)
    for split, pairs in (("training", train), ("validation", val)):
        if not pairs:
            raise DataError(f"{chosen} has no {split} images; layout {name!r} expects {LAYOUTS[name].expected}")
    return SegmentationData(name, code, train, val)
