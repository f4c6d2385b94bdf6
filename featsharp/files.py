"""Atomic writing of files: they are replaced completely or not at all."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from featsharp.errors import FeatSharpError


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file to write to, which replaces ``path`` at the end of the block.

    After an error ``path`` is unchanged and the temporary file is deleted. A process that is killed leaves a hidden
    ``.NAME.PID.tmp``. The folder is created.

    Args:
        path: Of the file at the end; it has another name, ``file.name``, until then.
        sync: Whether to flush the file to the disk first, as a full disk may show only then.

    Raises:
        OSError: When it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # renamed, or never created
            temporary.unlink()


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically, see :func:`replacing`.

    Raises:
        FeatSharpError: When it cannot be written. It is no DataError: unlike a bad image, the next one will fail too.
    """
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise FeatSharpError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error


def remove_leftovers(folder: Path, older_than: float = 0) -> None:
    """Delete the unfinished files in ``folder`` of writers that were killed.

    Their age is at least ``older_than`` seconds: where others may be writing now, give more than any file takes.
    """
    latest = time.time() - older_than
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # gone, or not ours to delete
            if path.stat().st_mtime <= latest:
                path.unlink()
