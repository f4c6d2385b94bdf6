"""The stages of gpu.py: what is measured, as functions by name that return the figures of one measurement."""

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_checks import device_checks, draw_views, kernel_checks

from featsharp.backbones.loading import set_native_size
from featsharp.backbones.vits14_focus import PATCH_SIZE, FocusBackbone, FocusViT, fill_focus_model
from featsharp.bench.encode import measure_workloads
from featsharp.bench.measure import find_failure, measure_memory, noise, time_interleaved
from featsharp.bench.ops import Case, op_cases
from featsharp.bench.throughput import ThroughputTask, find_attention
from featsharp.bench.workloads import Workload, backbone_passes, build_encoder, list_workloads, needs_function
from featsharp.checkpoint import read_state_dict
from featsharp.names import dtype_name
from featsharp.ops.backends import use_backend
from featsharp.ops.blocks import limit_chunks
from featsharp.training.config import RunConfig
from featsharp.training.distributed import World
from featsharp.training.objectives import create_objective
from featsharp.training.trainer import Trainer
from featsharp.upsamplers import list_upsamplers
from featsharp.upsamplers.registration import default_factor

ROOT = Path(__file__).resolve().parents[1]
TESTS_SECONDS = 240  # of the test suite within the stage of checks
COMPILED = "compiled reference"
# Larger than any map, so that torch.compile sees the reference as one expression.
ALL_AT_ONCE = 2**62
# What is timed of an operation. Not the backward pass alone: a compiled one runs once for each forward pass.
WAYS = ("forward", "training_step")

Row = dict[str, Any]
Measurements = Mapping[str, Callable[[], Row]]


