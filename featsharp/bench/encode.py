"""Time and memory of whole encoders beside those of their backbone passes alone."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.bench.counting import counting
from featsharp.bench.measure import Timing, find_failure, measure_memory, noise, time_interleaved
from featsharp.bench.workloads import Workload, backbone_passes, is_foreign, list_workloads, skip
from featsharp.model import SharpEncoder
from featsharp.names import dtype_name
from featsharp.terminal import with_progress


@dataclass(frozen=True)
class Measurement:
    """Time and memory of a workload."""

    workload: Workload
    time: Timing
    backbone: Timing  # of its backbone passes alone
    passes: int  # images that the backbone encodes
    peak_bytes: int  # beside weights and input


def measure_workloads(
    workloads: Sequence[Workload], device: torch.device, *, repeat: int, least: int = 2, progress: bool = False
) -> tuple[list[Measurement], list[dict[str, Any]]]:
    """Time workloads in turn, each beside its backbone passes, then measure their memory.

    Args:
        workloads: On the device; equal passes of a backbone are timed once.
        device: Of the workloads.
        repeat: Most runs of a case; slow ones get fewer.
        least: Fewest runs of a case, two or more.
        progress: Whether to show bars on stderr.

    Returns:
        The measurements, and workloads that cannot be measured, as {"curve", "factor", "reason"}.
    """
    calls: dict[str, Callable[[], object]] = {}
    cases: list[tuple[Workload, str, str, int]] = []
    skipped = []
    for workload in with_progress(workloads, "first runs", progress):
        call = partial(_run, workload.module, [noise(workload.input_shape, device)], workload.autocast)
        batches = _first_run(workload, call)
        if isinstance(batches, str):
            skipped.append(skip(workload.curve, workload.factor, batches))
            continue
        alone = whole = f"backbone {workload.autocast} {[tuple(batch.shape) for batch in batches]}"
        calls.setdefault(alone, partial(_run, workload.backbone, batches, workload.autocast))
        if workload.module is not workload.backbone:
            whole = f"{workload.curve} {workload.factor} {workload.autocast}"
            calls[whole] = call
        cases.append((workload, whole, alone, sum(map(len, batches))))
    timings = time_interleaved(calls, device, repeat=repeat, least=least, progress=progress)
    # Afterwards, because measuring changes the allocator's settings.
    wholes = list(dict.fromkeys(whole for _, whole, _, _ in cases))
    peaks = {whole: measure_memory(calls[whole], device) for whole in with_progress(wholes, "memory", progress)}
    return [
        Measurement(workload, timings[whole], timings[alone], passes, peaks[whole])
        for workload, whole, alone, passes in cases
    ], skipped


def bench_encode(
    backbone: str | Backbone,
    upsamplers: Sequence[str],
    factors: Sequence[float],
    device: torch.device,
    *,
    repeat: int,
    normalizer: str = "phi-s",
    autocast: Sequence[torch.dtype | None] = (None,),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure encoders: upsampler, factor, dtype, and times of the whole encoding and of its backbone passes alone.

    Args:
        backbone: Name or object.
        upsamplers: Names, or ``module:function`` for a custom one; identity only at factor 1.
        factors: In each direction.
        device: To measure on.
        repeat: Most runs of a case.
        normalizer: Name; it is fitted to random vectors, which take the same time as others.
        autocast: Types to run under; None for none.

    Returns:
        The rows, and encoders that cannot be measured, as {"curve", "factor", "reason"}.
    """
    workloads, skipped = list_workloads(create_backbone(backbone), upsamplers, factors, device, normalizer=normalizer)
    workloads = [replace(workload, autocast=dtype) for dtype in autocast for workload in workloads]
    measurements, failed = measure_workloads(workloads, device, repeat=repeat)
    rows = [
        {
            "upsampler": one.workload.curve,
            "factor": one.workload.factor,
            "dtype": f"{dtype_name(one.workload.autocast)} autocast" if one.workload.autocast else "float32",
            "passes": one.passes,
            "encode": asdict(one.time),
            "backbone": asdict(one.backbone),
            "peak_bytes": one.peak_bytes,
        }
        for one in sorted(measurements, key=lambda one: one.workload.factor)
    ]
    return rows, [entry for entry in skipped if entry["curve"] != "identity"] + failed


def measure_cost(encoder: SharpEncoder, *, repeat: int = 2) -> dict[str, float]:
    """Measure what the features of one picture cost, the low-resolution pass at the backbone's native size.

    Returns:
        "passes", operations of the backbone in units of those of one low-resolution pass, and medians of interleaved
        runs: "seconds" of the whole encoding, and "seconds_of_pass" of such a pass alone. On a CPU they are seconds of
        all its cores, which do not depend on what else it does.
    """
    backbone, device = encoder.backbone, encoder.device
    calls = {
        "seconds": partial(_run, encoder, [noise((1, 3, *encoder.input_size), device)], None),
        "seconds_of_pass": partial(_run, backbone, [noise((1, 3, *backbone.input_size), device)], None),
    }
    operations: list[int] = []

    def encode(images: Tensor, *, patch_stride: int | None = None) -> BackboneOutput:
        with counting() as counter:  # of a real run: views compute their matrices from values
            out = encoder.encode(images, patch_stride=patch_stride)
        operations.append(counter.flops.get_total_flops())
        return out

    with torch.no_grad():
        encode(noise((1, 3, *backbone.input_size), device))
        encoder.upsampler(noise((1, 3, *encoder.input_size), device), encode, backbone.input_size)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    timings = time_interleaved(calls, device, repeat=repeat, clock=clock)
    passes = sum(operations[1:]) / operations[0]
    return {"passes": passes, **{name: timing.median / 1000 for name, timing in timings.items()}}


def _first_run(workload: Workload, call: Callable[[], object]) -> list[Tensor] | str:
    """Run once; return the batches that the backbone encodes, or the reason why the workload cannot run."""
    batches: list[Tensor] = []
    failure = find_failure(
        lambda: batches.extend(backbone_passes(workload.backbone, call)), foreign=is_foreign(workload.module)
    )
    return batches if failure is None else failure


def _run(module: nn.Module, batches: Sequence[Tensor], autocast: torch.dtype | None) -> None:
    """Run one batch after the other, without gradients."""
    with torch.no_grad(), torch.autocast(batches[0].device.type, autocast, enabled=autocast is not None):
        for batch in batches:
            module(batch)
