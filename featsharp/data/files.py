"""Writing of result files: whole or not at all."""

from pathlib import Path

from featsharp.atomic import replacing
from featsharp.errors import FeatSharpError


def write_file(path: Path, content: bytes) -> None:
    """Write a file, making its folder, so that a full disk costs neither what was there before nor leaves half a file.

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
