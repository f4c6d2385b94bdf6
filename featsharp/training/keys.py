"""Keys of a training configuration: dataclass fields with a range."""

import dataclasses
from typing import Any


def key(
    default: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    least_low: float | None = None,
    free: bool = False,
) -> Any:
    """Make a dataclass field.

    Args:
        default: Its value; lists are copied.
        least: Smallest value of a number, which must be finite.
        most: Largest value of a number.
        least_low: Smallest low end of a [low, high] range of finite numbers.
        free: Whether a resumed run may change it, as it has no effect on what a step computes.
    """
    limits = {"least": least, "most": most, "least_low": least_low}
    metadata = {name: value for name, value in limits.items() if value is not None} | {"free": free}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
