"""Compare two checkouts in one run: encoding against its backbone passes, and the start of commands.

    git worktree add ../before 3d8a0b0
    python benchmarks/walltime.py --before ../before --after . --repeat 9

Every figure is measured in new processes, before and after in turn, so that load on the machine affects both.
Writes benchmarks/results/walltime.json and walltime.md: medians with quartiles. Run it while the machine does nothing
else.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from checkout import commit
from PIL import Image

from featsharp.bench.measure import describe_machine, summarize
from featsharp.files import write_file

RESULTS = Path(__file__).resolve().parent / "results"

# Uses documented names only, which old checkouts have. Prints milliseconds of an encoding and of its backbone passes
# alone, medians of interleaved runs.
ENCODE = """
import json, statistics, sys, time
import torch
from featsharp import create_encoder, load_from_file
name, factor = sys.argv[1], int(sys.argv[2])
encoder = load_from_file(name) if "/" in name else create_encoder("vits14-focus", name, factor)
images = torch.randn(1, 3, *encoder.input_size)
batches = []
hook = encoder.backbone.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0]))
with torch.no_grad():
    encoder(images)
    hook.remove()
    def passes():
        for batch in batches:
            encoder.backbone(batch)
    times = {"encode": [], "passes": []}
    for turn in range(int(sys.argv[3])):
        for key, call in (("encode", lambda: encoder(images)), ("passes", passes)):
            start = time.perf_counter()
            call()
            times[key].append(1000 * (time.perf_counter() - start))
print(json.dumps({key: statistics.median(values[1:]) for key, values in times.items()}))
"""
ENCODERS = {
    "shipped weights, 2x": ("vits14-focus/featsharp-2x", "2"),
    "featsharp untrained, 4x": ("featsharp", "4"),
}
SHIPPED = ("--checkpoint", "vits14-focus/featsharp-2x")
RUNS_OF_AN_ENCODER = 4  # in one process; the first is not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="a checkout")
    parser.add_argument("--after", type=Path, required=True, metavar="DIR", help="another one")
    parser.add_argument("--repeat", type=int, default=9, help="processes of each figure, at least 2; default: 9")
    parser.add_argument("--output", type=Path, default=RESULTS / "walltime", metavar="FILE", help="without its suffix")
    arguments = parser.parse_args()
    sides = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    samples: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.png"
        Image.effect_noise((448, 448), 60).convert("RGB").save(photo)
        for turn in range(arguments.repeat):
            for side in list(sides) if turn % 2 == 0 else reversed(sides):
                print(f"turn {turn + 1} of {arguments.repeat}, {side}", flush=True)
                for name, value in measure(sides[side], photo, Path(folder) / "features").items():
                    samples.setdefault(name, {"before": [], "after": []})[side].append(value)
    content = {
        "command": shlex.join(["python", "benchmarks/walltime.py", "--before", "BEFORE", "--after", "AFTER",
                               "--repeat", str(arguments.repeat)]),
        "machine": describe_machine(torch.device("cpu")),
        "commits": {side: commit(checkout) for side, checkout in sides.items()},
        "figures": {
            name: {side: asdict(summarize(values)) for side, values in both.items()} for name, both in samples.items()
        },
    }  # fmt: skip
    write_file(arguments.output.with_suffix(".json"), (json.dumps(content, indent=1) + "\n").encode())
    write_file(arguments.output.with_suffix(".md"), page(content).encode())
    print(page(content))


def measure(checkout: Path, photo: Path, features: Path) -> dict[str, float]:
    """Measure every figure of a checkout once, by the name of its row."""
    figures: dict[str, float] = {}
    for label, (name, factor) in ENCODERS.items():
        times = json.loads(run(checkout, "-c", ENCODE, name, factor, str(RUNS_OF_AN_ENCODER))[0])
        figures[f"{label}: encoding (ms)"] = times["encode"]
        figures[f"{label}: encoding over its backbone passes"] = times["encode"] / times["passes"]
    upsample = ("-m", "featsharp.cli.main", "upsample")
    for label, command in (
        ("featsharp upsample, one picture", (*upsample, str(photo), *SHIPPED, "-o", str(features))),
        ("featsharp --help", ("-m", "featsharp.cli.main", "--help")),
        ("featsharp upsample --help", (*upsample, "--help")),
    ):
        _, wall, cpu = run(checkout, *command)
        figures[f"{label}: wall (s)"], figures[f"{label}: CPU (s)"] = wall, cpu
    return figures


def run(checkout: Path, *arguments: str) -> tuple[str, float, float]:
    """Run Python on a checkout; returns its output, wall seconds, and CPU seconds of the process and its children."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise SystemExit(f"{shlex.join(arguments[:4])} in {checkout} failed:\n{done.stderr}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, wall, cpu


def page(content: dict[str, Any]) -> str:
    """The figures as a table in Markdown."""
    machine, commits = content["machine"], content["commits"]
    runs = next(iter(content["figures"].values()))["before"]["runs"]
    lines = [
        "# Before and after",
        "",
        f"`{content['command']}`: medians (quartiles) of {runs} processes each, in turn. {machine['processor']}, "
        f"{machine['cores']} cores, {machine['threads']} threads, Python {machine['python']}, torch "
        f"{machine['torch']}. Before: {commits['before'][:7]}, after: {commits['after'][:7]}.",
        "",
        "| | before | after | after / before |",
        "|---|---|---|---|",
    ]
    for name, both in content["figures"].items():
        texts = [f"{t['median']:.4g} ({t['low']:.4g} to {t['high']:.4g})" for t in (both["before"], both["after"])]
        lines.append(f"| {name} | {texts[0]} | {texts[1]} | {both['after']['median'] / both['before']['median']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