@dataclass(frozen=True)
class Setup:
    """What all stages measure on and with; ``small`` is the size of a rehearsal."""

    device: torch.device
    small: bool
    weights: Path | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the images in pixels; 1022 are the most whole patches within 1024."""
        return (56,) if self.small else (224, 448, 672, 1022)

    @property
    def repeat(self) -> int:
        return 2 if self.small else 20

    @property
    def compiler(self) -> str:
        return "eager" if self.small else "inductor"

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """Weights of the backbone in float32: of the file, or random ones, which take the same time."""
        if self.weights is not None:
            return {name: x.float() for name, x in read_state_dict(self.weights).items()}
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in FocusViT().state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def backbone(self, side: int) -> FocusBackbone:
        """Build the backbone with a native size of side x side pixels."""
        backbone = FocusBackbone(fill_focus_model(copy.deepcopy(self.state)))
        set_native_size(backbone, (side, side))
        return backbone.to(self.device)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second that a copy of a large tensor reads and writes: what the roofline is measured against."""
        source = torch.zeros(2**22 if self.small else 2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        timing = time_interleaved({"copy": lambda: target.copy_(source)}, self.device, repeat=self.repeat)["copy"]
        return 2000 * source.nbytes / timing.median


def list_checks(setup: Setup) -> Measurements:
    checks = _rows_of_checks(device_checks(setup.device.type), 8 if setup.small else 1)
    return checks if setup.small else {**checks, "pytest -m gpu": run_tests}


def run_tests() -> Row:
    """All tests marked gpu, where pytest is installed; the checks before are those that can do without."""
    if importlib.util.find_spec("pytest") is None:
        return {"impossible": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TESTS_SECONDS)
    lines = [*done.stderr.splitlines(), *done.stdout.splitlines()][-30:]
    if done.returncode not in (0, 1):  # 1: a test failed
        return {"impossible": f"pytest does not run here: {' '.join(lines[-3:])}"}
    return {"holds": done.returncode == 0, "reason": "\n".join(lines)}


def list_kernels(setup: Setup) -> Measurements:
    checks = {
        f"{op}: {name}": check
        for op, of_op in kernel_checks(setup.device.type).items()
        for name, check in of_op.items()
    }
    return _rows_of_checks(checks, 5 if setup.small else 1)


def _rows_of_checks(checks: Mapping[str, Callable[[], None]], every: int) -> Measurements:
    def hold(check: Callable[[], None]) -> Row:
        try:
            check()
        except AssertionError as error:
            return {"holds": False, "reason": str(error)}
        return {"holds": True}

    return {name: partial(hold, check) for name, check in list(checks.items())[::every]}


def list_ops(setup: Setup) -> Measurements:
    families = list(dict.fromkeys(case.name.partition(": ")[0] for case in op_cases(1, torch.device("cpu"), grid=1)))
    return {
        f"{family}, {side} px, {dtype_name(dtype)}": partial(measure_op, setup, family, side, dtype)
        for dtype in ((torch.bfloat16,) if setup.small else (torch.bfloat16, torch.float32))
        for side in setup.sizes
        for family in families[:: 2 if setup.small else 1]  # without the sixteen heads
    }


def measure_op(setup: Setup, family: str, side: int, dtype: torch.dtype, factor: int = 2) -> Row:
    """Time and memory of all backends of an operation and of its compiled reference, at the same maps."""
    torch.compiler.reset()  # after eight shapes torch would silently no longer compile
    device, cases = setup.device, {}
    for case in op_cases(factor, device, grid=side // PATCH_SIZE, dtype=dtype):
        of_family, _, backend = case.name.partition(": ")
        if of_family == family:
            cases[backend] = case
    cases[COMPILED] = compile_case(cases["reference"], setup.compiler)
    failed = {name: find_failure(case.training_step, foreign=True) for name, case in cases.items()}
    cases = {name: case for name, case in cases.items() if failed[name] is None}
    calls = {(name, way): getattr(case, way) for name, case in cases.items() for way in WAYS}
    timings = time_interleaved(calls, device, repeat=setup.repeat)
    inputs = sum(x.nbytes for x in cases["blocked"].inputs)
    output = cases["blocked"].forward().nbytes
    # Least traffic: what is read (with the gradient of the output) and written, once.
    traffic = {"forward": inputs + output, "training_step": 3 * inputs + 2 * output}
    backends = {
        name: {
            "peak_bytes": measure_memory(case.forward, device),
            "training_peak_bytes": measure_memory(case.training_step, device),
            **{way: asdict(timings[name, way]) for way in WAYS},
            "roofline_share": {
                way: 1000 * least / setup.bandwidth / timings[name, way].median for way, least in traffic.items()
            },
        }
        for name, case in cases.items()
    }
    return {
        "op": family,
        "side": side,
        "dtype": dtype_name(dtype),
        "factor": factor,
        "traffic_bytes": traffic,
        "bytes_per_second": setup.bandwidth,
        "backends": backends,
        "failed": {name: reason for name, reason in failed.items() if reason},
    }


def compile_case(case: Case, compiler: str) -> Case:
    compiled = torch.compile(case.function, backend=compiler, dynamic=False, fullgraph=True)

    def function() -> torch.Tensor:
        with limit_chunks(ALL_AT_ONCE):
            return compiled()

    return replace(case, function=function)


def list_encoders(setup: Setup) -> Measurements:
    names = [name for name in list_upsamplers() if not needs_function(name)]
    local = [name for name in (["featup"] if setup.small else names) if has_local_attention(setup, name)]
    return {
        f"{name}, {side} px, {variant}": partial(measure_encoder, setup, name, side, variant)
        for variant, of_variant in (("default", names), ("triton", local), (COMPILED, local))
        for side in setup.sizes
        for name in of_variant
    }


def has_local_attention(setup: Setup, name: str) -> bool:
    """Whether an upsampler runs the operation that has Triton kernels; not where it fails, which its own row tells."""
    operators: list[str] = []

    def run() -> None:
        workloads, _ = list_workloads(setup.backbone(56), [name], [default_factor(name)], setup.device)
        operators.extend(find_attention(workloads[0], setup.device))

    find_failure(run, foreign=True)
    return "local_attention" in operators


def measure_encoder(setup: Setup, name: str, side: int, variant: str) -> Row:
    """Time and memory of an encoder of bfloat16 weights beside its backbone passes.

    Variants, for methods with local attention: its Triton kernels, and the whole encoder compiled with its reference.
    """
    torch.compiler.reset()
    workloads, skipped = list_workloads(setup.backbone(side), [name], [default_factor(name)], setup.device)
    if skipped:
        return {"impossible": skipped[0]["reason"]}
    workload, images = workloads[0], noise(workloads[0].input_shape, setup.device)
    row: Row = {"upsampler": name, "factor": workload.factor, "side": side, "variant": variant}
    with torch.no_grad():
        exact = workload.module(images).high_res if variant == "default" else None
        workload.module.to(torch.bfloat16)
        row["attention"] = find_attention(workload, setup.device)
        if exact is not None:
            found = workload.module(images).high_res.to(exact.dtype)
            row["cosine_to_float32"] = F.cosine_similarity(found, exact, dim=1).mean().item()
            del exact, found
    if variant == "default":
        return row | time_workload(setup, workload)
    if variant == "triton":
        with use_backend("triton"):
            return row | time_workload(setup, workload)
    workload.module.compile(backend=setup.compiler, dynamic=False)
    with use_backend("reference"), limit_chunks(ALL_AT_ONCE):
        return row | time_workload(setup, workload)


def time_workload(setup: Setup, workload: Workload) -> Row:
    measured, failed = measure_workloads([workload], setup.device, repeat=setup.repeat)
    if failed:
        return {"impossible": failed[0]["reason"]}
    (one,) = measured
    return {
        "passes": one.passes,
        "encode": asdict(one.time),
        "backbone": asdict(one.backbone),
        "peak_bytes": one.peak_bytes,
    }


def list_curve(setup: Setup) -> Measurements:
    factors, batches = ((1, 2), (1,)) if setup.small else ((1, 1.5, 2, 3, 4, 4.5), (1, 16))

    def measure(batch_size: int, factor: float) -> Row:
        backbone = setup.backbone(setup.sizes[0])
        methods = ("bilinear",) if setup.small else ("featsharp", "tile", "bilinear", "featup")
        task = ThroughputTask(
            backbone=backbone, upsampler=methods, factors=(factor,), batch_size=batch_size, repeat=setup.repeat
        )
        return task.run(setup.device, torch.bfloat16, progress=False)

    return {f"batch {size}, {f:g}x": partial(measure, size, f) for size in batches for f in factors}


def list_training(setup: Setup) -> Measurements:
    methods = (("featup", 2),) if setup.small else (("featsharp", 2), ("featup", 2), ("jafar", 2), ("featsharp", 4))
    return {
        f"{name} {factor}x, {dtype}, {backend or 'default'}": partial(
            measure_training, setup, name, factor, dtype, backend
        )
        for backend in (None, "triton")
        for dtype in (("bfloat16",) if setup.small else ("bfloat16", "float32"))
        for name, factor in methods
    }


def measure_training(setup: Setup, name: str, factor: int, dtype: str, backend: str | None) -> Row:
    """A step of the trainer itself on views of one picture, beside the backbone passes that it makes."""
    device, config = setup.device, RunConfig()
    config.upsampler.dtype = dtype
    backbone = setup.backbone(setup.sizes[0])
    backbone.autocast_dtype = torch.bfloat16 if dtype == "bfloat16" else None
    encoder = build_encoder(backbone, name, factor).to(device)
    objective = create_objective(encoder, config.objective)
    trainer = Trainer(encoder, objective, None, config, Path(), World(0, 1, device))  # nothing is read or saved
    count = 1 if setup.small else config.views.num_views
    batch_size = 1 if setup.small else config.batch_size
    views = draw_views(objective.view_size(encoder), batch_size, count)
    step = partial(trainer.train_step, type(views)(*(x.to(device) for x in views)))
    with use_backend(backend) if backend else nullcontext():
        batches = backbone_passes(backbone, step)

        @torch.no_grad()
        def alone() -> None:
            for batch in batches:
                backbone(batch)

        timings = time_interleaved({"step": step, "backbone": alone}, device, repeat=setup.repeat)
        peak = measure_memory(step, device)
    return {
        "upsampler": name,
        "factor": factor,
        "dtype": dtype,
        "backend": backend,
        "batch_size": batch_size,
        "passes": sum(map(len, batches)),
        **{part: asdict(timing) for part, timing in timings.items()},
        "peak_bytes": peak,
    }


STAGES: dict[str, Callable[[Setup], Measurements]] = {
    "checks": list_checks,
    "kernels": list_kernels,
    "ops": list_ops,
    "encoders": list_encoders,
    "curve": list_curve,
    "training": list_training,
}
