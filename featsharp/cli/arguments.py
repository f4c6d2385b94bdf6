"""Arguments that several sub-commands share. Nothing here imports torch, so that help is instant."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from featsharp.errors import ConfigError, DataError, missing_checkpoint

CHECKPOINT_ENDINGS = (".pth", ".pt", ".safetensors")


def add_backbone(parser: argparse.ArgumentParser, text: str = "default: the checkpoint's own") -> None:
    """Add the flags --backbone and --allow-functions of everything that loads encoders."""
    parser.add_argument("--backbone", help=f"name of the backbone; {text}")
    parser.add_argument(
        "--allow-functions",
        action="store_true",
        help="let the checkpoint import functions that it names; runs their code",
    )


def add_device(parser: argparse.ArgumentParser, text: str = "auto, cpu, cuda, ...") -> None:
    """Add the flag --device."""
    parser.add_argument("--device", default="auto", help=text)


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``448x672`` to (448, 672), for argparse."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH, for example 448x672")
    return int(height), int(width)


def parse_count(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; give a whole number of at least 1")
    return int(text)


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
        if not path.exists():
            raise DataError(f"{path} does not exist")
    for name in checkpoints:
        if str(name).endswith(CHECKPOINT_ENDINGS) and not Path(name).exists():
            raise missing_checkpoint(Path(name))


def protect_files(results: Iterable[tuple[Path, Path]], inputs: Iterable[Path]) -> None:
    """Check that results overwrite neither an input nor a file of other origin.

    Args:
        results: Files to write, each with one that exists if an earlier run wrote it.
        inputs: Files that the command reads.

    Raises:
        ConfigError: For the first result that would.
    """
    sources = {path.resolve(): path for path in inputs}
    for result, sign in results:
        if source := sources.get(result.resolve()):
            raise ConfigError(f"the result {result} would overwrite the input {source}; choose another place with -o")
        if result.exists() and not sign.exists():
            raise ConfigError(
                f"the result would overwrite {result}, which featsharp did not write; choose another place with -o"
            )
