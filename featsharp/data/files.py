"""Writing of result files: whole or not at all."""

import os
from pathlib import Path

from featsharp.errors import FeatSharpError


def write_file(path: Path, content: bytes) -> None:
    """Write a file, making its folder, so that a full disk costs neither what was there before nor leaves half a file.

    Raises:
        FeatSharpError: When it cannot be written. It is no DataError: unlike a bad image, the next one will fail too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FeatSharpError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
