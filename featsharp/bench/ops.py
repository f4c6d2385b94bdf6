"""Speed and memory of operations and upsamplers on features of a ViT-S/14: 16 x 16 tokens of 384 channels."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.bench.measure import measure_memory, time_interleaved
from featsharp.layers.local_block import LocalBlock
from featsharp.ops.backends import Problem, list_backends
from featsharp.ops.local_attention import local_attention
from featsharp.ops.local_filter import local_filter
from featsharp.upsamplers.base import GuidedUpsampler
from featsharp.upsamplers.featup import FeatUp, JBULevel
from featsharp.upsamplers.interpolate import Bilinear
from featsharp.upsamplers.jafar import JAFAR

CHANNELS, GRID, IMAGE = 384, 16, 224
# Largest factor whose backward passes are measured: at 16x the graphs of all cases take more than 20 GiB.
MAX_BACKWARD_FACTOR = 4
# Sides of the outputs whose cost per cell is compared.
SIDES = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Case:
    """A function of tensors that need gradients."""

    name: str
    factor: int
    function: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]


def bench_ops(
    factors: tuple[int, ...], device: torch.device, *, repeat: int, backbone: str | None = None
) -> Iterator[dict[str, Any]]:
    """Measure name, factor, forward times (milliseconds) and memory (bytes) by row; up to 4x also the backward pass.

    Args:
        factors: Whole, in each direction.
        device: To measure on.
        repeat: Most runs of a case.
        backbone: Name of one whose passes for a set of tiles are timed too, up to 4x.
    """
    groups = []
    for factor in factors:
        cases = {case.name: case for case in (*_upsampler_cases(factor, device), *_op_cases(factor, device))}
        timed: dict[str, Callable[[], object]] = {}
        for name, case in cases.items():
            timed[name] = _without_gradient(case)
            if factor <= MAX_BACKWARD_FACTOR:
                timed[f"{name}, backward"] = _backward(case)
        if backbone and factor <= MAX_BACKWARD_FACTOR:
            timed["backbone"] = _backbone_passes(backbone, 1 + factor**2, device)
        groups.append((factor, cases, time_interleaved(timed, device, repeat=repeat)))
    # Afterwards, because measuring changes the allocator's settings.
    for factor, cases, timings in groups:
        if "backbone" in timings:
            passes = 1 + factor**2
            yield {"name": f"{passes} passes of {backbone}", "factor": factor, "forward": asdict(timings["backbone"])}
        for name, case in cases.items():
            row = {
                "name": name,
                "factor": factor,
                "forward": asdict(timings[name]),
                "output_bytes": _without_gradient(case)().nbytes,
                "peak_bytes": measure_memory(_without_gradient(case), device),
            }
            if factor <= MAX_BACKWARD_FACTOR:
                row["backward"] = asdict(timings[f"{name}, backward"])
                row["training_peak_bytes"] = measure_memory(_training_step(case), device)
            yield row


def bench_scaling(device: torch.device, *, repeat: int, sides: tuple[int, ...] = SIDES) -> Iterator[dict[str, Any]]:
    """Measure the forward times of one JBU level and of the FeatSharp block on square outputs of growing sides."""
    block, level = LocalBlock(2 * CHANNELS, CHANNELS).to(device).eval(), JBULevel(2).to(device).eval()
    for side in sides:
        x = torch.randn(1, side, side, 2 * CHANNELS, device=device)
        source = torch.randn(1, CHANNELS, side // 2, side // 2, device=device)
        image = torch.randn(1, 3, 14 * side // 2, 14 * side // 2, device=device)
        with torch.no_grad():
            timings = time_interleaved(
                {
                    "JBU level 2x": lambda source=source, image=image: level(source, image),  # type: ignore[misc]
                    "FeatSharp block, lean": lambda x=x: block(x),  # type: ignore[misc]
                },
                device,
                repeat=repeat,
            )
        for name, timing in timings.items():
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
    """Make cases of every operation by every backend that can run."""
    side = factor * GRID
    for name, heads, dim, width, border in (
        ("JBU", 1, 32, CHANNELS, "reflect"),
        ("FeatSharp", 16, 48, 48, "clip"),
    ):
        for backend in _runnable("local_attention", device):
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
    for backend in _runnable("local_filter", device):
        weights = torch.rand(1, side, side, 1, 5, 5, device=device, requires_grad=True)
        low_res = torch.randn(1, GRID, GRID, 1, CHANNELS, device=device, requires_grad=True)
        yield Case(
            f"local_filter of CARAFE: {backend}",
            factor,
            lambda w=weights, v=low_res, backend=backend: local_filter(w, v, backend=backend),  # type: ignore[misc]
            (weights, low_res),
        )


def _runnable(op: str, device: torch.device) -> list[str]:
    problem = Problem(device.type, (torch.float32,))
    return [backend.name for backend in list_backends(op) if backend.can_run(problem) is None]


def _backbone_passes(name: str, passes: int, device: torch.device) -> Callable[[], object]:
    backbone = create_backbone(name).to(device)
    images = torch.randn(passes, 3, IMAGE, IMAGE, device=device)
    return torch.no_grad()(lambda: backbone(images))


def _without_gradient(case: Case) -> Callable[[], Tensor]:
    return torch.no_grad()(case.function)


def _backward(case: Case) -> Callable[[], object]:
    """Make a function of the backward pass alone, whose graph is built at the first call."""
    graph: list[tuple[Tensor, Tensor]] = []

    def step() -> None:
        if not graph:
            out = case.function()
            graph.append((out, torch.ones_like(out)))
        out, cotangent = graph[0]
        _clear_gradients(case)
        out.backward(cotangent, retain_graph=True)

    return step


def _training_step(case: Case) -> Callable[[], object]:
    """Make a function of forward and backward pass."""

    def step() -> None:
        _clear_gradients(case)
        out = case.function()
        out.backward(torch.ones_like(out))

    return step


def _clear_gradients(case: Case) -> None:
    for x in case.inputs:
        x.grad = None
