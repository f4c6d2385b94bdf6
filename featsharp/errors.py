"""Errors whose message is written for the user: what was given, what is allowed, what to do.

The command line prints the message of a :class:`FeatSharpError` as one line and exits with a non-zero status; anything
else is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path


class FeatSharpError(Exception):
    """Base of every error that the user can act on."""


class ConfigError(FeatSharpError, ValueError):
    """A name, option or combination of options that cannot work."""


class InputError(FeatSharpError, ValueError):
    """Tensors or images that an operation cannot take (shape, size, range, NaN)."""


class DataError(FeatSharpError, ValueError):
    """A file or folder of images that cannot be used."""


class CheckpointError(FeatSharpError, ValueError):
    """A checkpoint that cannot be read, written or used."""


class BackboneMismatchError(CheckpointError):
    """A checkpoint trained for another backbone than the given one."""


class ExportError(FeatSharpError, RuntimeError):
    """An encoder that cannot be written as a program for elsewhere."""


class DistributedError(FeatSharpError, RuntimeError):
    """Loss of contact between the processes of a run; the process that failed first gives the reason."""


class MissingDependencyError(FeatSharpError, ImportError):
    """An optional package or weight file is absent; the message gives the install command."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, of the machine or of an accelerator."""
    # PyTorch's error has a class for accelerators only.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    texts = ("can't allocate memory", "Storage size calculation overflowed", "numel: integer multiplication overflow")
    return named or any(text in str(error) for text in texts)


def explain(error: Exception) -> str | None:
    """Format an error that the user can act on in one line: ours, memory, files; None for a defect."""
    if isinstance(error, FeatSharpError):
        return str(error)
    if out_of_memory(error):
        return "memory ran out; ask for fewer or smaller things at once (sizes, batches), or give --max-memory if there"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign error, for a message of ours; of what it quotes from a file, the start."""
    return (str(error)[:2000].strip() or type(error).__name__).splitlines()[0][:500].rstrip("\0").rstrip(". ")


def shorten(texts: Collection[str], separator: str = ", ", shown: int = 5) -> str:
    """List the first of many texts in one line, and how many more there are."""
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return separator.join(list(texts)[:shown]) + more if texts else "none"


def unknown_name(kind: str, given: object, allowed: Iterable[str]) -> ConfigError:
    """Make the error for a name that does not exist, with the nearest matches and all allowed names."""
    allowed = sorted(allowed)
    nearest = difflib.get_close_matches(str(given), allowed, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(name) for name in nearest)}?" if nearest else "."
    return ConfigError(f"unknown {kind} {given!r}{hint} Available: {', '.join(allowed) or 'none'}")


def missing_checkpoint(path: Path) -> CheckpointError:
    """Make the error for a checkpoint that does not exist, with those beside it."""
    others = sorted(p.name for p in path.parent.glob("*.pth")) if path.parent.is_dir() else []
    return CheckpointError(
        f"checkpoint {path} does not exist" + (f"; that folder has {', '.join(others[:5])}" if others else "")
    )
