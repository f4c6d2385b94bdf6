"""Tasks that need images and nothing else."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from featsharp.data.images import decode_image
from featsharp.data.sources import open_source
from featsharp.errors import DataError
from featsharp.evaluation.task import Item, Row, Task
from featsharp.model import SharpEncoder
from featsharp.settings import setting


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

    def measure(self, encoder: SharpEncoder, item: Item, number: int, state: Any) -> Row:
        if item.data is None:
            raise DataError("damaged shard")
        source, index = item.data
        return self.measure_image(encoder, decode_image(source.read(index), name=item.name), number, state)

    def stamp(self, item: Item) -> str:
        source, index = item.data or (None, 0)
        return "" if source is None else hashlib.sha256(source.read(index)).hexdigest()[:16]

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, state: Any) -> Row:
        """Measure on one RGB picture."""
        raise NotImplementedError
