"""Names of files in a table."""

from collections.abc import Sequence
from pathlib import Path, PurePath

from featsharp.errors import ConfigError
from featsharp.names import split_label


def label_files(texts: Sequence[str]) -> dict[str, str]:
    """Files by label: the given one of ``LABEL=FILE``, otherwise the shortest end of the path that no other file has.

    Raises:
        ConfigError: For a file that is there twice, and for two of one label.
    """
    labels, paths = zip(*map(split_label, texts), strict=True) if texts else ((), ())
    parts = [Path(path).parts for path in paths]
    found: dict[str, str] = {}
    for index, (label, path) in enumerate(zip(labels, paths, strict=True)):
        others = [other for i, other in enumerate(parts) if i != index and not labels[i]]
        name = label or _shortest_end(parts[index], others)
        if name in found:
            raise ConfigError(f"two files are called {name!r}; name them apart: LABEL={path}")
        found[name] = path
    return found


def _shortest_end(parts: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    """The last parts of a path, as few as tell it from the others; all of them where none do."""
    count = next((n for n in range(1, len(parts)) if all(parts[-n:] != other[-n:] for other in others)), len(parts))
    return PurePath(*parts[-count:]).as_posix()
