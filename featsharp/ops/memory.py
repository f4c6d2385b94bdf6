"""What the C allocator does with freed memory: keep it for speed, or return it at once to stay small.

Both need Linux with glibc and change nothing elsewhere. Nothing here happens on import.
"""

import ctypes
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4

# The allocator's settings are those of the process: the last context that ends restores them.
_lock = threading.Lock()
_keeping = False
_returning = 0


def keep_freed_memory() -> bool:
    """Make the C allocator reuse large blocks instead of returning them to the system at once.

    Every large tensor otherwise costs fresh pages from the kernel, which on virtual machines takes longer than the
    arithmetic on them (local attention of a 32 x 32 x 768 map ran ten times faster on ours). Costs: the process keeps
    its peak memory until it ends.

    Returns:
        Whether the allocator took the settings; False outside of Linux with glibc.
    """
    global _keeping
    _keeping = _set_allocator({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26})
    logger.debug("allocator keeps freed memory: %s", _keeping)
    return _keeping


@contextmanager
def return_freed_memory() -> Iterator[bool]:
    """Within this context freed tensors of 1 MiB and more leave the process at once, and what was free before has left.

    By default the allocator keeps blocks of up to 32 MiB for later, in pieces that fit badly: half as much memory again
    as the tensors need. Costs: about a sixth more time.

    Yields:
        Whether the allocator took the settings.
    """
    global _returning
    with _lock:
        _returning += 1
        taken = _set_allocator(
            {_M_MMAP_MAX: 2**16, _M_MMAP_THRESHOLD: 2**20, _M_TRIM_THRESHOLD: 2**20, _M_TOP_PAD: 2**17}
        )
        trim_memory()
    try:
        yield taken
    finally:
        with _lock:
            _returning -= 1
            if _returning == 0 and _keeping:
                keep_freed_memory()
            elif _returning == 0:
                # Where the allocator's own adjustment ends up, which cannot be turned on again.
                _set_allocator({_M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: 2**26})


def trim_memory() -> None:
    """Return the free memory of the process to the system, where the allocator is glibc's."""
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _set_allocator(parameters: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return min(mallopt(parameter, value) for parameter, value in parameters.items()) == 1
