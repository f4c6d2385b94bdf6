"""Output of commands in a terminal: log messages, progress bars, tables."""

import argparse
import contextlib
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

# Most characters of a line of wrapped text, and fewest of the text in it.
LINE, LEAST_TEXT = 100, 30
# Errors of stdout since the last flush_output.
_lost: list[OSError] = []
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add the flags ``-v`` and ``-q``, which every parser of a command has."""
    for flags, step, text in (
        (("-v", "--verbose"), 1, "say more of what happens; twice: details for bug reports"),
        (("-q", "--quiet"), -1, "errors and results only"),
    ):
        parser.add_argument(
            *flags, dest="verbosity", action="append_const", const=step, default=argparse.SUPPRESS, help=text
        )


def parse_verbosity(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Split ``-v`` and ``-q`` off arguments that argparse does not parse otherwise, such as overrides of Hydra.

    Returns:
        The verbosity (+1 for each ``-v``, -1 for each ``-q``) and all other arguments in their order.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_verbosity(parser)
    parsed, rest = parser.parse_known_args(arguments)
    return verbosity_of(parsed), rest


def verbosity_of(parsed: argparse.Namespace) -> int:
    """Sum up the flags ``-v`` (+1 each) and ``-q`` (-1 each)."""
    return sum(getattr(parsed, "verbosity", []))


def set_up_terminal(verbosity: int = 0, *, usual: int = logging.WARNING) -> None:
    """Send log messages of the package to stderr, and escape characters that the terminal cannot write.

    Args:
        verbosity: Negative for errors only, 0 for the ``usual`` level, 1 for INFO, 2 or more for DEBUG.
        usual: Level of :mod:`logging` without ``-v`` and ``-q``.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where another program has replaced or closed the stream
            with contextlib.suppress(ValueError):
                stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(levelname)s %(message)s")
    level = usual if verbosity == 0 else {-1: logging.ERROR, 1: logging.INFO}.get(max(verbosity, -1), logging.DEBUG)
    logging.getLogger("featsharp").setLevel(level)


def say(*lines: str, error: bool = False) -> None:
    """Print lines to stdout, or to stderr, during work that goes on whatever becomes of them.

    A stream that is closed, full or missing, or whose reader has ended, and characters that it cannot take cost the
    line alone. Control characters of names are escaped: a line stays one. :func:`flush_output` reports lost results.
    """
    text = "".join(_CONTROL.sub(lambda found: repr(found[0])[1:-1], line) + "\n" for line in lines)
    lost = _write(sys.stderr if error else sys.stdout, text)
    if lost is not None and not error:
        _lost.append(lost)


def flush_output() -> OSError | None:
    """Write out stdout at the end of a command; returns the first error of output that was lost.

    It is None where the reader has ended, as ``head`` does: it has what it wanted. Python would otherwise report an
    error when it exits.
    """
    if (last := _write(sys.stdout, "")) is not None:
        _lost.append(last)
    if _lost:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # another program's stream
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    first = next((error for error in _lost if not isinstance(error, BrokenPipeError)), None)
    _lost.clear()
    return first


@contextlib.contextmanager
def progress_bar(
    label: str, total: int | None, *, start: int = 0, unit: str = "it", wanted: bool = True
) -> Iterator[Callable[[str], object]]:
    """Show a progress bar on stderr where ``wanted``; yields the function that advances it, with a text beside it.

    There is none under ``-q``, where stderr is no terminal, and without tqdm (of the extra ``train``).
    """
    try:
        from tqdm import tqdm
    except ImportError:
        wanted = False
    if not wanted or sys.stderr is None or not logging.getLogger("featsharp").isEnabledFor(logging.WARNING):
        yield lambda text: None
        return
    file = _Indestructible(sys.stderr)
    with tqdm(desc=label, total=total, initial=start, unit=unit, file=file, disable=None, leave=False) as bar:

        def advance(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield advance


def with_progress(
    items: Iterable[T], label: str, wanted: bool = True, *, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """Iterate over the items, ``total`` of them where they have no length, with a :func:`progress_bar`."""
    total = len(items) if isinstance(items, Sized) else total
    with progress_bar(label, total, unit=unit, wanted=wanted) as advance:
        for item in items:
            yield item
            advance("")


def align(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """Format a header and rows of text in columns, two spaces apart.

    Args:
        columns: The header.
        rows: As many cells each.
        numbers: Whether all columns but the first are flush right; otherwise all are flush left.
    """
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    pads = [str.ljust, *[str.rjust if numbers else str.ljust] * (len(columns) - 1)]
    return [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in lines
    ]


def wrap(text: str, head: str = "", indent: int = 4) -> list[str]:
    """Break text into lines of at most :data:`LINE` characters, or fewer on a narrower terminal.

    Args:
        text: Words longer than a line are cut.
        head: Text before the first line.
        indent: Columns before the text, in every line.

    Returns:
        The lines; none for empty text.
    """
    width = max(min(LINE, shutil.get_terminal_size((LINE, 0)).columns), indent + LEAST_TEXT)
    return textwrap.wrap(
        text,
        width,
        initial_indent=head.ljust(indent),
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )


class _Indestructible:
    """A stream whose failures to write are ignored, as for a terminal that was closed meanwhile."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        _write(self._stream, text)

    def flush(self) -> None:
        _write(self._stream, "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _write(stream: TextIO | None, text: str) -> OSError | None:
    """Write and flush; returns the error of a stream that does not take it. One that is missing or closed is none."""
    if stream is None:
        return None
    try:
        try:
            stream.write(text)
        except UnicodeError:
            stream.write(text.encode("ascii", "backslashreplace").decode())
        stream.flush()
    except ValueError:  # closed
        pass
    except OSError as error:
        return error
    return None
