"""Settings of tasks: dataclass fields that know their line in the help of the command."""

import dataclasses
from pathlib import Path
from typing import Any


def setting(default: Any, help: str, **argparse: Any) -> Any:
    """A field: its default, its line in the help, and what argparse is told beyond (type, nargs, choices, required).

    Types beyond argparse's: "count" (a whole number of at least 1) and "size" (HxW).
    """
    return dataclasses.field(default=default, metadata={"help": help, **argparse})


def setting_fields(task: Any) -> "list[dataclasses.Field[Any]]":
    """The fields of a task, or of its class, that were made by :func:`setting`."""
    return [field for field in dataclasses.fields(task) if "help" in field.metadata]


def settings_of(task: Any) -> dict[str, Any]:
    """All settings of a task as JSON values."""
    return {field.name: _plain(getattr(task, field.name)) for field in setting_fields(task)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
