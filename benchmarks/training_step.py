"""Time the parts of a training step.

    python benchmarks/training_step.py --data photos
    python benchmarks/training_step.py --data photos --output gpu.md model=dinov2-l_448px upsampler=featsharp-4x

It runs the training command itself, with timers around the functions and modules of a step. Arguments of
`featsharp.train` follow the options; without any, it trains FeatSharp 2x for vits14-focus at batch 4.
Every --case changes some of them (`--case "from disk=feature_cache.samples=8"`). The cases are run in turn, --rounds
times, so that what disturbs the machine disturbs them all. A page of Markdown is written and, beside it, its figures as
JSON. Without --output these are benchmarks/results/training-step.*, and docs/performance-training.md shows them, too.
"""

import argparse
import importlib
import json
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from featsharp.backbones.base import Backbone
from featsharp.bench.measure import describe_machine, summarize
from featsharp.configs.compose import compose
from featsharp.layers.bias_buffer import BiasBuffer
from featsharp.memory import keep_freed_memory
from featsharp.normalizers import Normalizer
from featsharp.train import train
from featsharp.training.objectives import Objective
from featsharp.training.trainer import Trainer
from featsharp.upsamplers import GuidedUpsampler, Upsampler

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "training-step.md"
PAGE = ROOT / "docs" / "performance-training.md"
TRAINED = ["+model=vits14-focus", "+upsampler=featsharp-2x", "batch_size=4"]
CASES = [
    "float32=model.dtype=float32 upsampler.dtype=float32",
    "bfloat16 backbone=model.dtype=bfloat16 upsampler.dtype=float32",
    "bfloat16=model.dtype=bfloat16 upsampler.dtype=bfloat16",
]
# No logs, validation or checkpoints, and short fits: none of that is part of a step.
SHORT = [
    *("log_frequency=0", "val_frequency=0", "checkpoint_frequency=0", "viz.type=none", "viz.num_images=1"),
    *("normalizer.num_samples=8", "normalizer.batch_size=4", "normalizer.cache=false", "progress=false"),
]
WARM_UP = 2  # steps that are not counted: memory is allocated, kernels are chosen, a feature cache is filled

VIEWS, TILES = "backbone, jittered views", "backbone, image and tiles"
WAIT, REST = "wait for data", "everything else"
# In the order of a step; tables leave out parts that a run does not have.
PARTS = (
    *(WAIT, "views rendered", VIEWS, TILES, "normalizer, bias buffer", "upsampler, forward"),
    *("downsampler, warps, losses, forward", "losses, backward to the map", "upsampler, backward"),
    *("gradients averaged over processes", "optimiser", REST),
)

EXPLANATION = """Medians in milliseconds, and as parts of the step. Decoding happens in a worker beside the step, on the
same cores; only the wait for it is part of the step.
"""


class Case(NamedTuple):
    """Settings to be compared with others."""

    label: str
    overrides: list[str]


