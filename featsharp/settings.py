"""Settings of tasks: dataclass fields that are also flags on the command line."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def setting(default: Any, help: str, **argparse: Any) -> Any:
    """Make a dataclass field that becomes a flag.

    Args:
        default: Of the field.
        help: Its line in the help of the command.
        argparse: Further arguments of ``add_argument``: type, nargs, choices, required, metavar. Types beyond those of
            argparse are "count" (a whole number of at least 1) and "size" (HxW).
    """
    return dataclasses.field(default=default, metadata={"help": help, **argparse})


def setting_fields(task: Any) -> "list[dataclasses.Field[Any]]":
    """List the fields of a task, or of its class, that were made by :func:`setting`."""
    return [field for field in dataclasses.fields(task) if "help" in field.metadata]


def settings_of(task: Any) -> dict[str, Any]:
    """Collect the settings of a task as JSON values, by name."""
    values = {field.name: getattr(task, field.name) for field in setting_fields(task)}
    return {name: str(value) if isinstance(value, Path) else plain_value(value) for name, value in values.items()}


def plain_value(value: Any) -> Any:
    """Convert NumPy's numbers and arrays, tensors, tuples, ranges and mappings to values of JSON; keep others."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | list | range):
        return [plain_value(one) for one in value]
    if isinstance(value, Mapping):
        return {key: plain_value(one) for key, one in value.items()}
    return value
