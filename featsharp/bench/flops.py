"""Floating-point operations of backbone and upsampler per image, against the upsampling factor."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from featsharp.backbones import create_backbone
from featsharp.bench.counting import count_operations
from featsharp.bench.workloads import CurvesTask, Workload, describe_skipped, skip
from featsharp.errors import FeatSharpError
from featsharp.settings import Quality
from featsharp.terminal import align, with_progress

CONVENTION = (
    "a multiply-add is 2 operations; counted: products of matrices, convolutions, attention; not counted: element-wise "
    "functions, norms, softmax, interpolation"
)


@dataclass
class FlopsTask(CurvesTask):
    """Floating-point operations per image of larger images, of tiles, and of whole encoders, by factor.

    A multiply-add is two operations. Matrix products, convolutions and attention are counted; element-wise functions,
    norms, softmax and interpolation are not.
    """

    name: ClassVar[str] = "flops"

    def run(
        self, device: torch.device, dtype: torch.dtype | None, progress: bool, quality: Quality | None = None
    ) -> dict[str, Any]:
        """Count.

        Args:
            device: Of the operators that are counted, and of encoders that have to run.
            dtype: Autocast type of backbone passes; changes no count.
            progress: Whether to show a bar on stderr.
            quality: Not used.

        Returns:
            "rows", one per curve and factor: "cells" of the result, "passes" through the backbone, operations of the
            "backbone", the "upsampler" with its "normalizer" and in "total", their ratio to one pass at the native
            size, "relative", the operators "uncounted", given "options" of the upsampler and "key" of the encoder's
            content. "skipped": points that could not be counted, with the reason.
        """
        backbone = create_backbone(self.backbone)
        backbone.autocast_dtype = dtype
        workloads, skipped = self.workloads(backbone, device)
        base = count_operations(backbone, (1, 3, *backbone.input_size), device).total
        rows = []
        for workload in with_progress(workloads, self.name, progress):
            try:
                rows.append(_row(workload, base, device))
            except FeatSharpError as error:
                skipped.append(skip(workload.curve, workload.factor, str(error)))
        return {
            "backbone": backbone.name,
            "native_size": list(backbone.input_size),
            "convention": CONVENTION,
            "one_pass": base,
            "rows": rows,
            "skipped": skipped,
        }

    def table(self, result: dict[str, Any]) -> list[str]:
        """Format the rows as lines of text, in 10^9 operations."""
        height, width = result["native_size"]
        columns = ("GFLOP per image", "cells", "passes", "backbone", "upsampler", "total", "in passes")
        uncounted = sorted({name for row in result["rows"] for name in row["uncounted"]})
        return [
            f"{result['backbone']}, native size {height}x{width}, one pass {result['one_pass'] / 1e9:.4g} GFLOP",
            result["convention"],
            *align(columns, [_cells(row) for row in result["rows"]]),
            *([f"more than that: no formula for {', '.join(uncounted)}"] if uncounted else []),
            *describe_skipped(result["skipped"]),
        ]


def _row(workload: Workload, base: int, device: torch.device) -> dict[str, Any]:
    whole = count_operations(workload.module, workload.input_shape, device)
    alone = whole.total
    if workload.module is not workload.backbone:
        alone = sum(count_operations(workload.backbone, shape, device).total for shape in whole.passes)
    return {
        "curve": workload.curve,
        "factor": workload.factor,
        "cells": workload.cells,
        "passes": sum(shape[0] for shape in whole.passes),
        "backbone": alone,
        "upsampler": whole.total - alone,
        "total": whole.total,
        "relative": whole.total / base,
        "uncounted": whole.uncounted,
        **workload.recipe,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a row."""
    amounts = (f"{row[key] / 1e9:.4g}" for key in ("backbone", "upsampler", "total"))
    return (
        f"{row['curve']} {row['factor']:g}x",
        str(row["cells"]),
        str(row["passes"]),
        *amounts,
        f"{row['relative']:.3f}",
    )
