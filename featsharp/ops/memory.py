"""Keeping freed memory in the process, for the programs that featsharp starts (never on import)."""

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make the C allocator reuse large blocks instead of returning them to the system at once.

    Every large tensor otherwise costs fresh pages from the kernel, which on virtual machines takes longer than the
    arithmetic on them (local attention of a 32 x 32 x 768 map ran ten times faster on ours). Costs: the process keeps
    its peak memory until it ends.

    Returns:
        Whether the allocator took the settings; False outside of Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    taken = bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_TOP_PAD, 2**26))
    logger.debug("allocator keeps freed memory: %s", taken)
    return taken
