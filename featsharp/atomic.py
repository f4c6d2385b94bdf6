"""Files that are replaced whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` at the end of the block.

    Where the block, or anything else, fails, what was at ``path`` is still there, and nothing beside it. A process that
    is killed leaves a hidden ``.NAME.PID.tmp``. The folder is made. Nothing is synced to the disk.

    Raises:
        OSError: When it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            temporary.unlink()
