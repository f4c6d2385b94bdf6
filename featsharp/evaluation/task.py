"""The contract of evaluation tasks, and the loop that runs one over any number of encoders.

A task is one file: a dataclass whose fields are its settings (and the flags of the command), derived from
:class:`Task`. It lists items (an image, a pair of images), measures one encoder on one item, and pools the rows. All
else is done here, the same for every task: progress, bad items, resuming, results.

Resuming: every measured row is appended to a journal at once. A row is found again by the task's settings, the content
of the encoder and the item's name, so that the same command goes on after whatever stopped it.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from featsharp.errors import DataError, FeatSharpError, InputError
from featsharp.evaluation.samples import Estimate
from featsharp.model import SharpEncoder
from featsharp.progress import with_progress
from featsharp.settings import settings_of

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
        tag: Changes when the encoder does: for a checkpoint the digest of its file.
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
    """

    name: ClassVar[str]
    title: ClassVar[str]

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


class Journal:
    """Rows on disk, one JSON line each. Without a path nothing is kept.

    Args:
        path: Made when the first row comes; a last line that was cut off is dropped.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows: dict[tuple[str, str], Any] = {}
        if path is None or not path.exists():
            return
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                key, name, content = json.loads(line)
            except ValueError:
                continue
            if line.endswith(b"\n"):
                self._rows[key, name] = content
                kept.append(line)
        path.write_bytes(b"".join(kept))

    def get(self, key: str, name: str) -> Any:
        """The row of an item, None where there is none."""
        return self._rows.get((key, name))

    def add(self, key: str, name: str, content: Any) -> None:
        """Keep a row."""
        self._rows[key, name] = content
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps([key, name, content]).encode() + b"\n")
        except OSError as error:
            raise FeatSharpError(
                f"cannot write {self.path}: {error.strerror or error}; free some space or choose another --json"
            ) from error

    def remove(self) -> None:
        """Delete the file: its content is in the result."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def evaluate(
    task: Task, subjects: Sequence[Subject], *, journal: Path | None = None, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Run a task on every subject.

    Args:
        task: With its settings.
        subjects: Loaded one after the other.
        journal: Where to keep rows until the end, for resuming; None: nowhere.
        progress: Whether to show a bar on stderr, where the package tqdm is installed.

    Returns:
        By label: "result" (the task's summary), "items" (rows by name), "skipped" (name and reason), and what the
        encoder is.

    Raises:
        DataError: When nothing could be measured, with the first reason.
    """
    items = list(task.items())
    if not items:
        raise DataError(f"task {task.name!r} found nothing to measure on in its data; look at its settings")
    book = Journal(journal)
    found = {}
    for subject in subjects:
        encoder = subject.load()
        state = task.begin(encoder, subject)
        key = _key(task, encoder, subject)
        rows: dict[str, Row] = {}
        skipped: list[tuple[str, str]] = []
        for number, item in enumerate(with_progress(items, f"{task.name} {subject.label}", progress)):
            content = book.get(key, item.name)
            if content is None:
                content = _measure(task, encoder, item, number, state)
                book.add(key, item.name, content)
            if "row" in content:
                rows[item.name] = content["row"]
            else:
                skipped.append((item.name, content["skipped"]))
        if not rows:
            raise DataError(
                f"{subject.label}: none of {len(items)} items could be measured; the first, {skipped[0][0]}: "
                f"{skipped[0][1]}"
            )
        found[subject.label] = {
            **describe_encoder(encoder),
            "result": to_json(task.summarize(list(rows.values()), state)),
            "items": {name: {k: v for k, v in row.items() if not k.startswith("_")} for name, row in rows.items()},
            "skipped": [list(entry) for entry in skipped],
        }
        del encoder, state
    book.remove()
    return found


def describe_encoder(encoder: SharpEncoder) -> dict[str, Any]:
    """What a result says about the encoder that it was measured on."""
    dtype = encoder.backbone.autocast_dtype
    return {
        "backbone": encoder.backbone.name,
        "upsampler": encoder.recipe.get("upsampler", type(encoder.upsampler).__name__),
        "factor": encoder.factor,
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


def _measure(task: Task, encoder: SharpEncoder, item: Item, number: int, state: Any) -> dict[str, Any]:
    try:
        with torch.inference_mode():
            return {"row": task.measure(encoder, item, number, state)}
    except (DataError, InputError) as error:
        reason = str(error).removeprefix(f"{item.name}: ")
        logger.warning("%s skipped: %s", item.name, reason)
        return {"skipped": reason}


def _key(task: Task, encoder: SharpEncoder, subject: Subject) -> str:
    """Tells rows of other settings, encoders and weights apart."""
    parts = [task.name, settings_of(task), describe_encoder(encoder), subject.tag, encoder.backbone.weights_hash()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
