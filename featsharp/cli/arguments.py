"""Arguments that several sub-commands share. Nothing here imports torch, so that help is instant."""

import argparse
import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from featsharp.errors import ConfigError, DataError, missing_checkpoint
from featsharp.files import check_writable
from featsharp.names import CHECKPOINT_ENDINGS
from featsharp.settings import DEFAULT_BACKBONE, add_backbone, add_device, add_encoders

__all__ = [
    "CHECKPOINT_ENDINGS",
    "DEFAULT_BACKBONE",
    "add_backbone",
    "add_device",
    "add_encoders",
    "check_inputs",
    "check_result",
    "parse_count",
    "parse_size",
    "protect_files",
]


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``448x672`` to (448, 672), for argparse."""
    height, _, width = text.lower().partition("x")
    if not (_is_count(height) and _is_count(width)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no size; write HEIGHTxWIDTH, for example 448x672")
    return int(height), int(width)


def parse_count(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    if not _is_count(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no count; give a whole number of at least 1, of 9 digits")
    return int(text)


def _is_count(text: str) -> bool:
    # Larger ones overflow further down; isdigit alone would take "²".
    return text.isdecimal() and len(text) < 10 and int(text) > 0


def check_inputs(paths: Iterable[Path], checkpoints: Iterable[str | Path] = ()) -> None:
    """Check that files exist before large packages are imported.

    Args:
        paths: Files or folders that a command reads.
        checkpoints: Names of encoders; those of files are checked.

    Raises:
        DataError: For the first of ``paths`` that does not exist.
        CheckpointError: For a checkpoint that does not exist.
    """
    for path in paths:
        try:
            os.stat(path)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
    for name in checkpoints:
        if str(name).endswith(CHECKPOINT_ENDINGS) and not os.path.exists(name):
            raise missing_checkpoint(Path(name))


def check_result(path: Path) -> None:
    """Raise FeatSharpError, before long work, where the file of a result cannot be written."""
    if os.path.isdir(path):
        raise ConfigError(f"the result {path} is a folder; name a file")
    check_writable(path.parent)


def protect_files(results: Iterable[tuple[Path, Path]], inputs: Iterable[Path]) -> None:
    """Check that results overwrite neither an input nor a file of other origin.

    Args:
        results: Files to write, each with one that exists if an earlier run wrote it.
        inputs: Files that the command reads.

    Raises:
        ConfigError: For the first result that would.
    """
    sources = {identity: path for path in inputs for identity in _identities(path)}
    for result, sign in results:
        for source in (sources[identity] for identity in _identities(result) if identity in sources):
            raise ConfigError(f"the result {result} would overwrite the input {source}; choose another place with -o")
        if os.path.exists(result) and not os.path.exists(sign):
            raise ConfigError(
                f"the result would overwrite {result}, which featsharp did not write; choose another place with -o"
            )


def _identities(path: Path) -> Iterator[object]:
    """Yield what two names of one file have in common: their resolved path, or its number where case is ignored."""
    yield os.path.realpath(path)
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if status.st_ino:
            yield status.st_dev, status.st_ino
