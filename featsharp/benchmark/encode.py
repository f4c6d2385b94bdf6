"""What sharp features cost on top of the backbone passes that they are made from."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

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
    autocast: tuple[torch.dtype | None, ...] = (None,),
) -> Iterator[dict[str, Any]]:
    """Rows with upsampler, factor, dtype, and times of the whole encoding and of its own backbone passes alone.

    Args:
        backbone: Name or object.
        factors: Gains.
        repeat: Most runs of a case.
        normalizer: Its name; fitted to random vectors, which cost what others do.
        autocast: Dtypes to run under; None for float32.
    """
    for factor in factors:
        encoders = {
            name: _build(backbone, name, factor, normalizer).to(device)
            for name in UPSAMPLERS
            if name != "identity" or factor == 1
        }
        for dtype in autocast:
            cases, inputs = {}, {}
            for name, encoder in encoders.items():
                images = torch.randn(1, 3, *encoder.input_size, device=device)
                passes = 1 if encoder.upsampler.halo is None else 1 + factor**2
                batch = torch.randn(passes, 3, *encoder.backbone.input_size, device=device)
                inputs[name] = passes
                cases[name] = lambda encoder=encoder, images=images: encoder(images)
                cases[f"{name}, backbone"] = lambda encoder=encoder, batch=batch: encoder.backbone(batch)
            with (
                torch.no_grad(),
                torch.autocast(device.type, dtype, enabled=dtype is not None),
            ):
                timings = time_interleaved(cases, device, repeat=repeat)
                for name in encoders:
                    yield {
                        "upsampler": name,
                        "factor": factor,
                        "dtype": "float32" if dtype is None else f"{dtype} autocast".removeprefix("torch."),
                        "passes": inputs[name],
                        "encode": asdict(timings[name]),
                        "backbone": asdict(timings[f"{name}, backbone"]),
                        "peak_bytes": measure_memory(cases[name], device),
                    }


def _build(backbone: str | Backbone, upsampler: str, factor: int, normalizer: str) -> SharpEncoder:
    encoder = create_encoder(backbone, upsampler, factor, normalizer=normalizer)
    if encoder.normalizer.needs_fit:
        statistics = FeatureStatistics(encoder.embed_dim)
        statistics.update(torch.randn(2 * encoder.embed_dim, encoder.embed_dim))
        encoder.normalizer.fit(statistics)
    return encoder
