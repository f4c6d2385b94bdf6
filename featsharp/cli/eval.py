"""Measure encoders by the tasks on which this field compares upsamplers, all with the same protocol.

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
import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featsharp.bench.measure import describe_machine
from featsharp.builder import load_from_file
from featsharp.checkpoint import read_checkpoint, restoring
from featsharp.cli.arguments import add_backbone, parse_count, parse_size
from featsharp.device import autocast_dtype, find_device
from featsharp.errors import ConfigError
from featsharp.evaluation.fidelity import FidelityTask
from featsharp.evaluation.samples import Estimate
from featsharp.evaluation.task import Journal, Subject, Task, evaluate, from_json
from featsharp.evaluation.zoom import ZoomTask
from featsharp.files import write_file
from featsharp.memory import keep_freed_memory
from featsharp.model import SharpEncoder
from featsharp.names import split_label
from featsharp.settings import setting_fields, settings_of

# Task -> where it is defined. Only the chosen one is imported; the help of them all needs their titles.
TASKS = {
    "fidelity": "featsharp.evaluation.fidelity:FidelityTask",
    "zoom": "featsharp.evaluation.zoom:ZoomTask",
    "drift": "featsharp.evaluation.drift:DriftTask",
    "correspondence": "featsharp.evaluation.correspondence.task:CorrespondenceTask",
    "cka": "featsharp.evaluation.cka:CkaTask",
    "reference": "featsharp.evaluation.reference:ReferenceTask",
    "boundaries": "featsharp.evaluation.boundaries:BoundaryTask",
    "small-objects": "featsharp.evaluation.objects:SmallObjectTask",
    "segmentation": "featsharp.evaluation.segmentation.task:SegmentationTask",
    "delta-m": "featsharp.evaluation.delta_m:DeltaMTask",
    "throughput": "featsharp.bench.throughput:ThroughputTask",
    "flops": "featsharp.bench.flops:FlopsTask",
    "recommend": "featsharp.bench.recommend:RecommendTask",
}

# What a task's setting calls the kinds of numbers that argparse has no name for.
PARSERS: dict[Any, Any] = {"count": parse_count, "size": parse_size}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    chosen = next((word for word in parser.get_default("argv") if word in TASKS), None)
    for name, place in TASKS.items():
        if chosen not in (None, name):
            tasks.add_parser(name)
            continue
        kind = _find(place)
        sub = tasks.add_parser(name, help=kind.title, description=kind.__doc__)
        if issubclass(kind, Task):
            _add_encoders(sub)
        for field in setting_fields(kind):
            _add_setting(sub, field)
        sub.add_argument("--json", type=Path, metavar="F", help="write the result there, every item included")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
        sub.add_argument(
            "--dtype",
            default="auto",
            help="autocast type of backbone passes: auto (bfloat16 where native), float32, bfloat16, float16",
        )


def run(arguments: argparse.Namespace) -> int:
    keep_freed_memory()
    if arguments.json is not None and arguments.json.is_dir():
        raise ConfigError(f"--json {arguments.json} is a folder; name a file")
    kind = _find(TASKS[arguments.task])
    task = kind(**{f.name: getattr(arguments, f.name) for f in setting_fields(kind)})
    device = find_device(arguments.device)
    dtype = autocast_dtype(arguments.dtype, device)
    path: Path | None = arguments.json
    journal, failed = Journal(), False
    content = {
        "task": task.name,
        "command": _command(arguments.argv),
        "settings": _named(settings_of(task)),
        "machine": describe_machine(device),
    }
    if isinstance(task, Task):
        subjects = find_subjects(arguments, device, dtype)
        journal = Journal(None if path is None else path.with_name(f"{path.name}.rows"))
        content["encoders"] = evaluate(task, subjects, journal=journal, report=print_result)
        failed = any("failed" in found for found in content["encoders"].values())
    else:
        extra = {}
        if getattr(task, "needs_quality", False) and task.data is not None:
            extra["quality"] = image_quality(task.data, task.limit)
        content["result"] = task.run(device, dtype, progress=True, **extra)
        print(*task.table(content["result"]), sep="\n")
    if path is not None:
        write_file(path, (json.dumps(content, indent=1) + "\n").encode())
        journal.remove()
    return int(failed)


def find_subjects(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype | None) -> list[Subject]:
    """The encoders that a command asks for, none of them loaded."""
    subjects: dict[str, Subject] = {}
    wanted = [(text, False) for text in arguments.checkpoint or []] + [(t, True) for t in arguments.upsampler or []]
    if not wanted:
        raise ConfigError("which encoders? Give --checkpoint FILE ... or --upsampler NAME-FACTORx ..., or both")
    for text, free in wanted:
        label, name = split_label(text)
        label = label or (name if free or not Path(name).is_file() else Path(name).stem)
        if label in subjects:
            raise ConfigError(f"two encoders are called {label!r}; name them: LABEL={name}")
        subjects[label] = _subject(label, name, arguments, free, device, dtype)
    return list(subjects.values())


def image_quality(images: Path, limit: int) -> Callable[[SharpEncoder], dict[str, float]]:
    """What recommends an encoder: its zoom cosine and fidelity on the first images of a folder."""

    def measure(encoder: SharpEncoder) -> dict[str, float]:
        subject = Subject("encoder", lambda: encoder)
        zoom = evaluate(ZoomTask(data=images, limit=limit), [subject], progress=False)["encoder"]["result"]
        fidelity = evaluate(FidelityTask(data=images, limit=limit), [subject], progress=False)["encoder"]["result"]
        found = {"zoom_cosine": zoom["zoom_cosine"], "fidelity": fidelity["fidelity_area"]}
        return {name: estimate["value"] for name, estimate in found.items()}

    return measure


def print_result(label: str, content: dict[str, Any]) -> None:
    """The numbers of one encoder, a line each."""
    if "failed" in content:
        print(f"{label}  failed: {content['failed']}")
        return
    print(f"{label}  ({len(content['items'])} measured, {len(content['skipped'])} skipped)")
    for name, value in content["result"].items():
        value = from_json(value)
        if isinstance(value, Estimate):
            print(f"  {name:22} {value.value:9.4f}   [{value.low:.4f}, {value.high:.4f}]")
        elif isinstance(value, int | float):
            print(f"  {name:22} {value:9.4f}")


def own_downsampler(checkpoint: str, encoder: SharpEncoder) -> nn.Module | None:
    """The downsampler that a checkpoint was trained with, in eval mode; None where there is none."""
    if not Path(checkpoint).is_file():
        return None
    content = read_checkpoint(checkpoint)
    if content["training"] is None or content["config"] is None:
        return None
    with restoring(checkpoint):
        return _own_downsampler(content, encoder)


def _own_downsampler(content: dict[str, Any], encoder: SharpEncoder) -> nn.Module | None:
    from featsharp.training.downsamplers import create_downsampler

    settings = content["config"]["objective"]
    if "downsampler" not in settings:
        return None
    gain = math.ceil(encoder.factor)
    downsampler = create_downsampler(settings["downsampler"], encoder.embed_dim, gain, settings["kernel_size"])
    prefix = "downsampler."
    state = content["training"]["objective"]
    downsampler.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return downsampler.to(encoder.device).eval()


def _find(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _add_encoders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", nargs="+", metavar="[LABEL=]FILE", help="trained files")
    parser.add_argument(
        "--upsampler", nargs="+", metavar="[LABEL=]NAME-FACTORx", help="training-free upsamplers, such as bilinear-2x"
    )
    add_backbone(parser, "default: the checkpoint's own, else vits14-focus")


def _add_setting(parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]") -> None:
    """The flag of a task's setting."""
    options = {k: v for k, v in field.metadata.items() if k != "help"}
    text = field.metadata["help"]
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(field.default, bool):
        options = {"action": argparse.BooleanOptionalAction}
    elif "type" in options:
        options["type"] = PARSERS.get(options["type"], options["type"])
    if not options.get("required") and default is not None:
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text += f"; default: {shown}"
    parser.add_argument(
        f"--{field.name.replace('_', '-')}", dest=field.name, default=field.default, help=text, **options
    )


def _subject(
    label: str, name: str, arguments: argparse.Namespace, free: bool, device: torch.device, dtype: torch.dtype | None
) -> Subject:
    backbone = arguments.backbone or ("vits14-focus" if free else None)

    def load() -> SharpEncoder:
        encoder = load_from_file(name, featurizer=backbone, allow_functions=arguments.allow_functions).to(device)
        encoder.backbone.autocast_dtype = dtype
        return encoder.eval()

    own: Callable[[SharpEncoder], nn.Module | None] = lambda encoder: own_downsampler(name, encoder)  # noqa: E731
    return Subject(label, load, load_downsampler=own)


def _command(given: Sequence[str]) -> str:
    """The command as given, but with the names of files outside of the current folder for their paths."""
    return shlex.join(["featsharp", *(_name(argument) for argument in given)])


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: _name(value) if isinstance(value, str) else value for key, value in settings.items()}


def _name(text: str) -> str:
    label, separator, place = text.rpartition("=")
    path = Path(place)
    outside = path.is_absolute() or ".." in path.parts
    return f"{label}{separator}{path.name}" if outside else text
