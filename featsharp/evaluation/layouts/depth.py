"""Layouts of data sets of pictures with depth."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featsharp.errors import DataError
from featsharp.evaluation.layouts import nyu
from featsharp.evaluation.layouts.labels import LabelledImage
from featsharp.evaluation.layouts.layout import Layout, choose_layout
from featsharp.evaluation.layouts.rgbd import INTRINSICS, find_frames
from featsharp.ops.boxes import Box

# Parts of the frames of one camera, in their order: to train on, and to measure on; those between are left out, so
# that no picture is measured whose neighbour was trained on.
TRAIN_UNTIL, VAL_FROM = 0.65, 0.75


class DepthData(NamedTuple):
    """A data set.

    Attributes:
        layout: Name of its layout.
        train: Pictures to train on: :class:`LabelledImage`, or what stands for it.
        val: Pictures to measure on.
        read: Returns the depth [H, W] of one in metres, float64, 0 where there is none; raises DataError.
        farthest: Metres; depths beyond are not measured.
        scored: Pixels that are measured of a picture of 480 x 640; None: all.
    """

    layout: str
    train: Sequence[Any]
    val: Sequence[Any]
    read: Callable[[Any], np.ndarray]
    farthest: float = 10.0
    scored: Box | None = None


def open_depth(root: Path, layout: str = "auto") -> DepthData:
    """List a data set; no picture is opened.

    Args:
        root: Its folder.
        layout: One of ``LAYOUTS``; "auto" takes the first that fits.

    Raises:
        ConfigError: For an unknown layout.
        DataError: When there is no such folder, it does not fit the layout, or a split is empty.
    """
    name, _ = choose_layout(LAYOUTS, layout, root, "depth")
    train, val = LAYOUTS[name].read(root)
    for split, pictures in (("training", train), ("validation", val)):
        if not pictures:
            raise DataError(f"{root} has no {split} pictures; layout {name!r} expects {LAYOUTS[name].expected}")
    read = {"nyu-labelled": nyu.read_labelled_depth}.get(name, nyu.read_folders_depth)
    # The crop that all results on NYU Depth v2 are of (Eigen et al., arXiv 1406.2283).
    return DepthData(name, train, val, read, scored=Box(45, 471, 41, 601) if name.startswith("nyu") else None)


def _read_frames(root: Path) -> tuple[list[LabelledImage], list[LabelledImage]]:
    frames = [LabelledImage(root, frame.color.name, frame.depth.name) for frame in find_frames(root)]
    return frames[: round(TRAIN_UNTIL * len(frames))], frames[round(VAL_FROM * len(frames)) :]


# By name; "auto" takes the first that fits. ``read`` lists the pictures of both splits.
LAYOUTS: dict[str, Layout] = {
    "nyu-labelled": nyu.LABELLED_LAYOUT,
    "nyu": nyu.FOLDERS_LAYOUT,
    "rgbd": Layout(
        f"NAME.color.jpg with NAME.depth.png of one camera, and {INTRINSICS} beside them",
        lambda root: (root / INTRINSICS).is_file(),
        _read_frames,
    ),
}
