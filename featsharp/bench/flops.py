"""Floating-point operations of backbone and upsampler per image, against the upsampling factor.

Convention: a multiply-add is two operations. Counted are the products of matrices: linear layers, convolutions,
attention, and our own local attention and local filter. Not counted are element-wise functions, norms, softmax and
interpolation. The result names operators that ran and have no formula: those of PyTorch that multiply matrices or do
as much work by their names, such as recurrent layers and Fourier transforms, and all of other libraries. What is no
operator of PyTorch's dispatcher, such as NumPy or a bare kernel, is neither counted nor named.

Nothing is computed where it can be helped: a copy of the encoder without values is shown an image without values.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone
from featsharp.bench.counting import counting
from featsharp.bench.measure import find_failure, noise
from featsharp.bench.workloads import (
    CurvesTask,
    Workload,
    backbone_passes,
    describe_skipped,
    is_foreign,
    list_workloads,
    skip,
)
from featsharp.errors import ConfigError, FeatSharpError
from featsharp.model import SharpEncoder
from featsharp.terminal import align, with_progress

logger = logging.getLogger(__name__)

CONVENTION = (
    "a multiply-add is 2 operations; counted: products of matrices, convolutions, attention; not counted: element-wise "
    "functions, norms, softmax, interpolation"
)


@dataclass
class FlopsTask(CurvesTask):
    """Floating-point operations per image of larger images, of tiles, and of whole encoders, by factor.

    A multiply-add is two operations. Counted are products of matrices, convolutions and attention; element-wise
    functions, norms, softmax and interpolation are not.
    """

    name: ClassVar[str] = "flops"
    title: ClassVar[str] = "floating-point operations of backbone and upsampler by factor"

    def run(self, device: torch.device, dtype: torch.dtype | None, progress: bool) -> dict[str, Any]:
        """Count.

        Args:
            device: Decides the operators that are counted; and where an encoder runs that needs values.
            dtype: Autocast type of backbone passes; changes no count.
            progress: Whether to show a bar on stderr.

        Returns:
            "rows", one per curve and factor: "cells" of the result, "passes" through the backbone, operations of the
            "backbone", the "upsampler" with its "normalizer" and in "total", their ratio to one pass at the native
            size, "relative", the operators "uncounted", and the "options" of the upsampler. "skipped", what could not
            be counted and why.
        """
        backbone = create_backbone(self.backbone)
        backbone.autocast_dtype = dtype
        workloads, skipped = list_workloads(backbone, self.upsampler, self.factors, device)
        base = count_operations(backbone, (1, 3, *backbone.input_size), device).total
        rows = []
        for workload in with_progress(workloads, self.name, progress):
            try:
                rows.append(_row(workload, base, device))
            except FeatSharpError as error:
                skipped.append(skip(workload.curve, workload.factor, str(error)))
        return {
            "backbone": self.backbone,
            "native_size": list(backbone.input_size),
            "convention": CONVENTION,
            "one_pass": base,
            "rows": rows,
            "skipped": skipped,
        }

    def table(self, result: dict[str, Any]) -> list[str]:
        """The rows as lines of text, in 10^9 operations."""
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


@dataclass(frozen=True)
class Operations:
    """What one call does.

    Attributes:
        total: Floating-point operations.
        passes: Shapes [B, 3, H, W] of the batches that go through the backbone.
        uncounted: Operators without a formula.
    """

    total: int
    passes: list[tuple[int, ...]]
    uncounted: list[str]


def count_operations(module: Backbone | SharpEncoder, shape: tuple[int, ...], device: torch.device) -> Operations:
    """Count what a backbone or an encoder does for images of a shape.

    Args:
        module: In eval mode, on the device. It is left as it is.
        shape: [B, 3, H, W].
        device: Where.

    Raises:
        FeatSharpError: As the module raises them; ConfigError when memory runs out, or a function of the user's fails.
    """
    try:
        mode = FakeTensorMode()
        with FakeCopyMode(mode):
            # What the copy keeps for later calls goes with it.
            twin = copy.deepcopy(module)
        with mode:
            return _count(twin, torch.empty(shape, device=device))
    except FeatSharpError:
        raise
    except Exception as error:  # of any kind: foreign code that looks at values, or cannot be copied
        logger.warning(
            "counting on real tensors, which takes time and memory, since shapes alone do not do: %s: %s",
            type(error).__name__,
            error,
        )
    found: list[Operations] = []
    images = noise(shape, device)
    failure = find_failure(lambda: found.append(_count(module, images)), foreign=is_foreign(module))
    if failure is not None:
        raise ConfigError(failure)
    return found[0]


def _count(module: Backbone | SharpEncoder, images: torch.Tensor) -> Operations:
    backbone = module if isinstance(module, Backbone) else module.backbone
    with counting() as counter:
        batches = backbone_passes(backbone, lambda: module(images))
    return Operations(
        counter.flops.get_total_flops(), [tuple(batch.shape) for batch in batches], sorted(counter.uncounted)
    )


def _row(workload: Workload, base: int, device: torch.device) -> dict[str, Any]:
    whole = count_operations(workload.module, workload.input_shape, device)
    own = whole.total
    if workload.module is not workload.backbone:
        own = sum(count_operations(workload.backbone, shape, device).total for shape in whole.passes)
    return {
        "curve": workload.curve,
        "factor": workload.factor,
        "cells": workload.cells,
        "passes": sum(shape[0] for shape in whole.passes),
        "backbone": own,
        "upsampler": whole.total - own,
        "total": whole.total,
        "relative": whole.total / base,
        "uncounted": whole.uncounted,
        **workload.recipe,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text."""
    amounts = (f"{row[part] / 1e9:.4g}" for part in ("backbone", "upsampler", "total"))
    return (
        f"{row['curve']} {row['factor']:g}x",
        str(row["cells"]),
        str(row["passes"]),
        *amounts,
        f"{row['relative']:.3f}",
    )
