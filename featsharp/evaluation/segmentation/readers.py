"""Segmentation data sets as they lie on disk: pairs of image and label, and what the labels mean."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from featsharp.data.images import is_image_name
from featsharp.errors import ConfigError, DataError, unknown_name
from featsharp.evaluation.segmentation import names
from featsharp.evaluation.segmentation.labels import VOID, LabelCode, read_values

# Folders that archives unpack to, in which a data set is found when their parent is given.
_ARCHIVE_ROOTS = (".", "ADEChallengeData2016", "VOCdevkit/VOC2012", "VOC2012", "VOCdevkit/VOC2010", "VOC2010")

# id in *_labelIds.png -> class; the other ids up to 33 are void.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

# Numbers below 182 that COCO-Stuff left out: things that COCO has names for, but no annotations.
_COCO_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


class Pair(NamedTuple):
    """An image with its labels: names relative to the folder of the data set."""

    root: Path
    image: str
    label: str


class SegmentationData(NamedTuple):
    """A data set: its layout's name, what labels mean, and the pairs of both splits, which need not exist."""

    layout: str
    code: LabelCode
    train: list[Pair]
    val: list[Pair]


class FolderOptions(NamedTuple):
    """What only the layout "folder" asks for.

    ``classes``: how many, where no classes.txt says it; None: as many as the training labels show. ``ignore_index``:
    the number of pixels that do not count.
    """

    classes: int | None = None
    ignore_index: int = 255


# Formats that keep numbers as they are.
_LABEL_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")

# What labels mean, training pairs, validation pairs.
Found = tuple[LabelCode, list[Pair], list[Pair]]


_DEFAULTS = FolderOptions()


class Layout(NamedTuple):
    """How a data set lies on disk: in words, as a check of a folder, and as a reader."""

    expected: str
    fits: Callable[[Path], bool]
    read: Callable[[Path, FolderOptions], Found]


