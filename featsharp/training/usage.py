"""Cost of a run: time per step, the fraction of it spent waiting for data, and memory."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from statistics import median
from typing import TypeVar

import torch

from featsharp.memory import process_bytes

T = TypeVar("T")

GIB = 2**30


class StepClock:
    """Clock of the time that every step waits for its batches, and of the step itself.

    Time between a step and the request for the next batch (logs, validation, checkpoints) is not counted. Nor
    is the wait for the first batch, in which workers start; :attr:`startup` has it.

    Args:
        now: Returns the time in seconds.

    Example:
        >>> clock = StepClock()
        >>> for number in clock.batches(range(3)):
        ...     clock.step_done()
        >>> len(clock.waits) == len(clock.works) == 3
        True
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.startup = 0.0
        self.waits: list[float] = []
        self.works: list[float] = []
        self._reported = 0
        self._arrival = 0.0
        self._waiting = 0.0

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """Iterate over batches, and measure the wait for each."""
        iterator = iter(batches)
        while True:
            start = self._now()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            first, self._arrival = not self._arrival, self._now()
            if first:
                self.startup = self._arrival - start
            else:
                self._waiting += self._arrival - start
            yield batch

    def step_done(self) -> None:
        """Record the end of the step on the batches since the last call; on a GPU, when the device has finished."""
        self.works.append(self._now() - self._arrival)
        self.waits.append(self._waiting)
        self._waiting = 0.0

    @property
    def seconds_per_step(self) -> float:
        """Median time per step, waiting included; NaN before the first step."""
        return median(map(sum, zip(self.waits, self.works, strict=True))) if self.works else float("nan")

    def time_for(self, steps: int) -> str:
        """Estimate the time of so many steps at the speed so far, such as "1:02:03" (h:mm:ss)."""
        return str(timedelta(seconds=round(steps * self.seconds_per_step)))

    @property
    def wait_share(self) -> float:
        """Fraction of all steps' time spent waiting for data, in [0, 1]."""
        return sum(self.waits) / max(sum(self.waits) + sum(self.works), 1e-9)

    def scalars(self, images_per_step: int) -> dict[str, float]:
        """Average over the steps since the last call, for the log."""
        waits, works = self.waits[self._reported :], self.works[self._reported :]
        self._reported = len(self.works)
        steps, wait = max(len(works), 1), sum(waits)
        seconds = max(wait + sum(works), 1e-9)
        return {
            "speed/seconds_per_step": seconds / steps,
            "speed/images_per_second": images_per_step * steps / seconds,
            "data/wait_seconds": wait / steps,
            "data/wait_share": wait / seconds,
        }

    def summary(self, wait_share: float | None = None) -> str:
        """Format "200 steps of 2.61 s (median); 0.8% of the time waiting for data, first batch after 1.2 s".

        Args:
            wait_share: Used instead of this process's.
        """
        share = self.wait_share if wait_share is None else wait_share
        return (
            f"{len(self.works)} steps of {self.seconds_per_step:.2f} s (median); {share:.1%} of the time "
            f"waiting for data, first batch after {self.startup:.1f} s"
        )


def peak_memory(device: torch.device) -> dict[str, float]:
    """Measure the peak memory of this process since its start in GiB, by the names of the log.

    The resident set, where the system counts it, and the memory of tensors on a CUDA device.
    """
    peaks = {}
    resident = _peak_resident_bytes()
    if resident is not None:
        peaks["memory/peak_resident_gib"] = resident / GIB
    if device.type == "cuda":
        peaks["memory/peak_cuda_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return peaks


def _peak_resident_bytes() -> int | None:
    with contextlib.suppress(OSError):  # on Linux a process inherits the getrusage peak of its parent
        return process_bytes("VmHWM")
    try:
        import resource
    except ImportError:  # Windows and some notebooks
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
