"""The contract of evaluation tasks, and the loop that runs one over any number of encoders.

A task is one file: a dataclass whose fields are its settings (and the flags of the command), derived from
:class:`Task`. It lists items (an image, a pair of images), measures one encoder on one item, and pools the rows. All
else is done here, the same for every task: progress, bad items, resuming, results.

Resuming: every measured row is appended to a journal at once. A row is found again by the task's settings, the content
of the encoder, and the item's name, place and files, so that the same command goes on after whatever stopped it.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from featsharp.builder import content_key
from featsharp.errors import DataError, FeatSharpError, InputError
from featsharp.evaluation.identity import digest, encoder_key
from featsharp.evaluation.samples import Estimate
from featsharp.files import write_file
from featsharp.model import SharpEncoder
from featsharp.settings import setting_fields, settings_of
from featsharp.terminal import with_progress

logger = logging.getLogger(__name__)

# What one item gave: JSON values by name. Names that begin with "_" serve the pooling and stay out of the result.
Row = dict[str, Any]
# Of one encoder over all items: estimates and plain numbers are printed, anything nested is only written.
Summary = dict[str, Any]


class Item(NamedTuple):
    """One thing to measure on."""

    name: str  # unique within the data set; what messages and results call it
    data: Any  # whatever the task's measure() needs, unread: paths, sizes, points


@dataclass(frozen=True)
class Subject:
    """An encoder to be measured.

    Attributes:
        label: What results call it.
        load: Builds it, in eval mode, on its device.
        tag: Tells encoders apart that are the same but for code of the user's: a version of it, for example.
        load_downsampler: For a checkpoint, the downsampler that it was trained with; None where there is none.
    """

    label: str
    load: Callable[[], SharpEncoder]
    tag: str = ""
    load_downsampler: Callable[[SharpEncoder], nn.Module | None] = lambda encoder: None


class Task:
    """Base of all tasks: a dataclass with fields made by :func:`setting`.

    Attributes:
        name: Of the task, on the command line and in results.
        title: One line about it.
        scratch: A folder that lasts until the result is written, where a stopped evaluation should go on; else None.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    scratch: Path | None = None

    def items(self) -> Iterable[Item]:
        """What there is to measure on, in a fixed order.

        Raises:
            DataError: When the data set cannot be read as a whole, or is empty.
        """
        raise NotImplementedError

    def begin(self, encoder: SharpEncoder, subject: Subject) -> Any:
        """What measuring this encoder needs beforehand, such as a trained head; gradients are allowed."""
        return None

    def measure(self, encoder: SharpEncoder, item: Item, number: int, state: Any) -> Row:
        """Measure on one item, in inference mode.

        Args:
            encoder: In eval mode.
            item: One of :meth:`items`.
            number: Its place among them, for random numbers that are the same for every encoder.
            state: What :meth:`begin` returned.

        Raises:
            DataError, InputError: For a bad item; it is skipped, reported and counted.
        """
        raise NotImplementedError

    def summarize(self, rows: Sequence[Row], state: Any) -> Summary:
        """Pool the rows of one encoder."""
        raise NotImplementedError

    def stamp(self, item: Item) -> str:
        """Changes when the content of an item does, so that a resumed evaluation measures it again."""
        return ""

    def state_key(self, state: Any) -> str:
        """Changes when what :meth:`begin` returned would measure something else, such as a head trained anew."""
        return ""