def open_segmentation(root: Path, layout: str = "auto", options: FolderOptions = _DEFAULTS) -> SegmentationData:
    """List a data set; no image is opened.

    Args:
        root: Its folder, or the one that its archive was unpacked in.
        layout: One of ``LAYOUTS``; "auto" takes the first that fits what is there.
        options: Of the layout "folder".

    Raises:
        ConfigError: For an unknown layout.
        DataError: When there is no such folder, it does not fit the layout, or a split is empty.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise unknown_name("layout", layout, ["auto", *LAYOUTS])
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder of a segmentation data set")
    for name in LAYOUTS if layout == "auto" else [layout]:
        for place in (root / part for part in _ARCHIVE_ROOTS):
            if LAYOUTS[name].fits(place):
                return _open(place, name, options)
    expected = [f"{name}: {LAYOUTS[name].expected}" for name in ([layout] if layout != "auto" else LAYOUTS)]
    raise DataError(f"{root} has no known layout of a segmentation data set; expected {'; '.join(expected)}")


def _open(root: Path, layout: str, options: FolderOptions) -> SegmentationData:
    code, train, val = LAYOUTS[layout].read(root, options)
    for split, pairs in (("training", train), ("validation", val)):
        if not pairs:
            raise DataError(f"{root} has no {split} images; layout {layout!r} expects {LAYOUTS[layout].expected}")
    return SegmentationData(layout, code, train, val)


def _read_ade20k(root: Path, options: FolderOptions) -> Found:
    code = LabelCode(names.ADE20K, {0: VOID} | {number + 1: number for number in range(150)})
    train, val = (pair_by_stem(root, f"images/{s}", f"annotations/{s}") for s in ("training", "validation"))
    return code, train, val


def _read_voc(root: Path, options: FolderOptions) -> Found:
    code = _plain_code(names.VOC, 255)
    train, val = (_listed(root, "Segmentation", "SegmentationClass", split) for split in ("train", "val"))
    return code, train, val


def _read_context(root: Path, options: FolderOptions) -> Found:
    code = LabelCode(names.CONTEXT, {0: VOID, 255: VOID} | {number + 1: number for number in range(59)})
    train, val = _context_pairs(root)
    return code, train, val


def _read_context60(root: Path, options: FolderOptions) -> Found:
    train, val = _context_pairs(root)
    return _plain_code(("background", *names.CONTEXT), 255), train, val


def _context_pairs(root: Path) -> tuple[list[Pair], list[Pair]]:
    train, val = (_listed(root, "SegmentationContext", "SegmentationClassContext", s) for s in ("train", "val"))
    return train, val


def _read_cityscapes(root: Path, options: FolderOptions) -> Found:
    ending = "_gtFine_labelIds"
    if any((root / "gtFine").rglob(f"*{ending}.png")):
        codes = dict.fromkeys((*range(34), 255), VOID) | {number: c for c, number in enumerate(_CITYSCAPES_IDS)}
    else:
        ending = "_gtFine_labelTrainIds"
        codes = dict(_plain_code(names.CITYSCAPES, 255).codes)
    train, val = (
        pair_by_stem(root, f"leftImg8bit/{split}", f"gtFine/{split}", ("_leftImg8bit", ending))
        for split in ("train", "val")
    )
    return LabelCode(names.CITYSCAPES, codes), train, val


def _read_coco_stuff(root: Path, options: FolderOptions) -> Found:
    labels = next(name for name in ("annotations", "stuffthingmaps") if _coco_maps(root / name))
    if any((root / labels / "val2017").glob("*_labelTrainIds.png")):
        code, ending = _plain_code(names.COCO_STUFF, 255), "_labelTrainIds"
    else:
        numbers = [number for number in range(182) if number not in _COCO_GAPS]
        codes = {255: VOID} | {number: c for c, number in enumerate(numbers)}
        code, ending = LabelCode(names.COCO_STUFF, codes), ""
    train, val = (
        pair_by_stem(root, f"images/{split}", f"{labels}/{split}", ("", ending)) for split in ("train2017", "val2017")
    )
    return code, train, val


def _coco_maps(folder: Path) -> bool:
    """Whether label images are there: COCO's own folder "annotations" holds JSON files."""
    return all((folder / split).is_dir() for split in ("train2017", "val2017"))


def _read_camvid(root: Path, options: FolderOptions) -> Found:
    code = LabelCode(names.CAMVID, dict(_plain_code(names.CAMVID, 255).codes) | {11: VOID})
    if (root / "trainannot").is_dir():
        train, val = (pair_by_stem(root, split, f"{split}annot") for split in ("train", "val"))
    else:
        train, val = _folder_pairs(root)
    return code, train, val


def _read_folder(root: Path, options: FolderOptions) -> Found:
    train, val = _folder_pairs(root)
    listed = _class_names(root)
    if listed is not None and options.classes not in (None, len(listed)):
        raise ConfigError(f"{root}/classes.txt has {len(listed)} classes, the setting {options.classes}; leave it out")
    if listed is None:
        listed = tuple(map(str, range(options.classes or _count_classes(train, options.ignore_index))))
    return _plain_code(listed, options.ignore_index), train, val


def _folder_pairs(root: Path) -> tuple[list[Pair], list[Pair]]:
    order = "images/{}" if (root / "images").is_dir() else "{}/images"
    train, val = (
        pair_by_stem(root, order.format(split), order.replace("images", "labels").format(split))
        for split in ("train", "val")
    )
    return train, val


def _class_names(root: Path) -> tuple[str, ...] | None:
    """The lines of classes.txt; None without that file."""
    path = root / "classes.txt"
    if not path.is_file():
        return None
    found = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not found or len(set(found)) < len(found):
        raise DataError(f"{path}: expected one name per class and line, none of them twice")
    return found


def _count_classes(pairs: Sequence[Pair], ignore_index: int) -> int:
    """The largest number in the labels, plus one. What cannot be read is left to those who need it."""
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


