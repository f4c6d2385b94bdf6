"""Items and boxes of the tasks on pictures with objects."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL.Image import Image

from featsharp.data.sources import open_source
from featsharp.errors import DataError
from featsharp.evaluation.layouts.frames import decode_labelled
from featsharp.evaluation.layouts.layout import spread
from featsharp.evaluation.layouts.objects import open_labels
from featsharp.evaluation.layouts.outlines import ObjectMask
from featsharp.evaluation.runner import Item, Task
from featsharp.settings import setting


@dataclass
class ObjectTask(Task):
    """A task whose items are the pictures of a folder or tar that have an entry in files of objects.

    The data of an item are the source, the picture's number in it, and the labels.
    """

    data: Path = setting(Path("."), "images: a folder or tars", type=Path, metavar="DIR", required=True)
    labels: Path = setting(
        Path("."), "COCO's instances_*.json, or a folder of YOLO's .txt", type=Path, metavar="PATH", required=True
    )
    limit: int | None = setting(
        None, "only N images with objects, spread evenly over their list", type="count", metavar="N"
    )
    low_res_size: tuple[int, int] | None = setting(
        None, "size of the low-resolution pass; default: the backbone's native one", type="size", metavar="HxW"
    )

    def items(self) -> Iterator[Item]:
        source, labels = open_source(self.data), open_labels(self.labels)
        known = [index for index in range(len(source)) if labels.knows(source.name(index))]
        if not known:
            raise DataError(f"no image of {self.data} has objects in {self.labels}; images and labels go by one name")
        for index in spread(known, self.limit):
            yield Item(source.name(index), (source, index, labels))

    def read(self, item: Item) -> tuple[Image, list[ObjectMask]]:
        """Read the RGB picture of an item and its objects; DataError where either is damaged, or there is no object."""
        source, index, labels = item.data
        image = decode_labelled(source.read(index), item.name, labels.frame(item.name))
        objects = labels.read(item.name, (image.height, image.width))
        if not objects:
            raise DataError(f"{item.name}: there is no object in it")
        return image, objects

    def item_key(self, item: Item) -> object:
        source, index, labels = item.data
        return [hashlib.sha256(source.read(index)).hexdigest(), labels.key(item.name)]


def mask_box(mask: np.ndarray) -> np.ndarray:
    """Return (top, bottom, left, right) of the box around a mask [H, W] that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1])


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the intersection over union of two boxes (top, bottom, left, right)."""
    low, high = np.maximum(first[::2], second[::2]), np.minimum(first[1::2], second[1::2])
    both = np.prod(np.maximum(high - low, 0))
    areas = [np.prod(box[1::2] - box[::2]) for box in (first, second)]
    return float(both / (sum(areas) - both))
