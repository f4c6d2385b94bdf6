"""What sharp features cost on top of the backbone passes that they are made from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone
from featsharp.bench.measure import measure_memory, time_interleaved
from featsharp.bench.workloads import backbone_passes, build_encoder

UPSAMPLERS = ("identity", "bilinear", "tile", "featup", "jafar", "featsharp")


def benchmark_encode(
    backbone: str | Backbone,
    factors: tuple[float, ...],
    device: torch.device,
    *,
    repeat: int,
    normalizer: str = "phi-s",
    upsamplers: Sequence[str] = UPSAMPLERS,
    autocast: tuple[torch.dtype | None, ...] = (None,),
) -> Iterator[dict[str, Any]]:
    """Rows with upsampler, factor, dtype, and times of the whole encoding and of its own backbone passes alone.

    Args:
        backbone: Name or object.
        factors: Gains.
        repeat: Most runs of a case.
        normalizer: Its name; fitted to random vectors, which cost what others do.
        upsamplers: Their names, or ``module:function`` for one made of a function; identity only at factor 1.
        autocast: Dtypes to run under; None for float32.
    """
    groups = []
    for factor in factors:
        encoders = {
            name: build_encoder(backbone, name, factor, normalizer).to(device)
            for name in upsamplers
            if name != "identity" or factor == 1
        }
        for dtype in autocast:
            cases: dict[str, Callable[[], object]] = {}
            passes: dict[str, list[Tensor]] = {}
            for name, encoder in encoders.items():
                images = torch.randn(1, 3, *encoder.input_size, device=device)
                passes[name] = backbone_passes(encoder.backbone, _call(None, encoder, images))
                cases[name] = _call(dtype, encoder, images)
                cases[f"{name}, backbone"] = _call(dtype, encoder.backbone, *passes[name])
            counts = {name: sum(map(len, batches)) for name, batches in passes.items()}
            groups.append((factor, dtype, encoders, cases, counts, time_interleaved(cases, device, repeat=repeat)))
    # Afterwards, because measuring changes how the allocator works.
    for factor, dtype, encoders, cases, counts, timings in groups:
        for name in encoders:
            yield {
                "upsampler": name,
                "factor": factor,
                "dtype": "float32" if dtype is None else f"{dtype} autocast".removeprefix("torch."),
                "passes": counts[name],
                "encode": asdict(timings[name]),
                "backbone": asdict(timings[f"{name}, backbone"]),
                "peak_bytes": measure_memory(cases[name], device),
            }


def _call(dtype: torch.dtype | None, module: torch.nn.Module, *batches: Tensor) -> Callable[[], object]:
    """One batch after the other, without gradients, under autocast to ``dtype`` or none."""

    def call() -> None:
        with torch.no_grad(), torch.autocast(batches[0].device.type, dtype, enabled=dtype is not None):
            for batch in batches:
                module(batch)

    return call