def pair_by_stem(root: Path, images: str, labels: str, endings: tuple[str, str] = ("", "")) -> list[Pair]:
    """All images of a folder at any depth, by name, each with the label of the same name in another folder.

    Args:
        root: Of the data set.
        images, labels: Folders in it.
        endings: What the names of images and of labels end in, before the suffix, beyond what they share.

    Returns:
        An image without a label is paired with a file that does not exist.
    """
    image_folder, label_folder = root / images, root / labels
    of_stem: dict[str, Path] = {}
    for path in sorted(label_folder.rglob("*.*")):
        stem = _stem(path.relative_to(label_folder), endings[1])
        if stem is None or path.suffix.lower() not in _LABEL_SUFFIXES:
            continue
        if stem in of_stem:
            raise DataError(f"{label_folder}: {of_stem[stem].name} and {path.name} are labels of one image; keep one")
        of_stem[stem] = path
    pairs = []
    for path in sorted(image_folder.rglob("*.*")):
        inside = path.relative_to(image_folder)
        stem = _stem(inside, endings[0])
        if stem is None or not is_image_name(inside.as_posix()):
            continue
        label = of_stem.get(stem, label_folder / f"{stem}{endings[1]}.png")
        pairs.append(Pair(root, path.relative_to(root).as_posix(), label.relative_to(root).as_posix()))
    return pairs


def _stem(path: Path, ending: str) -> str | None:
    """Without suffix and ending; None where the ending is not there."""
    stem = path.with_suffix("").as_posix()
    return stem.removesuffix(ending) if stem.endswith(ending) else None


def _listed(root: Path, lists: str, labels: str, split: str) -> list[Pair]:
    """The pairs of Pascal VOC that a text file names."""
    path = root / "ImageSets" / lists / f"{split}.txt"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; it lists the images of the split {split!r}, a name without .jpg per line"
        )
    stems = path.read_text(encoding="utf-8").split()
    return [Pair(root, f"JPEGImages/{stem}.jpg", f"{labels}/{stem}.png") for stem in stems]


def _plain_code(classes: tuple[str, ...], void: int) -> LabelCode:
    """Numbers that are the classes themselves, and one for void, which wins."""
    return LabelCode(classes, {number: number for number in range(len(classes))} | {void: VOID})


def _has(*folders: str) -> Callable[[Path], bool]:
    return lambda root: all((root / folder).is_dir() for folder in folders)


def _is_folder(root: Path) -> bool:
    return _has("images/train", "labels/train")(root) or _has("train/images", "train/labels")(root)


def _is_camvid(root: Path) -> bool:
    """SegNet's folders, or plain ones whose classes.txt has its names."""
    return _has("train", "trainannot")(root) or (_is_folder(root) and _class_names(root) == names.CAMVID)


LAYOUTS: dict[str, Layout] = {
    "ade20k": Layout(
        "images/{training,validation} and annotations/{training,validation} (ADEChallengeData2016, 150 classes)",
        _has("images/training", "annotations/training"),
        _read_ade20k,
    ),
    "context": Layout(
        "JPEGImages, SegmentationClassContext and ImageSets/SegmentationContext/{train,val}.txt (Pascal Context, 59 "
        "classes without background)",
        _has("JPEGImages", "SegmentationClassContext"),
        _read_context,
    ),
    "context60": Layout(
        "the folders of context, with the background as a class",
        _has("JPEGImages", "SegmentationClassContext"),
        _read_context60,
    ),
    "voc": Layout(
        "JPEGImages, SegmentationClass and ImageSets/Segmentation/{train,val}.txt (Pascal VOC 2012, 21 classes)",
        _has("JPEGImages", "SegmentationClass"),
        _read_voc,
    ),
    "cityscapes": Layout(
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png (or "
        "labelTrainIds; 19 classes)",
        _has("leftImg8bit/train", "gtFine/train"),
        _read_cityscapes,
    ),
    "coco-stuff": Layout(
        "images/{train2017,val2017} and annotations or stuffthingmaps/{train2017,val2017} with png files (171 classes)",
        lambda root: (
            _has("images/val2017")(root) and any(_coco_maps(root / x) for x in ("annotations", "stuffthingmaps"))
        ),
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
