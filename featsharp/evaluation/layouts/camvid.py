"""CamVid, in SegNet's folders or plain ones: 11 classes."""

from pathlib import Path

from featsharp.evaluation.layouts.class_names import CAMVID
from featsharp.evaluation.layouts.folder import is_folder, list_folder, read_class_names
from featsharp.evaluation.layouts.labels import (
    VOID,
    FolderOptions,
    LabelCode,
    SegmentationContent,
    pair_by_stem,
    plain_code,
)
from featsharp.evaluation.layouts.layout import Layout, has_folders


def _read_camvid(root: Path, options: FolderOptions) -> SegmentationContent:
    code = LabelCode(CAMVID, dict(plain_code(CAMVID, 255).codes) | {11: VOID})
    if (root / "trainannot").is_dir():
        train, val = (pair_by_stem(root, split, f"{split}annot") for split in ("train", "val"))
    else:
        train, val = list_folder(root)
    return code, train, val


def _is_camvid(root: Path) -> bool:
    """Check for SegNet's folders, or plain ones whose classes.txt has its names."""
    segnet = has_folders("train", "trainannot")(root)
    return segnet or (is_folder(root) and read_class_names(root) == CAMVID)


LAYOUT = Layout(
    "{train,val} and {trainannot,valannot}, or the layout folder with the names of CamVid in classes.txt (11 "
    "classes, 11 is void)",
    _is_camvid,
    _read_camvid,
)
