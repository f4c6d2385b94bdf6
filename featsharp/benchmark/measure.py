"""Measuring: medians of interleaved runs, and the memory that a call takes."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from featsharp.errors import FeatSharpError
from featsharp.ops.memory import return_freed_memory, trim_memory
from featsharp.ops.peak import PeakMeter
from featsharp.progress import with_progress

# Time that the runs of one case should not exceed, in seconds; two runs are the least.
CASE_SECONDS = 6.0

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of several runs."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    runs: int


def time_interleaved(
    cases: Mapping[str, Callable[[], object]], device: torch.device, *, repeat: int = 15, progress: bool = False
) -> dict[str, Timing]:
    """Time cases in turn, so that what disturbs the machine disturbs them all.

    Args:
        cases: Functions by name; each is run twice before, uncounted.
        device: Where they compute: a GPU is waited for.
        repeat: Most runs of a case; slow ones get fewer, at least two.
        progress: Whether to show a bar on stderr.
    """
    runs: dict[str, int] = {}
    for name, function in cases.items():
        function()  # what is compiled or loaded once
        runs[name] = max(2, min(repeat, int(1000 * CASE_SECONDS / _milliseconds(function, device))))
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in with_progress(range(max(runs.values(), default=0)), "timing", progress):
        for name, function in cases.items():
            if turn < runs[name]:
                times[name].append(_milliseconds(function, device))
    return {name: summarize(values) for name, values in times.items()}


def find_failure(function: Callable[[], object]) -> str | None:
    """Why a call cannot be measured: its FeatSharpError, or "out of memory"; None where it works."""
    try:
        function()
    except FeatSharpError as error:
        return str(error)
    except RuntimeError as error:
        # Of a CPU it has no class of its own.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return "out of memory"
        raise
    return None


def noise(shape: Sequence[int], device: torch.device) -> Tensor:
    """Seeded numbers in place of whitened images: what they show changes no time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def summarize(milliseconds: Sequence[float]) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(median, low, high, len(milliseconds))


def measure_memory(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call takes at its peak beside what is there already, its result included.

    Of a GPU what PyTorch's allocator hands out; on Linux what the process occupies, everything counted; elsewhere the
    tensors that are made.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        with return_freed_memory():
            function()  # what is loaded once
            trim_memory()
            before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
            function()
            return max(0, _status("VmHWM") - before)
    except OSError:
        with PeakMeter() as meter:
            function()
        return meter.peak


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: hardware, threads and versions."""
    from featsharp import __version__

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "featsharp": __version__,
    }


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def processor() -> str:
    """Model name of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
