"""Results as lines of text."""

from collections.abc import Mapping, Sequence
from typing import Any


def align(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A head and rows of text in columns, the first one flush left, the others right."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]


def describe_skipped(skipped: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each point of a curve that could not be measured."""
    return [f"not measured: {entry['curve']} {entry['factor']:g}x: {entry['reason']}" for entry in skipped]