class Journal:
    """Rows on disk, one JSON line each, until the result is written. Without a path nothing is kept.

    Two evaluations must not share one.

    Args:
        path: Made when the first row comes; lines that were cut off are dropped.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._rows: dict[tuple[str, str], Row] = {}
        if path is None or not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and self._read(line)]
        if len(kept) < len(lines):
            write_file(path, b"".join(kept))

    @property
    def scratch(self) -> Path | None:
        """A folder for what else a stopped evaluation should find again."""
        return None if self.path is None else self.path.with_name(f"{self.path.name}.work")

    def get(self, key: str, name: str) -> Row | None:
        """The row of an item."""
        return self._rows.get((key, name))

    def add(self, key: str, name: str, row: Row) -> None:
        """Keep a row."""
        if self.path is None:
            return
        self._rows[key, name] = row
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps([key, name, row]).encode() + b"\n")
        except OSError as error:
            raise FeatSharpError(
                f"cannot write {self.path}: {error.strerror or error}; free some space or choose another --json"
            ) from error

    def remove(self) -> None:
        """Delete it, once all of it is in a result."""
        if self.path is not None and self.scratch is not None:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _read(self, line: bytes) -> bool:
        try:
            key, name, row = json.loads(line)
        except ValueError:
            return False
        self._rows[key, name] = row
        return True


def evaluate(
    task: Task,
    subjects: Sequence[Subject],
    *,
    journal: Journal | None = None,
    progress: bool = True,
    report: Callable[[str, dict[str, Any]], None] = lambda label, found: None,
) -> dict[str, dict[str, Any]]:
    """Run a task on every subject.

    Args:
        task: With its settings.
        subjects: Loaded one after the other. One that cannot be measured does not cost the others.
        journal: Where rows are kept, for resuming; the caller removes it when the result is safe. None: nowhere.
        progress: Whether to show a bar on stderr, where the package tqdm is installed.
        report: Called with the label and what is returned of each subject as soon as it is measured.

    Returns:
        By label: "result" (the task's summary), "items" (rows by name), "skipped" (name and reason), and what the
        encoder is; or "failed" with the reason.

    Raises:
        FeatSharpError: When no subject could be measured: the reason of the first.
    """
    items = list(task.items())
    if not items:
        raise DataError(f"task {task.name!r} found nothing to measure on in its data; look at its settings")
    book = journal or Journal()
    task.scratch = book.scratch
    found: dict[str, dict[str, Any]] = {}
    errors = []
    for subject in subjects:
        try:
            found[subject.label] = _evaluate(task, items, subject, book, progress)
        except FeatSharpError as error:
            errors.append(error)
            found[subject.label] = {"failed": str(error)}
        if len(errors) < len(subjects):
            report(subject.label, found[subject.label])
    if len(errors) == len(subjects):
        raise errors[0]
    if len({tuple(content["items"]) for content in found.values() if "items" in content}) > 1:
        logger.warning("the encoders were measured on different items, since each skipped others; compare with care")
    return found


def _evaluate(task: Task, items: Sequence[Item], subject: Subject, book: Journal, progress: bool) -> dict[str, Any]:
    """One subject."""
    encoder = subject.load()
    state = task.begin(encoder, subject)
    key = digest(task.name, _resolved(task), subject.label, subject.tag, encoder_key(encoder), task.state_key(state))
    rows: dict[str, Row] = {}
    skipped: list[tuple[str, str]] = []
    for number, item in enumerate(with_progress(items, f"{task.name} {subject.label}", progress)):
        # Stamps read files, which only a journal is worth.
        name = item.name if book.path is None else f"{number}|{item.name}|{task.stamp(item)}"
        row = book.get(key, name)
        if row is None:
            try:
                row = _measure(task, encoder, item, number, state)
            except (DataError, InputError) as error:
                # Not kept: the next run may find the file mended.
                skipped.append((item.name, str(error).removeprefix(f"{item.name}: ")))
                logger.warning("%s skipped: %s", *skipped[-1])
                continue
            book.add(key, name, row)
        rows[item.name] = row
    if not rows:
        raise DataError(
            f"{subject.label}: none of {len(items)} items could be measured; the first, {skipped[0][0]}: "
            f"{skipped[0][1]}"
        )
    return {
        **describe_encoder(encoder),
        "result": to_json(task.summarize(list(rows.values()), state)),
        "items": {name: {k: v for k, v in row.items() if not k.startswith("_")} for name, row in rows.items()},
        "skipped": [list(entry) for entry in skipped],
    }


def describe_encoder(encoder: SharpEncoder) -> dict[str, Any]:
    """What a result says about the encoder that it was measured on."""
    dtype = encoder.backbone.autocast_dtype
    return {
        "backbone": encoder.backbone.name,
        "upsampler": encoder.recipe.get("upsampler", type(encoder.upsampler).__name__),
        "factor": encoder.factor,
        "key": content_key(encoder),
        "backbone_autocast": None if dtype is None else str(dtype).removeprefix("torch."),
    }


def to_json(value: Any) -> Any:
    """Estimates become {"value", "low", "high"}, at any depth."""
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def from_json(value: Any) -> Any:
    """The inverse of :func:`to_json` for one number: an Estimate, or the plain value."""
    return Estimate(**value) if isinstance(value, dict) and set(value) == set(Estimate._fields) else value


def _measure(task: Task, encoder: SharpEncoder, item: Item, number: int, state: Any) -> Row:
    with torch.inference_mode():
        row = task.measure(encoder, item, number, state)
    if not _is_finite(row):
        raise InputError("what was measured is NaN or infinite; are the features?")
    return row


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _resolved(task: Task) -> dict[str, Any]:
    """All settings, paths independent of the current folder."""
    paths = {f.name: getattr(task, f.name) for f in setting_fields(task)}
    return settings_of(task) | {name: str(path.resolve()) for name, path in paths.items() if isinstance(path, Path)}
