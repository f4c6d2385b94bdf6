"""Layouts of objects with class and outline: COCO's instances JSON, or YOLO's text files."""

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from featsharp.errors import DataError
from featsharp.evaluation.keys import file_key
from featsharp.evaluation.layouts.frames import Frame
from featsharp.evaluation.layouts.layout import Layout
from featsharp.evaluation.layouts.outlines import Labels, ObjectBox, ObjectMask, draw
from featsharp.files import list_files, path_in_list, read_lines

# Rounding error of fractions in YOLO files.
SLACK = 1e-3


def open_labels(path: Path) -> Labels:
    """Open the objects of a data set in the first of :data:`LAYOUTS` that fits.

    Raises:
        DataError: When none fits, and for a JSON file that is not COCO's.
    """
    for layout in LAYOUTS.values():
        if layout.fits(path):
            labels: Labels = layout.read(path)
            return labels
    raise DataError(f"{path} holds no objects; expected {' or '.join(layout.expected for layout in LAYOUTS.values())}")


class YoloLabels:
    """YOLO's labels: a file per image, a line per object, ``class cx cy w h`` or ``class x y x y ...``.

    Numbers are fractions of width and height. Images without a file are not part of the data set.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def knows(self, name: str) -> bool:
        return self._path(name).is_file()

    def frame(self, name: str) -> Frame:
        return Frame(self._path(name).name)

    def read(self, name: str, size: tuple[int, int]) -> list[ObjectMask]:
        masks = ((category, draw([outline], size)) for category, outline in self._outlines(name, size))
        return [ObjectMask(category, mask, float(mask.sum())) for category, mask in masks if mask.any()]

    def boxes(self, name: str, size: tuple[int, int]) -> list[ObjectBox]:
        objects = []
        for category, outline in self._outlines(name, size):
            mask = partial(draw, [outline], size)
            objects.append(ObjectBox(category, _around(outline, size), float(mask().sum()), False, mask))
        return [one for one in objects if one.area]

    def key(self, name: str) -> object:
        return file_key(self.folder, self._path(name).name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{PurePosixPath(name).stem}.txt"

    def _outlines(self, name: str, size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
        path = self._path(name)
        for number, line in enumerate(read_lines(path), 1):
            if line:
                category, outline = _parse_line(line, f"{path.name}, line {number}")
                yield category, outline * (size[1], size[0])


class CocoLabels:
    """COCO's ``images`` and ``annotations`` of a JSON file; masks other than polygons are boxes.

    Attributes:
        names: Of the files of all images.
        categories: Names of the categories by number, as far as the file has them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_bytes())
            self.names = [str(path_in_list(image["file_name"])) for image in content["images"]]
            self.categories = {one["id"]: str(one["name"]) for one in content.get("categories", ())}
            stems = {image["id"]: path_in_list(image["file_name"]).stem for image in content["images"]}
            self._sizes = {stems[image["id"]]: (image.get("height"), image.get("width")) for image in content["images"]}
            self._annotations: dict[str, list[Any]] = defaultdict(list)
            self._crowds: dict[str, list[Any]] = defaultdict(list)
            for annotation in content["annotations"]:
                kind = self._crowds if annotation.get("iscrowd") else self._annotations
                kind[stems[annotation["image_id"]]].append(annotation)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path.name} is not a COCO file of instances ({type(error).__name__}: {error})") from error

    def knows(self, name: str) -> bool:
        return PurePosixPath(name).stem in self._annotations

    def frame(self, name: str) -> Frame:
        size = self._sizes[PurePosixPath(name).stem]
        return Frame(f"{self.path.name}, image {name}", size if all(isinstance(n, int) for n in size) else None)

    def read(self, name: str, size: tuple[int, int]) -> list[ObjectMask]:
        objects = (ObjectMask(one.category, one.mask(), one.area) for one in self.boxes(name, size) if not one.crowd)
        return [one for one in objects if one.mask.any()]

    def boxes(self, name: str, size: tuple[int, int]) -> list[ObjectBox]:
        objects, stem = [], PurePosixPath(name).stem
        for annotation in [*self._annotations.get(stem, ()), *self._crowds.get(stem, ())]:
            try:
                mask = partial(draw, _coco_outlines(annotation), size)
                box = _around(_box(*map(float, annotation["bbox"])), size)
                area = float(annotation["area"] if "area" in annotation else mask().sum())
                crowd = bool(annotation.get("iscrowd"))
                objects.append(ObjectBox(int(annotation["category_id"]), box, area, crowd, mask))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.path.name}, annotation {annotation.get('id')} of {name}: {type(error).__name__}: {error}"
                ) from error
        return objects

    def key(self, name: str) -> object:
        return file_key(self.path.parent, self.path.name)


def _parse_line(line: str, location: str) -> tuple[int, np.ndarray]:
    """Parse class and outline [n, 2] in fractions."""
    try:
        first, *rest = line.split()
        category, numbers = int(first), np.array(rest, dtype=float)
    except ValueError as error:
        raise DataError(f"{location}: expected a class and numbers, got {line[:40]!r}") from error
    if category < 0 or len(numbers) not in (4, *range(6, len(numbers) + 1, 2)):
        raise DataError(f"{location}: expected 'class cx cy w h' or 'class x y x y x y ...', got {line[:40]!r}")
    if not ((numbers >= -SLACK) & (numbers <= 1 + SLACK)).all():
        raise DataError(f"{location}: coordinates must be fractions from 0 to 1, got {line[:40]!r}")
    if len(numbers) > 4:
        return category, numbers.reshape(-1, 2)
    cx, cy, w, h = numbers
    return category, _box(cx - w / 2, cy - h / 2, w, h)


def _coco_outlines(annotation: dict[str, Any]) -> list[np.ndarray]:
    polygons = annotation.get("segmentation")
    if isinstance(polygons, list) and polygons:
        return [np.array(polygon, dtype=float).reshape(-1, 2) for polygon in polygons]
    return [_box(*map(float, annotation["bbox"]))]


def _box(x: float, y: float, w: float, h: float) -> np.ndarray:
    return np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)])


def _around(outline: np.ndarray, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Compute the box of an outline [n, 2] within a picture of ``size`` (H, W); ValueError for NaN."""
    if np.isnan(outline).any():
        raise ValueError("coordinates are NaN")
    (left, top), (right, bottom) = np.clip([outline.min(0), outline.max(0)], 0, (size[1], size[0]))
    return float(left), float(top), float(right), float(bottom)


def _is_yolo(path: Path) -> bool:
    return path.is_dir() and any(name.endswith(".txt") for name in list_files(path, deep=False))


def _is_coco(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".json"


# By name; the first that fits is taken. ``read`` takes the file or folder and returns Labels.
LAYOUTS: dict[str, Layout] = {
    "yolo": Layout("a folder of YOLO's NAME.txt", _is_yolo, YoloLabels),
    "coco": Layout("COCO's instances_*.json", _is_coco, CocoLabels),
}
