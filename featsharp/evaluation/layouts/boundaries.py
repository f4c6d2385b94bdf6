"""Pictures with human boundaries, in the layouts of BSDS500 and similar data sets.

ROOT/images/SPLIT/NAME.jpg      ROOT/groundTruth/SPLIT/NAME.mat       BSDS500 as published
ROOT/SPLIT/images/NAME.jpg      ROOT/SPLIT/groundTruth/NAME.mat       split by split
ROOT/images/NAME.jpg            ROOT/groundTruth/NAME.mat             one split alone
... the same with boundaries/NAME.png, NAME_1.png, ... for groundTruth: masks of lines, one per annotator
"""

import io
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from featsharp.data.images import is_image_name
from featsharp.errors import DataError
from featsharp.evaluation.layouts.frames import Frame, read_orientation
from featsharp.evaluation.layouts.mat import read_mat
from featsharp.files import is_hidden, list_files

LAYOUT = (
    "expected images/SPLIT/*.jpg with groundTruth/SPLIT/*.mat (BSDS500), SPLIT/images with SPLIT/groundTruth, or "
    "images with groundTruth; or masks in boundaries/NAME*.png in place of groundTruth"
)
SEPARATORS = "_-."
# Share of a mask that lines may cover: more is an inverted mask.
_MOST_DRAWN = 0.5


class Picture(NamedTuple):
    """A picture and the files with its boundaries: one .mat, or a mask per annotator; none where they are missing."""

    image: Path
    truths: tuple[Path, ...]


def find_pictures(root: Path, split: str | None) -> list[Picture]:
    """List the pictures of a data set, by name; ``split`` None for a data set with only one.

    Raises:
        DataError: When the folder has none of the layouts, or the split is missing, empty or not the only one.
    """
    if split is None and not (root / "images").is_dir():
        splits = [name for name in _list_folders(root) if (root / name / "images").is_dir()]
        if len(splits) > 1:
            raise DataError(f"{root} has several splits; choose --split {' or '.join(splits)}")
        split = splits[0] if splits else None
    for images, truths in _folders(root, split):
        if images.is_dir() and truths.is_dir():
            break
    else:
        raise DataError(f"{root} holds no boundaries of split {split!r}; {LAYOUT}, and --split for the data set's own")
    paths = [images / name for name in list_files(images, deep=False) if is_image_name(name)]
    if not paths:
        inner = _list_folders(images)
        hint = f"; choose --split {' or '.join(inner)}" if inner else ""
        raise DataError(f"{images} holds no image{hint}")
    files = _truths_by_stem(truths, {path.stem for path in paths})
    return [Picture(path, tuple(sorted(files[path.stem]))) for path in paths]


def read_boundaries(picture: Picture) -> tuple[list[np.ndarray], Frame]:
    """Read the boundary map of each annotator, [H, W] bool, and the pixels of the picture that they lie on.

    Raises:
        DataError: When there is none, a file cannot be read, maps differ in size, or all are empty.
    """
    if not picture.truths:
        raise DataError(f"{picture.image.name}: there is no file with its boundaries")
    maps: list[np.ndarray] = []
    frames: list[Frame] = []
    for path in picture.truths:
        drawn, orientation = (_read_mat(path), 1) if path.suffix.lower() == ".mat" else _read_mask(path)
        maps += drawn
        frames += [Frame(path.name, (one.shape[0], one.shape[1]), orientation) for one in drawn]
    first = frames[0]
    for frame in frames:
        if frame[1:] != first[1:]:
            raise DataError(f"{frame.labels}: boundaries of another size or EXIF orientation than in {first.labels}")
    if not any(drawn.any() for drawn in maps):
        raise DataError(f"{first.labels}: nobody drew a boundary")
    return maps, first


def _folders(root: Path, split: str | None) -> list[tuple[Path, Path]]:
    """List the folders that may have images and boundaries."""
    kinds = ("groundTruth", "boundaries")
    if split is None:
        return [(root / "images", root / kind) for kind in kinds]
    published = [(root / "images" / split, root / kind / split) for kind in kinds]
    return published + [(root / split / "images", root / split / kind) for kind in kinds]


def _list_folders(root: Path) -> list[str]:
    """List the names of the folders in a folder that are not hidden."""
    return sorted(path.name for path in root.glob("*") if path.is_dir() and not is_hidden(path.name))


def _truths_by_stem(folder: Path, stems: set[str]) -> defaultdict[str, list[Path]]:
    files = defaultdict(list)
    for path in (folder / name for name in list_files(folder, deep=False)):
        if path.suffix.lower() == ".mat" and path.stem in stems:
            files[path.stem].append(path)
        elif path.suffix.lower() == ".png":
            files[_stem_of_mask(path.stem, stems)].append(path)
    return files


def _stem_of_mask(name: str, stems: set[str]) -> str:
    """Find the longest stem that a mask's name begins with, up to a separator; "" for none."""
    ends = [len(name), *(i for i in reversed(range(len(name))) if name[i] in SEPARATORS)]
    return next((name[:end] for end in ends if name[:end] in stems), "")


def _read_mat(path: Path) -> list[np.ndarray]:
    """Read a file of BSDS500: a cell per annotator, each a struct with Segmentation and Boundaries."""
    try:
        truths: Any = read_mat(path)["groundTruth"]
        annotators = truths if isinstance(truths, list) else [truths]
        maps = [np.asarray(annotator["Boundaries"]) for annotator in annotators]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path.name}: no variable groundTruth with Boundaries, as BSDS500 has it") from error
    if not maps or any(drawn.ndim != 2 for drawn in maps):
        raise DataError(f"{path.name}: groundTruth holds no maps of boundaries")
    return [drawn != 0 for drawn in maps]


def _read_mask(path: Path) -> tuple[list[np.ndarray], int]:
    """Read a mask, in which boundaries are not black, and its EXIF orientation."""
    try:
        encoded = path.read_bytes()
        with Image.open(io.BytesIO(encoded)) as image:
            drawn = np.asarray(image.convert("L")) != 0
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path.name}: cannot be decoded as a mask ({error})") from error
    if drawn.mean() > _MOST_DRAWN:
        raise DataError(
            f"{path.name}: {drawn.mean():.0%} of the pixels are not black, which is no mask of lines; draw boundaries "
            "white on black"
        )
    return [drawn], read_orientation(encoded)