class PartClock:
    """Seconds of each part of each step. A part that runs within another one does not count for that one, too.

    Args:
        now: Returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.steps: list[dict[str, float]] = []
        self._running: list[str] = []
        self._since = 0.0

    def begin(self, part: str) -> None:
        """Count time for ``part`` from now on; the outermost part begins a step."""
        if not self._running:
            self.steps.append(defaultdict(float))
            _wait_for_device()
            self._since = self._now()
        else:
            self._charge()
        self._running.append(part)

    def end(self) -> None:
        """Count time for the enclosing part from now on."""
        self._charge()
        self._running.pop()

    @property
    def within(self) -> list[str]:
        """The parts that run, outermost first; empty outside of a step."""
        return self._running

    def _charge(self) -> None:
        _wait_for_device()
        now = self._now()
        self.steps[-1][self._running[-1]] += now - self._since
        self._since = now


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def timers(clock: PartClock) -> Iterator[None]:
    """Time every step of every trainer by parts within this context."""

    def module_part(module: nn.Module) -> str | None:
        if isinstance(module, Backbone):
            return TILES if "upsampler, forward" in clock.within else VIEWS
        kinds = {
            Normalizer: "normalizer, bias buffer",
            BiasBuffer: "normalizer, bias buffer",
            Upsampler: "upsampler, forward",
            Objective: "downsampler, warps, losses, forward",
        }
        return next((part for kind, part in kinds.items() if isinstance(module, kind)), None)

    def before(module: nn.Module, _: object) -> None:
        if clock.within and (part := module_part(module)):
            clock.begin(part)

    def after(module: nn.Module, *_: object) -> None:
        if clock.within and module_part(module):
            clock.end()

    def backward_part(start: torch.Tensor) -> str:
        # Losses are differentiated down to the map first, then the map through the upsampler.
        return "losses, backward to the map" if start.ndim == 0 else "upsampler, backward"

    trainer, multi_view = (
        importlib.import_module(f"featsharp.training.{name}") for name in ("trainer", "objectives.multi_view")
    )
    functions: list[tuple[Any, str, Callable[..., str]]] = [
        (Trainer, "train_step", lambda *_: REST),
        (GuidedUpsampler, "upsample", lambda *_: "upsampler, forward"),
        (multi_view, "render_views", lambda *_: "views rendered"),
        (torch.Tensor, "backward", lambda start, *_: backward_part(start)),
        (trainer, "average_gradients", lambda *_: "gradients averaged over processes"),
        (trainer, "optimizer_step", lambda *_: "optimiser"),
    ]
    with ExitStack() as undo:
        undo.callback(register_module_forward_pre_hook(before).remove)
        undo.callback(register_module_forward_hook(after).remove)
        for owner, name, part_of in functions:
            original = getattr(owner, name)
            setattr(owner, name, _timed(original, part_of, clock, starts_step=name == "train_step"))
            undo.callback(setattr, owner, name, original)
        yield


def _timed(
    function: Callable[..., Any], part_of: Callable[..., str], clock: PartClock, *, starts_step: bool
) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        if not (clock.within or starts_step):
            return function(*arguments, **options)
        clock.begin(part_of(*arguments))
        try:
            return function(*arguments, **options)
        finally:
            clock.end()

    return timed


def run_steps(overrides: list[str], now: Callable[[], float]) -> tuple[list[dict[str, float]], Trainer]:
    """Train a few steps; returns the milliseconds of each part of the counted steps, and the trainer."""
    clock = PartClock(now)
    with timers(clock):
        trainer = train(compose(overrides))
    steps = [
        {WAIT: 1000 * wait, **{part: 1000 * seconds for part, seconds in step.items()}}
        for step, wait in zip(clock.steps, trainer.clock.waits, strict=True)
    ]
    return steps[WARM_UP:], trainer


def decode_milliseconds(trainer: Trainer) -> float:
    """Milliseconds to read, decode and cut a batch in one process: median of a few."""
    times = []
    for first in range(0, 5 * trainer.config.batch_size, trainer.config.batch_size):
        start = time.perf_counter()
        for n in range(first, first + trainer.config.batch_size):
            trainer.dataset[n]
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def summarise(case: Case, steps: list[dict[str, float]], decode: float) -> dict[str, Any]:
    """Medians and shares of a case. Shares are medians over the steps, too, so they need not add up to one."""
    totals = [sum(step.values()) for step in steps]

    def over(parts: tuple[str, ...]) -> list[float]:
        return [sum(step.get(part, 0.0) for part in parts) for step in steps]

    def share(parts: tuple[str, ...]) -> float:
        return median(time / total for time, total in zip(over(parts), totals, strict=True))

    return {
        "label": case.label,
        "overrides": case.overrides,
        "step": asdict(summarize(totals)),
        "parts": {
            part: {"milliseconds": median(over((part,))), "share": share((part,))}
            for part in PARTS
            if any(over((part,)))
        },
        "backbone_share": share((VIEWS, TILES)),
        "wait_share": share((WAIT,)),
        "decode_milliseconds": decode,
    }


def measure(
    cases: list[Case], overrides: list[str], steps: int, rounds: int, now: Callable[[], float]
) -> list[dict[str, Any]]:
    """Run all cases in turn, ``rounds`` times; returns one summary each."""
    counted: dict[str, list[dict[str, float]]] = defaultdict(list)
    decode: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                length = [f"num_training_steps={WARM_UP + steps}", f"output_root={folder}"]
                timed, trainer = run_steps([*TRAINED, *SHORT, *overrides, *case.overrides, *length], now)
            counted[case.label] += timed
            decode[case.label].append(decode_milliseconds(trainer))
            total = median(sum(step.values()) for step in timed)
            print(f"{case.label}: {total:.0f} ms a step", file=sys.stderr, flush=True)
    return [summarise(case, counted[case.label], median(decode[case.label])) for case in cases]


def report(content: Mapping[str, Any]) -> str:
    """Render a table of all cases with their settings and the machine, in Markdown."""
    cases, machine = content["cases"], content["machine"]
    cores = f"{machine['cores']} cores, {machine['threads']} threads"
    lines = [
        *table(cases),
        "",
        *(f"- {case['label']}: `{' '.join(case['overrides']) or 'nothing changed'}`" for case in cases),
        "",
        f"Command: `{content['command']}`",
        "",
        f"Trained: `{' '.join(content['overrides'])}`",
        "",
        f"Machine: {machine['processor']}, {cores}, {machine['device']}; "
        f"bfloat16 by {' and '.join(content['bfloat16']) or 'nothing'}. "
        f"Python {machine['python']}, torch {machine['torch']}, featsharp {machine['featsharp']}.",
        "",
    ]
    return "\n".join(lines)


def fill(page: str, content: Mapping[str, Any]) -> str:
    """Return the page with the report between its marks."""
    before, _, rest = page.partition("<!-- measured -->\n")
    return f"{before}<!-- measured -->\n{report(content)}<!-- end -->{rest.partition('<!-- end -->')[2]}"


def table(cases: list[dict[str, Any]]) -> list[str]:
    """Markdown table with parts as rows and cases as columns."""

    def cell(case: dict[str, Any], part: str) -> str:
        time = case["parts"].get(part)
        return "" if time is None else f"{time['milliseconds']:,.0f} ({time['share']:.1%})"

    def row(name: str, cells: list[str]) -> str:
        return f"| {' | '.join([name, *cells])} |"

    def steps(case: dict[str, Any]) -> str:
        time = case["step"]
        return f"{time['median']:,.0f} ({time['low']:,.0f} to {time['high']:,.0f})"

    shown = [part for part in PARTS if any(part in case["parts"] for case in cases)]
    return [
        row("", [case["label"] for case in cases]),
        row("---", ["---"] * len(cases)),
        *(row(part, [cell(case, part) for case in cases]) for part in shown),
        row("**step (quartiles)**", [steps(case) for case in cases]),
        row("**all but the backbone**", [f"{1 - case['backbone_share']:.1%}" for case in cases]),
        row("faster than the first", [f"{cases[0]['step']['median'] / case['step']['median']:.2f}x" for case in cases]),
        row("beside it: a batch decoded", [f"{case['decode_milliseconds']:,.0f}" for case in cases]),
        row("steps", [str(case["step"]["runs"]) for case in cases]),
    ]


def bfloat16_hardware(device: str) -> list[str]:
    """Name the hardware that multiplies bfloat16 here, as far as the system knows."""
    if torch.device(device).type == "cuda":
        return ["tensor cores"] if torch.cuda.is_bf16_supported(including_emulation=False) else []
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        flags = []
    return [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]


def make_photos(folder: Path) -> Path:
    """Pictures of smooth colours of 640 x 480 pixels; their content affects the decoding time only."""
    folder.mkdir()
    for number in range(8):
        coarse = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    return folder


def case_of(text: str) -> Case:
    """``LABEL=OVERRIDES``."""
    label, _, overrides = text.partition("=")
    return Case(label, shlex.split(overrides))


def main(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of photographs (default: a few that are made here)")
    parser.add_argument("--case", action="append", metavar="LABEL=OVERRIDES", help="may be given several times")
    parser.add_argument("--steps", type=int, default=4, help=f"of a run, after {WARM_UP} that are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="not time on the clock (but for the wait for data): for a machine that others use, too; with --threads 1",
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments, overrides = parser.parse_known_args(given)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    now = time.process_time if arguments.processor_time else time.perf_counter
    cases = [case_of(text) for text in arguments.case or CASES]
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or make_photos(Path(folder) / "photos")
        summaries = measure(cases, [f"train_data_dir={data}", *overrides], arguments.steps, arguments.rounds, now)
    # Do not publish the path of the photographs.
    shown = [Path(word).name if word == arguments.data else word for word in given]
    device = "cuda" if torch.cuda.is_available() and "device=cpu" not in overrides else "cpu"
    content = {
        "command": shlex.join(["python", "benchmarks/training_step.py", *shown]),
        "overrides": [*TRAINED, *overrides],
        "machine": describe_machine(torch.device(device)),
        "bfloat16": bfloat16_hardware(device),
        "cases": summaries,
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    arguments.output.write_text(f"# A training step\n\n{EXPLANATION}\n{report(content)}")
    if arguments.output == RESULT:
        PAGE.write_text(fill(PAGE.read_text(), content))
    print("\n".join(table(summaries)))


if __name__ == "__main__":
    main(sys.argv[1:])
