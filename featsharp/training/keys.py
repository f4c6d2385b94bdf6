"""Keys of a training configuration: dataclass fields with a range, which a resumed run may change or not."""

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
    """Return a dataclass field.

    Args:
        default: Its value; lists are copied.
        least, most: The range of a number, which must be finite, too.
        least_low: The key is a [low, high] range of finite numbers, and low is at least this.
        free: A resumed run may change it: it is about how long, where or how closely watched, not what a step does.
    """
    limits = {"least": least, "most": most, "least_low": least_low}
    metadata = {name: value for name, value in limits.items() if value is not None} | {"free": free}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
