"""Progress bars."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Sequence[T], label: str, wanted: bool = True) -> Iterator[T]:
    """The items, with a bar on stderr if ``wanted``, where someone looks at it and tqdm, of the extra ``train``, is."""
    if wanted:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            yield from tqdm(items, desc=label, file=sys.stderr, disable=None, leave=False)
            return
    yield from items
