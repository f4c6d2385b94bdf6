"""Layouts of data sets of detection: pictures to train on and to measure on, with their objects."""

from pathlib import Path
from typing import NamedTuple

from featsharp.data.images import is_image_name
from featsharp.errors import DataError
from featsharp.evaluation.layouts.labels import LabelledImage
from featsharp.evaluation.layouts.layout import Layout, choose_layout
from featsharp.evaluation.layouts.objects import CocoLabels, YoloLabels
from featsharp.evaluation.layouts.outlines import Labels
from featsharp.files import list_files

# Where YOLO's labels may lie, outlines before boxes.
_YOLO_LABELS = ("labels", "instance_segmentation/labels", "object_detection/labels")


class DetectionSplit(NamedTuple):
    """Pictures, and their objects by the name of the picture."""

    pairs: list[LabelledImage]
    labels: Labels


class DetectionData(NamedTuple):
    """A data set; ``names`` are those of its categories by number, as far as they are known."""

    layout: str
    train: DetectionSplit
    val: DetectionSplit
    names: dict[int, str]


def open_detection(root: Path, layout: str = "auto") -> DetectionData:
    """Open a data set in a layout of :data:`LAYOUTS`; no picture is opened.

    Raises:
        ConfigError: For an unknown layout.
        DataError: When it does not fit, or a file or folder of it is missing or empty.
    """
    name, folder = choose_layout(LAYOUTS, layout, root, "detection")
    train, val, names = LAYOUTS[name].read(folder)
    for split, one in (("train on", train), ("measure on", val)):
        if not one.pairs:
            raise DataError(f"{root} has no pictures with labels to {split}; expected {LAYOUTS[name].expected}")
    return DetectionData(name, train, val, names)


def _read_coco(root: Path) -> tuple[DetectionSplit, DetectionSplit, dict[int, str]]:
    files = [_find_instances(root, split) for split in ("train", "val")]
    folders = [file.stem.removeprefix("instances_") for file in files]
    return _read_json(root, files, [f"images/{one}" if (root / "images" / one).is_dir() else one for one in folders])


def _read_plain(root: Path) -> tuple[DetectionSplit, DetectionSplit, dict[int, str]]:
    return _read_json(root, [root / "train.json", root / "val.json"], ["images", "images"])


def _read_json(
    root: Path, files: list[Path], folders: list[str]
) -> tuple[DetectionSplit, DetectionSplit, dict[int, str]]:
    splits: list[DetectionSplit] = []
    names: dict[int, str] = {}
    for file, folder in zip(files, folders, strict=True):
        if missing := next((path for path in (file, root / folder) if not path.exists()), None):
            raise DataError(f"{missing} is missing; expected {COCO}, or {PLAIN}")
        labels = CocoLabels(file)
        names |= labels.categories
        label = file.relative_to(root).as_posix()
        splits.append(DetectionSplit([LabelledImage(root, f"{folder}/{name}", label) for name in labels.names], labels))
    return splits[0], splits[1], names


def _find_instances(root: Path, split: str) -> Path:
    """Find the file of a split, the last by name where there are those of several years."""
    folder = root / "annotations"
    return max(folder.glob(f"instances_{split}*.json"), default=folder / f"instances_{split}*.json")


def _read_yolo(root: Path) -> tuple[DetectionSplit, DetectionSplit, dict[int, str]]:
    place = next(place for place in _YOLO_LABELS if (root / place).is_dir())

    def split(folder: str) -> DetectionSplit:
        labels = YoloLabels(root / place / folder)
        names = [name for name in list_files(root / "images" / folder) if is_image_name(name) and labels.knows(name)]
        label = (Path(place) / folder).as_posix()
        images = [(Path("images") / folder / name).as_posix() for name in names]
        return DetectionSplit([LabelledImage(root, image, label) for image in images], labels)

    folders = sorted(path.name for path in (root / "images").iterdir() if path.is_dir())
    found = [next((name for name in folders if name.startswith(part)), None) for part in ("train", "val")]
    if found[0] is not None and found[1] is not None:
        return split(found[0]), split(found[1]), {}
    pairs, labels = split(".")
    return DetectionSplit(pairs[::2], labels), DetectionSplit(pairs[1::2], labels), {}


def _has_yolo(root: Path) -> bool:
    return (root / "images").is_dir() and any((root / place).is_dir() for place in _YOLO_LABELS)


COCO = "annotations/instances_{train,val}*.json of COCO with folders of the same ends (train2017, val2017)"
PLAIN = "train.json and val.json of COCO with images/"
YOLO = (
    "images/ and labels/ of YOLO (or instance_segmentation/labels), both with folders train*, val*, or every second "
    "picture to train on"
)
LAYOUTS: dict[str, Layout] = {
    "coco": Layout(COCO, lambda root: (root / "annotations").is_dir(), _read_coco),
    "plain": Layout(PLAIN, lambda root: (root / "train.json").exists() or (root / "val.json").exists(), _read_plain),
    "yolo": Layout(YOLO, _has_yolo, _read_yolo),
}
