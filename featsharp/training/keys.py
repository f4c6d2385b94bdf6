"""Keys of a training configuration: dataclass fields with a range, which a resumed run may change or not."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from featsharp.errors import ConfigError


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


def walk_keys(config: Any, prefix: str = "") -> "Iterator[tuple[str, dataclasses.Field[Any], Any]]":
    """Yield the dotted name, field and value of every key of a configuration, those of its groups too."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk_keys(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


def check_ranges(config: Any) -> None:
    """Raise ConfigError for the first key of a configuration that is out of its range."""
    for name, field, value in walk_keys(config):
        limits = field.metadata
        if "least" in limits and not limits["least"] <= value < math.inf:
            raise ConfigError(f"{name} must be at least {limits['least']:g} and finite; got {value}")
        if "most" in limits and value > limits["most"]:
            raise ConfigError(f"{name} must be at most {limits['most']:g}; got {value}")
        if "least_low" in limits:
            low = limits["least_low"]
            if len(value) != 2 or not low <= value[0] <= value[1] < math.inf:
                raise ConfigError(f"{name} must be [low, high] with {low:g} <= low <= high, finite; got {value}")
