"""The runner of all evaluation tasks, and the contract of a task.

A task is one file: a dataclass whose fields are its settings (and the flags of the command), derived from
:class:`Task`. It defines the data (:meth:`Task.items`), the head or rule of an encoder (:meth:`Task.prepare`), the
score (:meth:`Task.measure` of an item, :meth:`Task.score` of them all) and the cache keys. The runner does progress,
bad items, resuming, the JSON and the table; intervals come from :mod:`featsharp.evaluation.estimates`.

Resuming: every measured row is appended to a journal at once. A row is used again where the task's settings, the
content of the encoder and of its head, and the item's name, number and key are the same, so that the same command
continues after an interruption.
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
from featsharp.device import usual_defaults
from featsharp.errors import DataError, FeatSharpError, InputError
from featsharp.evaluation.estimates import Estimate
from featsharp.evaluation.keys import digest, encoder_key
from featsharp.files import fit_name, write_file
from featsharp.model import SharpEncoder
from featsharp.names import dtype_name
from featsharp.settings import setting_fields, settings_of
from featsharp.terminal import with_progress

logger = logging.getLogger(__name__)

# Of one item: JSON values by name. Names that begin with "_" are for the score and left out of the result.
Row = dict[str, Any]
# Of one encoder over all items: estimates and plain numbers are printed, nested values only written.
Summary = dict[str, Any]


class Item(NamedTuple):
    """One item to measure on."""

    name: str  # unique within the data set, for messages and results
    data: Any  # for the task's measure(), unread: paths, sizes, points


@dataclass(frozen=True)
class Subject:
    """An encoder to be measured.

    Attributes:
        label: Its name in results.
        load: Builds it, in eval mode, on its device.
        tag: Distinguishes encoders that differ in code of the user only: a version of it, for example.
        load_downsampler: Loads the downsampler that a checkpoint was trained with; None where there is none.
        measure_cost: Measures what a picture costs, numbers by name; none where it is not known.
    """

    label: str
    load: Callable[[], SharpEncoder]
    tag: str = ""
    load_downsampler: Callable[[SharpEncoder], nn.Module | None] = lambda encoder: None
    measure_cost: Callable[[SharpEncoder], dict[str, float]] = lambda encoder: {}


class Run(NamedTuple):
    """Circumstances of an evaluation.

    Attributes:
        scratch: Folder for files that a resumed evaluation uses again, deleted after the result is written; None: none.
        progress: Whether to show bars on stderr.
    """

    scratch: Path | None = None
    progress: bool = False


class Task:
    """Base of all tasks: a dataclass with fields made by :func:`featsharp.settings.setting`.

    Attributes:
        name: Of the task, on the command line and in results.
    """

    name: ClassVar[str]

    def items(self) -> Iterable[Item]:
        """List all items to measure on, in a fixed order.

        Raises:
            DataError: When the data set cannot be read as a whole, or is empty.
        """
        raise NotImplementedError

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> Any:
        """Make the head (trained here; gradients are allowed) or the rule that measures this encoder.

        Args:
            encoder: In eval mode.
            subject: The encoder was loaded from it.
            run: Files of a head that is trained, and progress bars.

        Raises:
            FeatSharpError: When the encoder cannot be measured.
        """
        return None

    def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
        """Measure on one item, in inference mode.

        Args:
            encoder: In eval mode.
            item: One of :meth:`items`.
            head: Returned by :meth:`prepare`.

        Raises:
            DataError, InputError: For a bad item; it is skipped, reported and counted.
        """
        raise NotImplementedError

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        """Pool the rows of one encoder."""
        raise NotImplementedError

    def table(self, encoders: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Format the results of all encoders, see :func:`evaluate`, side by side; no lines where there is no table."""
        return []

    def item_key(self, item: Item) -> object:
        """Return JSON values that change with the content of an item, which is then measured again on resuming."""
        return ""

    def head_key(self, head: Any) -> object:
        """Return JSON values that change with the head, so that rows of another head are not used."""
        return ""


