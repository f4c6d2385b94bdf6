"""Reading of the JSON files that ``featsharp eval TASK --json`` writes."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from featsharp.errors import ConfigError, DataError
from featsharp.files import read_file

# Numbers between 0 and 1 that are drawn in percent, by how their names begin and end.
SHARES = ("miou", "pck@", "pixel_accuracy", "accuracy_")
SHARE_ENDINGS = ("_f", "_precision", "_recall")
SPELLINGS = {"miou": "mIoU", "iou": "IoU", "ods": "ODS", "ois": "OIS", "f": "F", "cka": "CKA"}


class Number(NamedTuple):
    """A number of a result with its 95 % interval; without one all three are the same."""

    value: float
    low: float
    high: float


class Entry(NamedTuple):
    """Result of one encoder."""

    label: str
    upsampler: str
    factor: float
    backbone: str
    key: str | None  # of the encoder's content; None in files of early versions
    result: Mapping[str, Any]


def add_results(parser: argparse.ArgumentParser, task: str) -> None:
    """Add the argument for result files of a task."""
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help=f"of featsharp eval {task}")


def read_result(path: Path, *tasks: str) -> dict[str, Any]:
    """Read a result file.

    Args:
        path: JSON of ``featsharp eval TASK --json``.
        tasks: Allowed tasks; none: any.

    Raises:
        DataError: For a file that is missing, no JSON, no result, or of another task, with the command to make one.
    """
    make = " or ".join(f"featsharp eval {task} ... --json FILE" for task in tasks or ("TASK",))
    wanted = f"the result of {' or '.join(tasks)}" if tasks else "a result"
    try:
        content = json.loads(read_file(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; make it with: {make}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON; this figure needs {wanted}, made with: {make}") from error
    task = content.get("task") if isinstance(content, dict) else None
    if not isinstance(task, str):
        raise DataError(f"{path} holds no result of featsharp eval; this figure needs {wanted}, made with: {make}")
    if tasks and task not in tasks:
        raise DataError(f"{path} is the result of {task}; this figure needs {wanted}, made with: {make}")
    return {**content, "file": str(path)}


def entries(content: Mapping[str, Any]) -> Iterator[Entry]:
    """Iterate over the encoders of a result.

    Raises:
        DataError: When the file has none, or an incomplete one.
    """
    encoders = content.get("encoders")
    if not isinstance(encoders, dict) or not encoders:
        raise DataError(f"{content['file']} names no encoder; measure at least one: --checkpoint or --upsampler")
    for label, one in encoders.items():
        try:
            yield Entry(
                label, one["upsampler"], float(one["factor"]), one["backbone"], one.get("key"), dict(one["result"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{content['file']}: encoder {label!r} is incomplete ({error!r}); measure it anew"
            ) from error


def line_names(entries: Sequence[tuple[Hashable, Entry]]) -> list[str]:
    """Name the line of each encoder: by its upsampler, so that several factors make one line.

    Where a group (a panel of the figure) has several encoders of an upsampler at one factor, of other backbones or
    checkpoints, all encoders of that upsampler have their labels.
    """
    times = Counter((group, entry.upsampler, entry.factor) for group, entry in entries)
    shared = {upsampler for (_, upsampler, _), count in times.items() if count > 1}
    return [entry.label if entry.upsampler in shared else entry.upsampler for _, entry in entries]


def number(entry: Entry, name: str, file: object) -> Number:
    """Look up a number of an encoder's result by its name; "a/b" is b inside of a.

    Raises:
        ConfigError: For an unknown name, with all names.
    """
    numbers = dict(_numbers(entry.result))
    if name not in numbers:
        raise ConfigError(f"{file}: {entry.label!r} has no {name!r}. Available: {', '.join(numbers) or 'none'}")
    return numbers[name]


def axis_name(metric: str) -> tuple[str, float]:
    """Name the axis of a number, and the scale of the number on it: shares are drawn in percent."""
    *groups, name = metric.split("/")
    share = name.startswith(SHARES) or name.endswith(SHARE_ENDINGS) or groups[-1:] == ["iou"]
    text = ", ".join(" ".join(SPELLINGS.get(word, word) for word in part.split("_")) for part in (*groups, name))
    text = re.sub(r"\bpck\b", "PCK", text)
    return (f"{text} (%)", 100.0) if share else (text, 1.0)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Number]]:
    for name, value in values.items():
        if isinstance(value, dict):
            if set(value) == set(Number._fields):
                yield prefix + name, Number(**{key: float(number) for key, number in value.items()})
            else:
                yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, Number(*3 * (float(value),))
