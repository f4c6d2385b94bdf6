"""Speed and memory of operations and upsamplers on features of a ViT-S/14: 16 x 16 tokens of 384 channels."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from featsharp.benchmark.measure import measure_memory, time_interleaved
from featsharp.layers.local_block import LocalBlock
from featsharp.ops.backends import Problem, list_backends
from featsharp.ops.local_attention import local_attention
from featsharp.ops.local_filter import local_filter
from featsharp.upsamplers.base import GuidedUpsampler
from featsharp.upsamplers.featup import FeatUp, JBULevel
from featsharp.upsamplers.interpolate import Bilinear
from featsharp.upsamplers.jafar import JAFAR

CHANNELS, GRID, IMAGE = 384, 16, 224
# Sides of the outputs whose cost per cell is compared.
SIDES = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Case:
    """A function of tensors that need gradients."""

    name: str
    factor: int
    function: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]


def benchmark_ops(
    factors: tuple[int, ...], device: torch.device, *, repeat: int, backward: bool = True
) -> Iterator[dict[str, Any]]:
    """Rows with name, factor, forward and backward times (milliseconds), and memory (bytes)."""
    for factor in factors:
        cases = {case.name: case for case in (*_upsampler_cases(factor, device), *_op_cases(factor, device))}
        with torch.no_grad():
            forward = time_interleaved({name: case.function for name, case in cases.items()}, device, repeat=repeat)
        for name, case in cases.items():
            with torch.no_grad():
                out_bytes = case.function().nbytes
                memory = measure_memory(case.function, device)
            row: dict[str, Any] = {
                "name": name,
                "factor": factor,
                "forward": asdict(forward[name]),
                "output_bytes": out_bytes,
                "peak_bytes": memory,
            }
            if backward:
                row["training"] = asdict(_time_training(case, device, repeat))
                row["training_peak_bytes"] = measure_memory(_training_step(case), device)
            yield row


def benchmark_scaling(device: torch.device, *, repeat: int) -> Iterator[dict[str, Any]]:
    """Cost per output cell of one JBU level and of the FeatSharp block on outputs of growing size."""
    block, level = LocalBlock(2 * CHANNELS, CHANNELS).to(device).eval(), JBULevel(2).to(device).eval()
    for side in SIDES:
        x = torch.randn(1, side, side, 2 * CHANNELS, device=device)
        source = torch.randn(1, CHANNELS, side // 2, side // 2, device=device)
        image = torch.randn(1, 3, 14 * side // 2, 14 * side // 2, device=device)
        cases: dict[str, Callable[[], object]] = {
            "JBU level 2x": lambda source=source, image=image: level(source, image),  # type: ignore[misc]
            "FeatSharp block, lean": lambda x=x: block(x),  # type: ignore[misc]
        }
        with torch.no_grad():
            for name, timing in time_interleaved(cases, device, repeat=repeat).items():
                yield {"name": name, "side": side, "forward": asdict(timing)}


def _upsampler_cases(factor: int, device: torch.device) -> Iterator[Case]:
    image = torch.randn(1, 3, IMAGE, IMAGE, device=device)
    features = torch.randn(1, CHANNELS, GRID, GRID, device=device)
    guided: list[tuple[str, GuidedUpsampler]] = [
        ("bilinear", Bilinear(CHANNELS, factor)),
        ("FeatUp JBU", FeatUp(CHANNELS, factor)),
        ("JAFAR", JAFAR(CHANNELS, factor)),
    ]
    for name, upsampler in guided:
        upsampler.to(device).eval()
        low_res = features.clone().requires_grad_()
        yield Case(name, factor, lambda u=upsampler, x=low_res: u.upsample(x, image), (low_res,))  # type: ignore[misc]
    stacked = torch.randn(1, factor * GRID, factor * GRID, 2 * CHANNELS, device=device)
    for widths in ("lean", "published"):
        block = LocalBlock(2 * CHANNELS, CHANNELS, published_widths=widths == "published").to(device).eval()
        x = stacked.clone().requires_grad_()
        yield Case(f"FeatSharp block, {widths}", factor, lambda b=block, x=x: b(x), (x,))  # type: ignore[misc]


def _op_cases(factor: int, device: torch.device) -> Iterator[Case]:
    """Every operation by every backend that can run."""
    side = factor * GRID
    for name, heads, dim, width, border in (
        ("JBU", 1, 32, CHANNELS, "reflect"),
        ("FeatSharp", 16, 48, 48, "clip"),
    ):
        for backend in _runnable("local_attention", device, dim, width):
            query, value = (
                torch.randn(1, side, side, heads, channels, device=device, requires_grad=True)
                for channels in (dim, width)
            )
            key = query.detach().clone().requires_grad_()
            yield Case(
                f"local_attention of {name}: {backend}",
                factor,
                lambda q=query, k=key, v=value, border=border, backend=backend: local_attention(  # type: ignore[misc]
                    q, k, v, window=7, border=border, backend=backend
                ),
                (query, key, value),
            )
    for backend in _runnable("local_filter", device, 0, CHANNELS):
        weights = torch.rand(1, side, side, 1, 5, 5, device=device, requires_grad=True)
        low_res = torch.randn(1, GRID, GRID, 1, CHANNELS, device=device, requires_grad=True)
        yield Case(
            f"local_filter of CARAFE: {backend}",
            factor,
            lambda w=weights, v=low_res, backend=backend: local_filter(w, v, backend=backend),  # type: ignore[misc]
            (weights, low_res),
        )


def _runnable(op: str, device: torch.device, key_dim: int, value_dim: int) -> list[str]:
    problem = Problem(device.type, (torch.float32,) * 3, key_dim, value_dim, window=7)
    return [backend.name for backend in list_backends(op) if backend.can_run(problem) is None]


def _training_step(case: Case) -> Callable[[], object]:
    """Forward and backward."""

    def step() -> None:
        for x in case.inputs:
            x.grad = None
        out = case.function()
        out.backward(torch.ones_like(out))

    return step


def _time_training(case: Case, device: torch.device, repeat: int) -> Any:
    return time_interleaved({case.name: _training_step(case)}, device, repeat=repeat)[case.name]
