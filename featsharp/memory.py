"""Memory: amounts as text, the peak of a computation (counted or predicted), and the C allocator.

The settings of the allocator need Linux with glibc and change nothing elsewhere. Nothing here happens on import.
"""

import ctypes
import logging
import math
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from featsharp.errors import ConfigError

logger = logging.getLogger(__name__)

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

# Operator -> function of its arguments to the bytes that it takes beside its results. Only for opaque operators; the
# temporary memory inside PyTorch's operators is not counted.
_SCRATCH: dict[Any, Callable[..., int]] = {}


def parse_memory(amount: int | str) -> int:
    """Parse an amount of memory, bytes or text such as "2GiB", "1.5 GB" or "800MiB", to bytes.

    Raises:
        ConfigError: For anything else, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(amount))
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if isinstance(amount, bool) or not match or (match[2] or "B").lower() not in units:
        raise ConfigError(f"cannot read {amount!r} as an amount of memory; write bytes or for example '2GiB', '800MB'")
    size = float(match[1]) * units[(match[2] or "B").lower()]
    if not 1 <= size < math.inf:
        raise ConfigError(f"an amount of memory must be at least one byte, and finite; got {str(amount)[:40]!r}")
    return int(size)


def format_memory(size: int) -> str:
    """Format bytes as text that :func:`parse_memory` reads, rounded up to whole MiB."""
    return f"{-(-size // 2**20)}MiB"


def register_scratch(op: Any, size: Callable[..., int]) -> None:
    """Register the function from arguments of the operator ``op`` to the bytes of temporary memory that it takes."""
    _SCRATCH[op] = size


class PeakMeter(TorchDispatchMode):
    """Counter of the bytes of all tensors that were created while it was active and are still alive.

    Args:
        fake: Whether to count fake tensors instead of real ones; a prediction has both.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive at a time.
    """

    def __init__(self, *, fake: bool = False) -> None:
        super().__init__()
        self._fake = fake
        self.live = self.peak = 0
        # Bytes of every live storage, 0 for those that existed before.
        self._sizes: dict[int, int] = {}
        self._finalizers: list[weakref.finalize[..., Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in inputs:
            self._track(x, new=False)
        out = func(*args, **kwargs)
        scratch = 0
        if func in _SCRATCH and any(isinstance(x, FakeTensor) for x in inputs) == self._fake:
            scratch = _SCRATCH[func](*args, **kwargs)
        # A view of a weight is not new, even where another mode gave it a separate storage.
        new = not (func.is_view and self._sizes[_id(inputs[0])] == 0)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._track(x, new)
        self.peak = max(self.peak, self.live + scratch)
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # Storages that existed before would keep the meter alive; results count as long as they live.
        for finalizer in self._finalizers:
            alive = finalizer.peek()
            if alive is not None and self._sizes[alive[2][0]] == 0:
                finalizer.detach()
        self._finalizers.clear()

    def _track(self, x: Tensor, new: bool) -> None:
        storage, id_ = x.untyped_storage(), _id(x)
        if id_ not in self._sizes:
            counts = new and isinstance(x, FakeTensor) == self._fake
            self._sizes[id_] = storage.nbytes() if counts else 0
            self.live += self._sizes[id_]
            self._finalizers.append(weakref.finalize(storage, self._forget, id_))

    def _forget(self, id_: int) -> None:
        self.live -= self._sizes.pop(id_)


def predict(function: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    """Predict the bytes that ``function(*arguments)`` takes beside its arguments, its result included.

    Args:
        function: Run on fake tensors: shapes must not depend on values, and tensors that it keeps must not change (a
            module in eval mode).
        arguments: Tensors, also those in containers, are replaced by fake ones of the same shape.

    Returns:
        The bytes, and the result with fake tensors.
    """
    cached = torch.is_autocast_cache_enabled()
    # The cache would keep fake casts of real weights.
    torch.set_autocast_cache_enabled(False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = tree_map_only(Tensor, mode.from_tensor, arguments)
            with PeakMeter(fake=True) as meter:
                result = function(*fake)
    finally:
        torch.set_autocast_cache_enabled(cached)
    return meter.peak, result


def _id(x: Tensor) -> int:
    return x.untyped_storage()._cdata


# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4

# The allocator's settings belong to the process: the last context that ends restores them.
_lock = threading.Lock()
_keeping = False
_returning = 0


def keep_freed_memory() -> bool:
    """Make the C allocator reuse large blocks instead of returning them to the system at once.

    Every large tensor otherwise costs fresh pages from the kernel, which on virtual machines takes longer than the
    arithmetic on them (local attention of a 32 x 32 x 768 map ran ten times faster on ours). The process then keeps its
    peak memory until it ends.

    Returns:
        Whether the allocator accepted the settings; False outside of Linux with glibc.
    """
    global _keeping
    _keeping = _set_allocator({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26})
    logger.debug("allocator keeps freed memory: %s", _keeping)
    return _keeping


@contextmanager
def return_freed_memory() -> Iterator[bool]:
    """Return free memory, and within this context freed tensors of 1 MiB and more, to the system at once.

    By default the allocator keeps blocks of up to 32 MiB, whose fragmentation takes half as much memory again as the
    tensors need. This takes about a sixth more time.

    Yields:
        Whether the allocator accepted the settings.
    """
    global _returning
    with _lock:
        _returning += 1
        accepted = _set_allocator(
            {_M_MMAP_MAX: 2**16, _M_MMAP_THRESHOLD: 2**20, _M_TRIM_THRESHOLD: 2**20, _M_TOP_PAD: 2**17}
        )
        trim_memory()
    try:
        yield accepted
    finally:
        with _lock:
            _returning -= 1
            if _returning == 0 and _keeping:
                keep_freed_memory()
            elif _returning == 0:
                # The values that the allocator's dynamic adjustment, which cannot be turned on again, converges to.
                _set_allocator({_M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: 2**26})


def process_bytes(field: str) -> int:
    """Read an amount that Linux counts for this process, such as "VmHWM", the peak of its resident set, in bytes.

    Raises:
        OSError: On other systems.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


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
