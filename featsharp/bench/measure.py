"""Measurement: medians of interleaved runs, and the memory that a call takes."""

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

from featsharp.errors import FeatSharpError, out_of_memory
from featsharp.memory import PeakMeter, process_bytes, return_freed_memory, trim_memory
from featsharp.terminal import with_progress

CASE_SECONDS = 6.0
# Largest distance of the quartiles, as a fraction of the median, on a machine that runs nothing else.
NOISY = 0.2

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of several runs."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    runs: int


def time_interleaved(
    cases: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeat: int = 15,
    least: int = 2,
    seconds: float = CASE_SECONDS,
    progress: bool = False,
    wait: Callable[[torch.device], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time cases in turn, so that disturbances of the machine affect all of them.

    Args:
        cases: Functions by name; each is run twice before, uncounted.
        device: Of the computations: an accelerator is waited for.
        repeat: Most runs of a case; slow ones get fewer.
        least: Fewest runs of a case, two or more, regardless of ``repeat`` and ``seconds``.
        seconds: Time that the runs of one case should not exceed.
        progress: Whether to show bars on stderr.
        wait: Called around every run to wait for the device; None: PyTorch's synchronisation.
        clock: Returns seconds.
    """

    def milliseconds(function: Callable[[], object]) -> float:
        synchronize(device)
        start = clock()
        function()
        synchronize(device)
        return 1000 * (clock() - start)

    synchronize = wait or _wait
    runs: dict[str, int] = {}
    for name in with_progress(list(cases), "warming up", progress):
        cases[name]()  # compiles and loads
        runs[name] = max(least, min(repeat, int(1000 * seconds / milliseconds(cases[name]))))
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in with_progress(range(max(runs.values(), default=0)), "timing", progress):
        for name, function in cases.items():
            if turn < runs[name]:
                times[name].append(milliseconds(function))
    return {name: summarize(values) for name, values in times.items()}


def find_failure(function: Callable[[], object], *, foreign: bool = False) -> str | None:
    """Run a call and return why it cannot be measured: its FeatSharpError, or "out of memory"; None where it works.

    Args:
        function: The call.
        foreign: Whether it runs code of the user: then any exception is a reason, and no defect of ours.
    """
    try:
        function()
    except FeatSharpError as error:
        return str(error)
    except Exception as error:
        if out_of_memory(error):
            return "out of memory"
        if foreign:
            return f"{type(error).__name__}: {error}"
        raise
    return None


def noise(shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw seeded random numbers instead of whitened images [B, 3, H, W]; times do not depend on them."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def summarize(milliseconds: Sequence[float]) -> Timing:
    """Compute median and quartiles."""
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(median, low, high, len(milliseconds))


def describe_noise(timings: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Format a warning about cases whose quartiles are far apart; empty without any."""
    noisy = [name for name, time in timings.items() if time["high"] - time["low"] > NOISY * time["median"]]
    if not noisy:
        return []
    return [f"noisy machine: the quartiles spread by more than {NOISY:.0%} of the median: {', '.join(noisy)}"]


def measure_memory(function: Callable[[], object], device: torch.device) -> int:
    """Measure the bytes that a call takes at its peak beside the memory in use before, its result included.

    On a CUDA device the memory of PyTorch's allocator; otherwise on Linux the resident set of the process; elsewhere
    the tensors that are created.
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
            function()  # compiles and loads
            trim_memory()
            before = process_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
            function()
            return max(0, process_bytes("VmHWM") - before)
    except OSError:
        with PeakMeter() as meter:
            function()
        return meter.peak


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe hardware, threads and versions, which measurements depend on."""
    from featsharp import __version__

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "featsharp": __version__,
    }


def _wait(device: torch.device) -> None:
    """Wait until an accelerator is idle."""
    if device.type == "mps":  # there is one, and its function takes none
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def device_name(device: torch.device) -> str:
    """Return the model name of an accelerator where PyTorch has it; otherwise its type, such as "cpu" or "mps"."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(name(device)) if name else device.type


def processor() -> str:
    """Return the model name of the CPU where the system has it; otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
