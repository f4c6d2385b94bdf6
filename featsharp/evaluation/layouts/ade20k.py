"""ADE20K, as MIT's scene parsing benchmark publishes it: 150 classes."""

from pathlib import Path

from featsharp.evaluation.layouts.class_names import ADE20K
from featsharp.evaluation.layouts.labels import VOID, FolderOptions, LabelCode, SegmentationContent, pair_by_stem
from featsharp.evaluation.layouts.layout import Layout, has_folders


def _read_ade20k(root: Path, options: FolderOptions) -> SegmentationContent:
    code = LabelCode(ADE20K, {0: VOID} | {number + 1: number for number in range(150)})
    train, val = (pair_by_stem(root, f"images/{s}", f"annotations/{s}") for s in ("training", "validation"))
    return code, train, val


LAYOUT = Layout(
    "images/{training,validation} and annotations/{training,validation} (ADEChallengeData2016, 150 classes)",
    has_folders("images/training", "annotations/training"),
    _read_ade20k,
)
