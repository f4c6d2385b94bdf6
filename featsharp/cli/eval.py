"""Measure encoders by the tasks on which this field compares upsamplers, all with the same protocol.

    featsharp eval all --data DATA --upsampler bilinear-2x tile-2x --json all.json
    featsharp eval fidelity --data photos --checkpoint last.pth --upsampler bilinear-2x tile-2x --json result.json
    featsharp eval segmentation --data camvid --checkpoint sharp=last.pth --upsampler tile-2x --json camvid.json
    featsharp eval TASK --help

Encoders are checkpoints, shipped weights, and training-free upsamplers NAME-FACTORx on --backbone; LABEL=... gives one
another name in the results. With --json an evaluation that was stopped goes on when the same command is given again.
What cannot be measured (a damaged file, a label out of range) is skipped, reported and counted.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from featsharp.cli.arguments import (
    DEFAULT_BACKBONE,
    add_backbone,
    add_device,
    add_encoders,
    check_result,
    parse_count,
    parse_size,
)
from featsharp.errors import ConfigError
from featsharp.names import label_encoders
from featsharp.settings import setting_fields, settings_of
from featsharp.terminal import say

if TYPE_CHECKING:
    import torch
    from torch import nn

    from featsharp.evaluation.runner import Subject
    from featsharp.model import SharpEncoder


class TaskEntry(NamedTuple):
    """A line of :data:`TASKS`: the module and class of a task, and its line in the help."""

    path: str
    line: str

    def load(self) -> Any:
        """Import the class of the task."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)


# Only the chosen task is imported, and only to run it. One with encoders is a featsharp.evaluation.runner.Task, others
# are a featsharp.settings.PlainTask.
TASKS = {
    "all": TaskEntry(
        "featsharp.evaluation.measures:AllTask", "a table of the measures below, by quick protocols, in minutes"
    ),
    "pareto": TaskEntry(
        "featsharp.evaluation.pareto:ParetoTask",
        "these measures against passes and seconds, for all that needs no training",
    ),
    "fidelity": TaskEntry(
        "featsharp.evaluation.fidelity:FidelityTask", "does the sharp map agree with the features of other views?"
    ),
    "zoom": TaskEntry("featsharp.evaluation.zoom:ZoomTask", "do sharp features agree with those of a closer look?"),
    "drift": TaskEntry(
        "featsharp.evaluation.drift:DriftTask", "how far do features get when upsampling is applied to its own result?"
    ),
    "correspondence": TaskEntry(
        "featsharp.evaluation.correspondence:CorrespondenceTask",
        "does a keypoint find the same part of another object?",
    ),
    "room": TaskEntry(
        "featsharp.evaluation.room:RoomTask", "does a point of a room find itself in another view, by depth and pose?"
    ),
    "depth": TaskEntry("featsharp.evaluation.depth:DepthTask", "how much do sharp features help a linear depth head?"),
    "video": TaskEntry(
        "featsharp.evaluation.video:VideoTask", "do objects of a video stay with their pixels, by the features alone?"
    ),
    "flicker": TaskEntry(
        "featsharp.evaluation.flicker:FlickerTask", "do the features of a video change where the video does not?"
    ),
    "cka": TaskEntry("featsharp.evaluation.cka:CkaTask", "are the features of an image alike at every size?"),
    "reference": TaskEntry(
        "featsharp.evaluation.reference:ReferenceTask",
        "how near are the sharp features to a real run of the backbone on the large image?",
    ),
    "boundaries": TaskEntry(
        "featsharp.evaluation.boundaries:BoundaryTask", "do the features change where people draw boundaries?"
    ),
    "small-objects": TaskEntry(
        "featsharp.evaluation.small_objects:SmallObjectTask",
        "can objects be named from the features inside their outline, small ones too?",
    ),
    "discovery": TaskEntry(
        "featsharp.evaluation.discovery:DiscoveryTask", "do features alone set an object apart (TokenCut, LOST)?"
    ),
    "cam": TaskEntry("featsharp.evaluation.cam:CamTask", "do class activation maps lie on what decides the class?"),
    "segmentation": TaskEntry(
        "featsharp.evaluation.segmentation:SegmentationTask",
        "how much do sharp features help a linear segmentation head?",
    ),
    "protocol": TaskEntry(
        "featsharp.evaluation.shared_protocol:ProtocolTask",
        "the protocol that JAFAR, AnyUp, NAF and UPLiFT share, on the data sets of their tables",
    ),
    "detection": TaskEntry(
        "featsharp.evaluation.detection:DetectionTask",
        "how much do sharp features help a detector, for small objects above all?",
    ),
    "neighbours": TaskEntry(
        "featsharp.evaluation.neighbours:NeighboursTask",
        "do whole pictures find those of their class: classification and retrieval",
    ),
    "tables": TaskEntry("featsharp.evaluation.tables:TablesTask", "tables of the papers with our results beside them"),
    "delta-m": TaskEntry(
        "featsharp.evaluation.delta_m:DeltaMTask", "how much does a candidate change a table of unlike benchmarks?"
    ),
    "throughput": TaskEntry(
        "featsharp.bench.throughput:ThroughputTask",
        "time per image and per token by factor: larger images, tiles, upsamplers",
    ),
    "flops": TaskEntry(
        "featsharp.bench.flops:FlopsTask", "floating-point operations of backbone and upsampler by factor"
    ),
    "recommend": TaskEntry(
        "featsharp.bench.recommend:RecommendTask",
        "which upsampler for this backbone, size and memory, as measured here",
    ),
}

