"""Counts of images, files and archive members that were skipped, as (name, reason) entries.

A reason starts with its kind; details follow in parentheses or after a colon or semicolon. One that starts with a
number stands for so many.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

# Kinds that are no damage: files that are no images by name, and images that a filter leaves out.
NO_IMAGE = "no image by name"
TOO_SMALL, UNIFORM, REJECTED = "too small", "uniform colour", "rejected by data.filter"
EXPECTED_KINDS = (NO_IMAGE, TOO_SMALL, UNIFORM, REJECTED)

MAX_EXAMPLES = 20  # names of each kind that a log of skipped images keeps
_SHOWN = 3  # of these in a summary


def count_kinds(skipped: Iterable[tuple[str, str]]) -> Counter[str]:
    """Count (name, reason) entries by kind, the most frequent first."""
    kinds: Counter[str] = Counter()
    for _, reason in skipped:
        kind = re.split(r" \(|[:;] ", reason, maxsplit=1)[0]
        number, mark, rest = kind.partition(" ")
        if mark and number.isdecimal():
            kinds[rest] += int(number)
        else:
            kinds[kind] += 1
    return Counter(dict(kinds.most_common()))


def describe_kinds(skipped: Iterable[tuple[str, str]]) -> str:
    """Describe kinds, as in "2 cannot be decoded, 1 uniform colour"; empty without entries."""
    return ", ".join(f"{count} {kind}" for kind, count in count_kinds(skipped).items())


def count_of_others(count: int) -> str:
    """Format the reason for ``count`` files or members that are no images by name."""
    return f"{count} {NO_IMAGE}"


class SkipLog:
    """Number of entries of each kind (see :func:`count_kinds`), and the names of the first few of each kind.

    An image that comes again is counted again, so that counts of several processes and of resumed runs add up, and the
    log stays small for any amount of data.

    Attributes:
        kinds: Number of each kind.
        examples: Different names of each kind, at most :data:`MAX_EXAMPLES`.
    """

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, skipped: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Count entries and return those to be logged: damage that became an example.

        Images left out by a filter are intended, and may be most of the data.
        """
        new = []
        for name, reason in skipped:
            ((kind, count),) = count_kinds([(name, reason)]).items()
            self.kinds[kind] += count
            if self._remember(kind, name) and kind not in EXPECTED_KINDS:
                full = len(self.examples[kind]) == MAX_EXAMPLES
                new.append((name, f"{reason} (more of this kind are only counted)" if full else reason))
        return new

    def add_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the counts of another log's :meth:`state`."""
        self.kinds.update(state["kinds"])
        for kind, names in state["examples"].items():
            for name in names:
                self._remember(kind, name)

    def state(self) -> dict[str, dict[str, Any]]:
        """Return plain values for a checkpoint or another process, independent of the order of the entries."""
        examples = {kind: sorted(names) for kind, names in sorted(self.examples.items())}
        return {"kinds": dict(sorted(self.kinds.items())), "examples": examples}

    @property
    def count(self) -> int:
        """Number of times that an image or a shard was skipped, without files that are no images by name."""
        return self.kinds.total() - self.kinds[NO_IMAGE]

    def summary(self) -> str:
        """Describe all, as in "images skipped 2 times: 1 cannot be decoded (a.png), 1 uniform colour (b.png)"."""
        kinds = [f"{count} {kind} ({self._some(kind)})" for kind, count in self.kinds.most_common() if kind != NO_IMAGE]
        parts = [f"images skipped {self.count} times: {', '.join(kinds)}"] if kinds else []
        if others := self.kinds[NO_IMAGE]:
            parts.append(f"{others} other files passed over ({NO_IMAGE})")
        return "; ".join(parts)

    def _some(self, kind: str) -> str:
        names = self.examples[kind]
        return ", ".join([*names[:_SHOWN], "..."] if len(names) > _SHOWN else names)

    def _remember(self, kind: str, name: str) -> bool:
        """Keep a name if it is new and there is room; return whether it was kept."""
        names = self.examples.setdefault(kind, [])
        if name in names or len(names) >= MAX_EXAMPLES:
            return False
        names.append(name)
        return True