class Journal:
    """Rows on disk, one JSON line each, until the result is written; nothing without a path.

    The file is created with the first row; lines that were cut off are dropped. Two evaluations must not share one.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._rows: dict[tuple[str, str], Row] = {}
        if path is None or not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n") and self._read(line)]
        if len(complete) < len(lines):
            write_file(path, b"".join(complete))

    @property
    def scratch(self) -> Path | None:
        """Folder for other files of a resumed evaluation."""
        return None if self.path is None else self.path.with_name(fit_name(self.path.name, ".work"))

    def get(self, key: str, name: str) -> Row | None:
        """Return the row of an item, or None."""
        return self._rows.get((key, name))

    def add(self, key: str, name: str, row: Row) -> None:
        """Append a row; raises FeatSharpError when it cannot be written."""
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
        """Delete the journal, after its result is written."""
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


@usual_defaults()
def evaluate(
    task: Task,
    subjects: Sequence[Subject],
    *,
    journal: Journal | None = None,
    progress: bool = True,
    report: Callable[[str, dict[str, Any]], None] = lambda label, content: None,
) -> dict[str, dict[str, Any]]:
    """Run a task on every subject.

    Args:
        task: With its settings.
        subjects: Loaded one after the other. A failure of one does not end the others.
        journal: Of rows, for resuming; the caller removes it when the result is written. None: none.
        progress: Whether to show a bar on stderr, where the package tqdm is installed.
        report: Called with the label and the result of each subject as soon as it is measured.

    Returns:
        By label: "result" (the task's summary), "items" (rows by name), "skipped" (name and reason), and a description
        of the encoder; or "failed" with the reason.

    Raises:
        FeatSharpError: When no subject could be measured: the reason of the first.
    """
    items = list(task.items())
    if not items:
        raise DataError(f"task {task.name!r} has nothing to measure on in its data; look at its settings")
    journal = journal or Journal()
    results: dict[str, dict[str, Any]] = {}
    errors = []
    for subject in subjects:
        try:
            results[subject.label] = _evaluate(task, items, subject, journal, progress)
        except FeatSharpError as error:
            errors.append(error)
            results[subject.label] = {"failed": str(error)}
        if len(errors) < len(subjects):
            report(subject.label, results[subject.label])
    if len(errors) == len(subjects):
        raise errors[0]
    if len({tuple(content["items"]) for content in results.values() if "items" in content}) > 1:
        logger.warning("the encoders were measured on different items, since each skipped others; compare with care")
    return results


def evaluate_to_file(
    task: Task, subjects: Sequence[Subject], path: Path | None, about: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Run :func:`evaluate` and write the result as JSON; after an interruption the same call continues.

    Args:
        task: With its settings.
        subjects: See :func:`evaluate`.
        path: Of the result; the journal is beside it meanwhile. None: nothing is written.
        about: JSON values that the result begins with, beside the task's name.
        **options: See :func:`evaluate`.

    Returns:
        The content of the file: ``about``, and what :func:`evaluate` returns under "encoders".
    """
    journal = Journal(None if path is None else path.with_name(fit_name(path.name, ".rows")))
    content = {"task": task.name, **about, "encoders": evaluate(task, subjects, journal=journal, **options)}
    if path is not None:
        write_result(path, content)
        journal.remove()
    return content


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result as JSON."""
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def format_result(label: str, content: Mapping[str, Any]) -> list[str]:
    """Format one encoder of :func:`evaluate`: a header, then a line for each number with its interval."""
    if "failed" in content:
        return [f"{label}  failed: {content['failed']}"]
    lines = [f"{label}  ({len(content['items'])} measured, {len(content['skipped'])} skipped)"]
    for name, value in content["result"].items():
        value = from_json(value)
        if isinstance(value, Estimate):
            lines.append(f"  {name:22} {value.value:9.4f}   [{value.low:.4f}, {value.high:.4f}]")
        elif isinstance(value, int | float):
            lines.append(f"  {name:22} {value:9.4f}")
    return lines


def describe_encoder(encoder: SharpEncoder) -> dict[str, Any]:
    """Describe an encoder for a result."""
    dtype = encoder.backbone.autocast_dtype
    return {
        "backbone": encoder.backbone.name,
        "upsampler": encoder.recipe.get("upsampler") or type(encoder.upsampler).__name__,
        "factor": encoder.factor,
        "key": content_key(encoder),
        "backbone_autocast": dtype and dtype_name(dtype),
    }


def to_json(value: Any) -> Any:
    """Convert estimates to {"value", "low", "high"}, at any depth."""
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def from_json(value: Any) -> Any:
    """Invert :func:`to_json` for one number: an Estimate, or the plain value."""
    return Estimate(**value) if isinstance(value, dict) and set(value) == set(Estimate._fields) else value


def _evaluate(task: Task, items: Sequence[Item], subject: Subject, journal: Journal, progress: bool) -> dict[str, Any]:
    """Run a task on one subject."""
    encoder = subject.load()
    head = task.prepare(encoder, subject, Run(journal.scratch, progress))
    key = digest(task.name, _resolved(task), subject.label, subject.tag, encoder_key(encoder), task.head_key(head))
    rows: dict[str, Row] = {}
    skipped: list[tuple[str, str]] = []
    for number, item in enumerate(with_progress(items, f"{task.name} {subject.label}", progress)):
        # Item keys read files and are for the journal only.
        name = item.name if journal.path is None else f"{number}|{item.name}|{digest(task.item_key(item))}"
        row = journal.get(key, name)
        if row is None:
            try:
                row = _measure(task, encoder, item, head)
            except (DataError, InputError) as error:
                # Not in the journal: the file may be repaired before the next run.
                skipped.append((item.name, str(error).removeprefix(f"{item.name}: ")))
                logger.warning("%s skipped: %s", *skipped[-1])
                continue
            journal.add(key, name, row)
        rows[item.name] = row
    if not rows:
        raise DataError(
            f"{subject.label}: none of {len(items)} items could be measured; the first, {skipped[0][0]}: "
            f"{skipped[0][1]}"
        )
    return {
        **describe_encoder(encoder),
        "result": to_json(task.score(list(rows.values()), head)),
        "items": {name: {k: v for k, v in row.items() if not k.startswith("_")} for name, row in rows.items()},
        "skipped": [list(entry) for entry in skipped],
    }


def _measure(task: Task, encoder: SharpEncoder, item: Item, head: Any) -> Row:
    with torch.inference_mode():
        row = task.measure(encoder, item, head)
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
    """Collect all settings of a task, with absolute paths."""
    paths = {f.name: getattr(task, f.name) for f in setting_fields(task)}
    return settings_of(task) | {name: str(path.resolve()) for name, path in paths.items() if isinstance(path, Path)}