# Parsers of the types of settings by their names.
PARSERS: dict[str, Callable[[str], Any]] = {
    "count": parse_count,
    "size": parse_size,
    **{kind.__name__: kind for kind in (Path, int, float)},
}

# Flags are the settings of the tasks' classes, which import torch; the parser reads them from this file instead.
FLAGS = Path(__file__).with_name("eval_flags.json")
STALE = f"the settings of the tasks have changed since {FLAGS.name} was made; run: python -m featsharp.cli.eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    chosen = next((word for word in parser.get_default("argv") if word in TASKS), None)
    for name, entry in TASKS.items():
        sub = tasks.add_parser(name, help=entry.line)
        if name != chosen:
            continue
        flags = read_flags()
        assert name in flags, STALE
        task = flags[name]
        sub.description = task["description"]
        if task["encoders"]:
            _add_encoders(sub)
        for flag in task["flags"]:
            _add_flag(sub, **flag)
        sub.add_argument("--json", type=Path, metavar="F", help="write the result there, every item included")
        add_device(sub)
        sub.add_argument(
            "--dtype",
            default="auto",
            help="autocast type of backbone passes: auto (bfloat16 where native), float32, bfloat16, float16",
        )


def run(arguments: argparse.Namespace) -> int:
    path: Path | None = arguments.json
    if path is not None:
        check_result(path)
    from featsharp.bench.measure import describe_machine
    from featsharp.device import autocast_dtype, find_device
    from featsharp.evaluation.runner import Task, evaluate_to_file, format_result, write_result
    from featsharp.memory import keep_freed_memory

    keep_freed_memory()
    kind = TASKS[arguments.task].load()
    settings = [field.name for field in setting_fields(kind)]
    assert all(name in arguments for name in settings), STALE
    task = kind(**{name: getattr(arguments, name) for name in settings})
    device = find_device(arguments.device)
    dtype = autocast_dtype(arguments.dtype, device)
    about = {
        "command": _command(arguments.argv),
        "settings": {key: _name_paths(value) for key, value in settings_of(task).items()},
        "machine": describe_machine(device),
    }
    if isinstance(task, Task):
        subjects = find_subjects(arguments, device, dtype)
        report = lambda label, content: say(*format_result(label, content))  # noqa: E731
        content = evaluate_to_file(task, subjects, path, about, report=report)
        say(*task.table(content["encoders"]))
        return int(any("failed" in encoder for encoder in content["encoders"].values()))
    quality = None if task.quality_images is None else image_quality(*task.quality_images)
    result = task.run(device, dtype, progress=True, quality=quality)
    say(*task.table(result))
    if path is not None:
        write_result(path, {"task": task.name, **about, "result": result})
    return 0


def read_flags() -> dict[str, Any]:
    """Read the flags of all tasks, see :func:`collect_flags`, without importing the tasks."""
    content: dict[str, Any] = json.loads(FLAGS.read_text(encoding="utf-8"))
    return content


def collect_flags() -> dict[str, Any]:
    """Collect the description of every task, whether it is given encoders, and its settings as flags."""
    from featsharp.evaluation.runner import Task

    kinds = {name: entry.load() for name, entry in TASKS.items()}
    return {
        name: {
            "description": inspect.getdoc(kind),
            "encoders": issubclass(kind, Task),
            "flags": [_describe_flag(field) for field in setting_fields(kind)],
        }
        for name, kind in kinds.items()
    }


