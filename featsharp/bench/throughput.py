"""Time per image and per token against the upsampling factor (FeatSharp, arXiv 2502.16025, figure 14), and memory.

The measured time is compared with a linear one: as if every token took as long as at the native size. The paper argues
that a larger image takes longer, because attention grows with the square of the tokens, and that tiles do not. Here it
is measured for the user's backbone and machine.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from featsharp.backbones import create_backbone
from featsharp.bench.counting import counting
from featsharp.bench.encode import Measurement, measure_workloads
from featsharp.bench.measure import describe_noise, noise
from featsharp.bench.workloads import DIRECT, CurvesTask, Workload, describe_skipped
from featsharp.errors import ConfigError
from featsharp.memory import format_memory
from featsharp.names import dtype_name
from featsharp.settings import Quality, setting
from featsharp.terminal import align

# Quartiles of fewer are not meaningful.
LEAST_RUNS = 5


@dataclass
class ThroughputTask(CurvesTask):
    """Time per image and per token, actual and linear, and peak memory against the upsampling factor.

    "direct" is the backbone on a larger image, "passes" the backbone on the image and its tiles. Upsamplers, untrained,
    and checkpoints are measured from image to sharp features. Times are medians of interleaved runs, at least 5 of each
    case. Run it while the machine does nothing else.
    """

    name: ClassVar[str] = "throughput"

    batch_size: int = setting(1, "images at a time", type="count", metavar="N")
    repeat: int = setting(20, "most runs of a case; slow ones get fewer, at least 5", type="count", metavar="N")

    def run(
        self, device: torch.device, dtype: torch.dtype | None, progress: bool, quality: Quality | None = None
    ) -> dict[str, Any]:
        """Measure.

        Args:
            device: To measure on.
            dtype: Autocast type of backbone passes; None: float32.
            progress: Whether to show bars on stderr.
            quality: Not used.

        Returns:
            "rows", one per curve and factor: "cells" of the result and "passes" through the backbone per image;
            "time", milliseconds of a batch with quartiles and runs; "ms_per_image", "us_per_token" (microseconds per
            cell), "linear_ms_per_image"; "backbone_ms_per_image", of its backbone passes alone; "peak_bytes" of a batch
            beside weights and input; "normalizer" and given "options" of the upsampler, "key" of the encoder's content.
            "skipped": points that could not be measured, with the reason. And the settings of the measurement.

        Raises:
            ConfigError: When not even the backbone at its native size can be measured.
        """
        backbone = create_backbone(self.backbone)
        backbone.autocast_dtype = dtype
        # The linear curve starts from factor 1.
        workloads, skipped = self.workloads(backbone, device, factors=(1,), batch_size=self.batch_size)
        measurements, failed = measure_workloads(
            workloads, device, repeat=self.repeat, least=LEAST_RUNS, progress=progress
        )
        for entry in failed:
            if (entry["curve"], entry["factor"]) == (DIRECT, 1):
                raise ConfigError(
                    f"backbone {backbone.name!r} cannot be measured at its native size: {entry['reason']}"
                )
        rows = [self._row(measurement) for measurement in measurements]
        base = rows[0]["us_per_token"]
        for row in rows:
            row["linear_ms_per_image"] = base * row["cells"] / 1000
        return {
            "backbone": backbone.name,
            "native_size": list(backbone.input_size),
            "batch_size": self.batch_size,
            "autocast": dtype and dtype_name(dtype),
            "attention": find_attention(workloads[0], device),
            "rows": rows,
            "skipped": skipped + failed,
        }

    def table(self, result: dict[str, Any]) -> list[str]:
        """Format the rows as lines of text."""
        height, width = result["native_size"]
        attention = ", ".join(result["attention"]) or "none that PyTorch names"
        columns = ("curve", "cells", "passes", "ms/image", "quartiles", "runs", "us/token", "linear ms")
        return [
            f"{result['backbone']}, native size {height}x{width}, batch {result['batch_size']}, "
            f"{result['autocast'] or 'float32'}, attention: {attention}",
            "linear: as many tokens, each at the time of factor 1; share: of the time that is its own backbone passes, "
            "~100% where those alone took longer",
            *align((*columns, "of linear", "share", "memory"), [_cells(row) for row in result["rows"]]),
            *describe_noise({_name(row): row["time"] for row in result["rows"]}),
            *describe_skipped(result["skipped"]),
        ]

    def _row(self, one: Measurement) -> dict[str, Any]:
        per_image = one.time.median / self.batch_size
        return {
            "curve": one.workload.curve,
            "factor": one.workload.factor,
            "cells": one.workload.cells,
            "passes": one.passes // self.batch_size,
            "time": asdict(one.time),
            "ms_per_image": per_image,
            "us_per_token": 1000 * per_image / one.workload.cells,
            "backbone_ms_per_image": one.backbone.median / self.batch_size,
            "peak_bytes": one.peak_bytes,
            **one.workload.recipe,
        }


def find_attention(workload: Workload, device: torch.device) -> list[str]:
    """List PyTorch's attention operators that a workload runs; none for a backbone with another attention."""
    images = noise(workload.input_shape, device)
    with counting() as counter:
        workload.module(images)
    names = (str(operator).rpartition(".")[2] for operator in counter.flops.get_flop_counts()["Global"])
    return sorted(name.strip("_") for name in names if "attention" in name)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a row."""
    time = row["time"]
    return (
        _name(row),
        str(row["cells"]),
        str(row["passes"]),
        f"{row['ms_per_image']:.1f}",
        f"{time['low']:.1f} - {time['high']:.1f}",
        str(time["runs"]),
        f"{row['us_per_token']:.1f}",
        f"{row['linear_ms_per_image']:.1f}",
        f"{row['ms_per_image'] / row['linear_ms_per_image']:.2f}x",
        _share(row),
        format_memory(row["peak_bytes"]),
    )


def _name(row: dict[str, Any]) -> str:
    return f"{row['curve']} {row['factor']:g}x"


def _share(row: dict[str, Any]) -> str:
    """Format the backbone's share of the time; medians of different runs may give more than 100 %."""
    share = row["backbone_ms_per_image"] / row["ms_per_image"]
    return f"{share:.0%}" if share <= 1 else "~100%"
