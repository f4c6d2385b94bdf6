"""Entries of the ``*_data_dir`` settings: paths, addresses and commands, with weights and ranges in braces."""

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from featsharp.errors import ConfigError, MissingDependencyError
from featsharp.urls import redact_setting

PIPE = "pipe:"
MAX_SHARDS = 1_000_000  # that braces may stand for


class WeightedPath(NamedTuple):
    """Entry of a ``*_data_dir`` setting."""

    path: Path | str  # the latter names shards that are streamed
    weight: float = 1.0


def parse_data_dir(value: object) -> list[WeightedPath]:
    """Parse a ``*_data_dir`` setting: a path, or a list whose entries are a path or ``[path, weight]``.

    A path is that of a folder or a tar file, or ``http(s)://...`` or ``pipe:COMMAND`` for streams. ``~`` and
    environment variables are expanded, except in commands, where the shell does it. The share of samples from a source
    is proportional to its weight (default 1), whatever its size. Raises ConfigError for anything else.
    """
    if isinstance(value, (str, os.PathLike)):
        return [_weighted_path(value, 1.0)]
    if not isinstance(value, Sequence) or not value:
        expected = "expected a path or a list of paths or [path, weight] pairs"
        raise ConfigError(f"no data given: {expected}, got {_given(value)}")
    entries = []
    for entry in value:
        if isinstance(entry, (str, os.PathLike)):
            entries.append(_weighted_path(entry, 1.0))
        elif isinstance(entry, Sequence) and len(entry) == 2:
            entries.append(_weighted_path(entry[0], entry[1]))
        else:
            raise ConfigError(
                f"data entry {_given(entry)} is neither a path nor [path, weight]; write [[path, weight], ...]"
            )
    return entries


def is_stream(path: object) -> bool:
    """Return whether an entry of a ``*_data_dir`` setting names shards that are streamed."""
    return isinstance(path, str) and (path.startswith(PIPE) or bool(re.match("https?://", path, re.IGNORECASE)))


def expand_braces(path: str) -> list[str]:
    """List the shards that a path such as ``{000..099}.tar`` stands for.

    Raises:
        ConfigError: For braces that do not pair.
        MissingDependencyError: For braces without the package braceexpand.
    """
    if "{" not in path:
        return [path]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise MissingDependencyError('braces in shard names need: pip install "featsharp[train]"') from error
    # The package would make all of a range first.
    ends = [int(end[:20]) for end in re.findall(r"(?<=\.\.)\d+|\d+(?=\.\.)", path)]
    try:
        # Making a million names one by one takes minutes where there are many braces.
        groups = re.findall(r"\{([^{}]*)\}", path) if not re.search(r"\{[^{}]*\{", path) else []
        few = max(ends, default=0) < 10 * MAX_SHARDS and math.prod(map(_count_texts, groups)) <= MAX_SHARDS
        shards = list(itertools.islice(braceexpand(path), MAX_SHARDS + 1)) if few else []
    except ValueError as error:
        reason = str(error).partition(":")[0]  # the entry follows
        raise ConfigError(f"data entry {redact_setting(path)!r}: {reason}; write ranges as {{000..099}}") from None
    if not 0 < len(shards) <= MAX_SHARDS:
        raise ConfigError(f"data entry {redact_setting(path)[:100]!r} stands for more than {MAX_SHARDS:,} files")
    return shards


def _count_texts(inside: str) -> int:
    """Count the texts that a pair of braces stands for, by what is between them."""
    if found := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", inside):
        first, last, step = int(found[1]), int(found[2]), int(found[3] or 1)
        return abs(last - first) // max(1, step) + 1
    return inside.count(",") + 1


def number_equal(names: Iterable[str]) -> list[str]:
    """Number the names that are equal: shards whose addresses differ in their secrets alone."""
    names = list(names)
    total, number = Counter(names), Counter[str]()
    numbered = []
    for name in names:
        number[name] += 1
        numbered.append(f"{name} (no. {number[name]})" if total[name] > 1 else name)
    return numbered


def _given(value: object) -> str:
    """Format a setting as it was given, without secrets."""
    if isinstance(value, str):
        return repr(redact_setting(value))
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_given, value))}]"
    return repr(value) if isinstance(value, (int, float, type(None))) else f"a {type(value).__name__}"


def _weighted_path(path: object, weight: object) -> WeightedPath:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(f"data entry with path {path!r}: a folder, a .tar file, a URL or pipe:COMMAND is needed")
    if not is_weight(weight):
        raise ConfigError(
            f"data entry {redact_setting(str(path))!r} has weight {weight!r}; a positive number is needed"
        )
    number = float(weight)  # type: ignore[arg-type]
    text = os.fspath(path)
    if text.startswith(PIPE):
        return WeightedPath(text, number)
    text = os.path.expandvars(text)
    if not is_stream(text) and (scheme := re.match(r"([A-Za-z][\w+.-]+)://", text)):
        address = redact_setting(text)
        advice = {
            "s3": f"pipe:aws s3 cp {address} -",
            "gs": f"pipe:gsutil cat {address}",
            "file": "the path alone",
        }.get(scheme[1].lower(), "pipe:COMMAND with a command that writes it")
        raise ConfigError(f"data entry {address!r}: {scheme[1]}:// is not read as it is; write {advice}")
    return WeightedPath(text if is_stream(text) else Path(text).expanduser(), number)


def is_weight(value: object) -> bool:
    """Return whether a value is a positive, finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