def find_subjects(
    arguments: argparse.Namespace, device: "torch.device", dtype: "torch.dtype | None"
) -> "list[Subject]":
    """List the encoders of a command, without loading them."""
    wanted = [(text, False) for text in arguments.checkpoint or []] + [(t, True) for t in arguments.upsampler or []]
    if not wanted and arguments.task == "pareto":
        from featsharp.bench.workloads import list_ready

        wanted = [(name, True) for name in list_ready(arguments.backbone or DEFAULT_BACKBONE)]
    if not wanted:
        raise ConfigError("which encoders? Give --checkpoint FILE ... or --upsampler NAME-FACTORx ..., or both")
    labelled = label_encoders([text for text, _ in wanted]).items()
    return [
        _subject(label, name, arguments, free, device, dtype)
        for (label, name), (_, free) in zip(labelled, wanted, strict=True)
    ]


def image_quality(images: Path, limit: int) -> "Callable[[SharpEncoder], dict[str, float]]":
    """Make a measure of encoders for a recommendation: zoom cosine and fidelity on some images of a folder."""
    from featsharp.evaluation.measures import PhotoTask
    from featsharp.evaluation.runner import Subject, evaluate

    def measure(encoder: "SharpEncoder") -> dict[str, float]:
        task = PhotoTask(data=images, limit=limit)
        result = evaluate(task, [Subject("encoder", lambda: encoder)], progress=False)["encoder"]["result"]
        return {name: float(result[name]["value"]) for name in ("zoom_cosine", "fidelity")}

    return measure


def load_downsampler(checkpoint: str, encoder: "SharpEncoder") -> "nn.Module | None":
    """Load the downsampler that a checkpoint was trained with, in eval mode; None where there is none."""
    from featsharp.checkpoint import read_checkpoint, restoring
    from featsharp.training.downsamplers import create_downsampler

    if not Path(checkpoint).is_file():
        return None
    content = read_checkpoint(checkpoint)
    if content["training"] is None or content["config"] is None:
        return None
    with restoring(checkpoint):
        settings = content["config"]["objective"]
        if "downsampler" not in settings:
            return None
        factor = math.ceil(encoder.factor)
        downsampler = create_downsampler(settings["downsampler"], encoder.embed_dim, factor, settings["kernel_size"])
        prefix = "downsampler."
        state = content["training"]["objective"]
        downsampler.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        return downsampler.to(encoder.device).eval()


def _add_encoders(parser: argparse.ArgumentParser) -> None:
    add_encoders(parser)
    add_backbone(parser, "default: the checkpoint's own, else vits14-focus")


def _describe_flag(field: "dataclasses.Field[Any]") -> dict[str, Any]:
    """Describe the flag of a task's setting by values of JSON."""
    flag = {"name": field.name, **field.metadata}
    if not flag.get("required"):  # a default is only there since fields follow others that have one
        flag["default"] = field.default
    if isinstance(flag.get("type"), type):
        flag["type"] = flag["type"].__name__
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flag.items()}


def _add_flag(parser: argparse.ArgumentParser, name: str, help: str, default: Any = None, **options: Any) -> None:
    if isinstance(default, bool):
        options["action"] = argparse.BooleanOptionalAction
    elif "type" in options:
        options["type"] = PARSERS[options["type"]]
    if default is not None:
        help += f"; default: {' '.join(map(str, default)) if isinstance(default, list) else default}"
    flag = name.rstrip("_").replace("_", "-")  # "table_" is the flag of a task that has a method "table"
    parser.add_argument(f"--{flag}", dest=name, default=default, help=help, **options)


def _subject(
    label: str,
    name: str,
    arguments: argparse.Namespace,
    free: bool,
    device: "torch.device",
    dtype: "torch.dtype | None",
) -> "Subject":
    from featsharp.bench.encode import measure_cost
    from featsharp.evaluation.runner import Subject
    from featsharp.implicit import load_encoder

    backbone = arguments.backbone or (DEFAULT_BACKBONE if free else None)

    def load() -> "SharpEncoder":
        encoder = load_encoder(name, featurizer=backbone, allow_functions=arguments.allow_functions).to(device)
        encoder.backbone.autocast_dtype = dtype
        return encoder.eval()

    return Subject(
        label, load, load_downsampler=lambda encoder: load_downsampler(name, encoder), measure_cost=measure_cost
    )


def _command(given: Sequence[str]) -> str:
    """Format the command, with names instead of paths for files outside of the current folder."""
    return shlex.join(["featsharp", *(_name(argument) for argument in given)])


def _name_paths(value: Any) -> Any:
    """Shorten paths in a setting, as in the command."""
    if isinstance(value, list):
        return [_name_paths(v) for v in value]
    return _name(value) if isinstance(value, str) else value


def _name(text: str) -> str:
    label, separator, rest = text.rpartition("=")
    path = Path(rest)
    outside = path.is_absolute() or ".." in path.parts
    return f"{label}{separator}{path.name}" if outside else text


if __name__ == "__main__":
    FLAGS.write_text(json.dumps(collect_flags(), indent=1) + "\n", encoding="utf-8")
