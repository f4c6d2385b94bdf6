"""The images of a folder or tar, and tasks on images alone."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from featsharp.data.images import decode_image, try_decode
from featsharp.data.sources import open_source
from featsharp.errors import DataError
from featsharp.evaluation.layouts.layout import spread
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


class NumberedDraws:
    """Random numbers of pictures: one generator draws those of all numbers in order, whichever of them are asked for.

    Args:
        seed: Of the generator.
        draw: Draws the numbers of one picture, as many for each.
    """

    def __init__(self, seed: int, draw: Callable[[torch.Generator], Tensor]) -> None:
        self._generator, self._draw = torch.Generator().manual_seed(seed), draw
        self._drawn: list[Tensor] = []

    def __getitem__(self, number: int) -> Tensor:
        while len(self._drawn) <= number:
            self._drawn.append(self._draw(self._generator))
        return self._drawn[number]


@dataclass
class ImageTask(Task):
    """A task whose items are the images of a folder or tar, by name. Subclasses implement :meth:`measure_image`."""

    data: Path = setting(Path("."), "images: a folder or tars", type=Path, metavar="DIR", required=True)
    skip: int = setting(0, "without the first N images", type="count", metavar="N")
    every: int = setting(1, "of the others only every N-th, from the first on", type="count", metavar="N")
    limit: int | None = setting(None, "of these only N, spread evenly over their list", type="count", metavar="N")
    seed: int = setting(0, "of everything random", type=int, metavar="N")

    def items(self) -> Iterator[Item]:
        source = open_source(self.data)
        for number, index in enumerate(spread(range(len(source))[self.skip :: self.every], self.limit)):
            yield Item(source.name(index), (source, index, number))
        for problem in source.problems:
            yield Item(problem, None)

    def item_key(self, item: Item) -> str:
        source, index, _ = item.data or (None, 0, 0)
        return "" if source is None else hashlib.sha256(source.read(index)).hexdigest()[:16]

    def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
        if item.data is None:
            raise DataError("damaged shard")
        source, index, number = item.data
        return self.measure_image(encoder, decode_image(source.read(index), name=item.name), number, head)

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, head: Any) -> Row:
        """Measure on one RGB picture; its ``number`` among those chosen decides the random numbers of all encoders."""
        raise NotImplementedError
