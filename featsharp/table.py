"""Tables as lines of text."""

from collections.abc import Sequence


def align(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """A head and rows of text in columns, two spaces apart.

    Args:
        columns: The head.
        rows: As many cells each.
        numbers: Whether all columns but the first are flush right; otherwise all are flush left.
    """
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    pads = [str.ljust, *[str.rjust if numbers else str.ljust] * (len(columns) - 1)]
    return [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in lines
    ]
