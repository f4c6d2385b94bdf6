"""What sharp features cost on top of the backbone passes that they are made from."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone
from featsharp.benchmark.measure import measure_memory, time_interleaved
from featsharp.builder import create_encoder
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics

UPSAMPLERS = ("identity", "bilinear", "tile", "featup", "jafar", "featsharp")


def benchmark_encode(
    backbone: str | Backbone,
    factors: tuple[int, ...],
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
            name: _build(backbone, name, factor, normalizer).to(device)
            for name in upsamplers
            if name != "identity" or factor == 1
        }
        for dtype in autocast:
            cases: dict[str, Callable[[], object]] = {}
            for name, encoder in encoders.items():
                images = torch.randn(1, 3, *encoder.input_size, device=device)
                batch = torch.randn(_passes(encoder), 3, *encoder.backbone.input_size, device=device)
                cases[name] = _call(encoder, images, dtype)
                cases[f"{name}, backbone"] = _call(encoder.backbone, batch, dtype)
            groups.append((factor, dtype, encoders, cases, time_interleaved(cases, device, repeat=repeat)))
    # Afterwards, because measuring changes how the allocator works.
    for factor, dtype, encoders, cases, timings in groups:
        for name, encoder in encoders.items():
            yield {
                "upsampler": name,
                "factor": factor,
                "dtype": "float32" if dtype is None else f"{dtype} autocast".removeprefix("torch."),
                "passes": _passes(encoder),
                "encode": asdict(timings[name]),
                "backbone": asdict(timings[f"{name}, backbone"]),
                "peak_bytes": measure_memory(cases[name], device),
            }


def _passes(encoder: SharpEncoder) -> int:
    """Images that go through the backbone for one image."""
    return 1 if encoder.upsampler.halo is None else 1 + math.ceil(encoder.factor) ** 2


def _call(module: torch.nn.Module, images: Tensor, dtype: torch.dtype | None) -> Callable[[], object]:
    """Without gradients, under autocast to ``dtype`` or none."""

    def call() -> None:
        with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            module(images)

    return call


def _build(backbone: str | Backbone, upsampler: str, factor: int, normalizer: str) -> SharpEncoder:
    options = {"function": upsampler} if ":" in upsampler else {}
    name = "custom" if options else upsampler
    encoder = create_encoder(backbone, name, factor, upsampler_options=options, normalizer=normalizer)
    if encoder.normalizer.needs_fit:
        statistics = FeatureStatistics(encoder.embed_dim)
        statistics.update(torch.randn(2 * encoder.embed_dim, encoder.embed_dim))
        encoder.normalizer.fit(statistics)
    return encoder
