"""The images of a folder or tar, and tasks on images alone."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from featsharp.data.images import decode_image, try_decode
from featsharp.data.sources import open_source
from featsharp.errors import DataError
from featsharp.evaluation.runner import Item, Row, Task
from featsharp.model import SharpEncoder
from featsharp.settings import setting

logger = logging.getLogger(__name__)


class ImageSet:
    """The readable images of a folder or tar, by name; others are listed in ``skipped``."""

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self._source = open_source(folder)
        self._limit = limit
        self.folder = str(folder)
        self.skipped: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[tuple[str, Image]]:
        """Iterate over name and RGB picture, in the order of the names."""
        self.skipped = [(problem, "damaged shard") for problem in self._source.problems]
        count = 0
        for index in range(len(self._source)):
            if count == self._limit:
                return
            name = self._source.name(index)
            image = try_decode(self._source.encoded(index), self.skipped)
            if image is None:
                logger.warning("%s skipped: %s", *self.skipped[-1])
                continue
            count += 1
            yield name, image
        if count == 0:
            raise DataError(f"{self.folder} holds no readable image; the first problem: {self.skipped[0][1]}")


@dataclass
class ImageTask(Task):
    """A task whose items are the images of a folder or tar, by name. Subclasses implement :meth:`measure_image`."""

    data: Path = setting(Path("."), "images: a folder or tars", type=Path, metavar="DIR", required=True)
    limit: int | None = setting(None, "only the first N images", type="count", metavar="N")
    seed: int = setting(0, "of everything random", type=int, metavar="N")

    def items(self) -> Iterator[Item]:
        source = open_source(self.data)
        count = len(source) if self.limit is None else min(self.limit, len(source))
        for index in range(count):
            yield Item(source.name(index), (source, index))
        for problem in source.problems:
            yield Item(problem, None)

    def item_key(self, item: Item) -> str:
        source, index = item.data or (None, 0)
        return "" if source is None else hashlib.sha256(source.read(index)).hexdigest()[:16]

    def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
        if item.data is None:
            raise DataError("damaged shard")
        source, index = item.data
        return self.measure_image(encoder, decode_image(source.read(index), name=item.name), index, head)

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, head: Any) -> Row:
        """Measure on one RGB picture; its ``number`` seeds random numbers, the same for every encoder."""
        raise NotImplementedError
