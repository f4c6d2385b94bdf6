"""Speed and memory of operations and upsamplers on features of a ViT-S/14: 16 x 16 tokens of 384 channels."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.bench.measure import measure_memory, time_interleaved
from featsharp.layers.local_block import LocalBlock
from featsharp.ops.backends import Problem, list_backends
from featsharp.ops.local_attention import local_attention
from featsharp.ops.local_filter import local_filter
from featsharp.ops.windows import Border
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

    def forward(self) -> Tensor:
        """Compute without gradients."""
        with torch.no_grad():
            return self.function()

    def training_step(self) -> None:
        """Run forward and backward pass."""
        self._clear_gradients()
        out = self.function()
        out.backward(torch.ones_like(out))

    def backward(self) -> Callable[[], None]:
        """Make a function of the backward pass alone, whose graph is built at the first call."""
        graph: list[tuple[Tensor, Tensor]] = []

        def step() -> None:
            if not graph:
                out = self.function()
                graph.append((out, torch.ones_like(out)))
            out, cotangent = graph[0]
            self._clear_gradients()
            out.backward(cotangent, retain_graph=True)

        return step

    def _clear_gradients(self) -> None:
        for x in self.inputs:
            x.grad = None


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
        cases = {case.name: case for case in (*_upsampler_cases(factor, device), *op_cases(factor, device))}
        timed: dict[str, Callable[[], object]] = {}
        for name, case in cases.items():
            timed[name] = case.forward
            if factor <= MAX_BACKWARD_FACTOR:
                timed[f"{name}, backward"] = case.backward()
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
                "output_bytes": case.forward().nbytes,
                "peak_bytes": measure_memory(case.forward, device),
            }
            if factor <= MAX_BACKWARD_FACTOR:
                row["backward"] = asdict(timings[f"{name}, backward"])
                row["training_peak_bytes"] = measure_memory(case.training_step, device)
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
                {"JBU level 2x": partial(level, source, image), "FeatSharp block, lean": partial(block, x)},
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
        yield Case(name, factor, partial(upsampler.upsample, low_res, image), (low_res,))
    stacked = torch.randn(1, factor * GRID, factor * GRID, 2 * CHANNELS, device=device)
    for widths in ("lean", "published"):
        block = LocalBlock(2 * CHANNELS, CHANNELS, published_widths=widths == "published").to(device).eval()
        x = stacked.clone().requires_grad_()
        yield Case(f"FeatSharp block, {widths}", factor, partial(block, x), (x,))


def op_cases(
    factor: int, device: torch.device, *, grid: int = GRID, dtype: torch.dtype = torch.float32
) -> Iterator[Case]:
    """Make cases of every operation by every backend that can run, called "OPERATION of MODEL: BACKEND".

    Args:
        factor: Whole.
        device: Of the tensors.
        grid: Side of the features at the low resolution.
        dtype: Of the tensors.
    """
    side = factor * grid
    shapes: list[tuple[str, int, int, int, Border]] = [
        ("JBU", 1, 32, CHANNELS, "reflect"),
        ("FeatSharp", 16, 48, 48, "clip"),
    ]
    for name, heads, dim, width, border in shapes:
        for backend in _runnable("local_attention", device, dtype):
            query, value = (
                torch.randn(1, side, side, heads, channels, device=device, dtype=dtype, requires_grad=True)
                for channels in (dim, width)
            )
            key = query.detach().clone().requires_grad_()
            yield Case(
                f"local_attention of {name}: {backend}",
                factor,
                partial(local_attention, query, key, value, window=7, border=border, backend=backend),
                (query, key, value),
            )
    for backend in _runnable("local_filter", device, dtype):
        weights = torch.rand(1, side, side, 1, 5, 5, device=device, dtype=dtype, requires_grad=True)
        low_res = torch.randn(1, grid, grid, 1, CHANNELS, device=device, dtype=dtype, requires_grad=True)
        yield Case(
            f"local_filter of CARAFE: {backend}",
            factor,
            partial(local_filter, weights, low_res, backend=backend),
            (weights, low_res),
        )


def _runnable(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    problem = Problem(device.type, (dtype,))
    return [backend.name for backend in list_backends(op) if backend.can_run(problem) is None]


def _backbone_passes(name: str, passes: int, device: torch.device) -> Callable[[], object]:
    backbone = create_backbone(name).to(device)
    images = torch.randn(passes, 3, IMAGE, IMAGE, device=device)
    return torch.no_grad()(lambda: backbone(images))
