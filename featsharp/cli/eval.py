"""Measure a sharp encoder on images that it was not trained on.

    featsharp eval fidelity --checkpoint last.pth --images photos --json result.json
    featsharp eval fidelity --checkpoint tile-2x --backbone vits14-focus --images photos
    featsharp eval drift --checkpoint lift.pth --images photos --iterations 3

"fidelity" prints multi-view fidelity (with area pooling, and with the run's own downsampler where the checkpoint has
one), the cosine similarity of the same comparison, and the zoom cosine. "drift" prints how far features get from the
backbone's own when the upsampler is applied to its result again: cosine, norm, mean and spread after every number of
applications. Each with its 95 % interval over images.
"""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from featsharp.builder import load_from_file
from featsharp.checkpoint import read_checkpoint, restoring
from featsharp.cli.results import parse_count
from featsharp.data.files import write_file
from featsharp.evaluation.drift import DriftMeter
from featsharp.evaluation.fidelity import FidelityMeter
from featsharp.evaluation.samples import Estimate, ImageSet
from featsharp.evaluation.zoom import ZoomMeter
from featsharp.model import SharpEncoder
from featsharp.ops.device import find_device
from featsharp.ops.memory import keep_freed_memory

TASKS = ("fidelity", "drift")

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--checkpoint", required=True, help="a trained file; or NAME-FACTORx with --backbone")
    parser.add_argument("--backbone", help="name of the backbone; default: the checkpoint's own")
    parser.add_argument(
        "--allow-functions",
        action="store_true",
        help="let the checkpoint import functions that it names; runs their code",
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="held-out images: a folder or tars")
    parser.add_argument("--limit", type=parse_count, help="only the first N images")
    parser.add_argument(
        "--iterations", type=parse_count, default=3, metavar="N", help="of drift: applications; default: 3"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="also write the result there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


def run(arguments: argparse.Namespace) -> None:
    keep_freed_memory()
    encoder = load_from_file(
        arguments.checkpoint, featurizer=arguments.backbone, allow_functions=arguments.allow_functions
    ).to(find_device(arguments.device))
    images = ImageSet(arguments.images, limit=arguments.limit)
    if arguments.task == "drift":
        result = measure_drift(encoder, images, arguments.iterations)
    else:
        result = measure(encoder, images, own_downsampler(arguments.checkpoint, encoder))
    for name, estimate in result.items():
        print(f"{name:16} {estimate.value:7.4f}   [{estimate.low:.4f}, {estimate.high:.4f}]")
    if arguments.json is not None:
        write_json(arguments.json, arguments.task, arguments.checkpoint, encoder, images, result)


def measure(encoder: SharpEncoder, images: ImageSet, own: nn.Module | None = None) -> dict[str, Estimate]:
    """Fidelity and zoom cosine of one encoder: fidelity_area, fidelity_own, cosine, zoom_cosine."""
    fidelity = FidelityMeter(encoder, downsamplers={} if own is None else {"own": own})
    zoom = ZoomMeter(encoder)
    for _, image in _with_progress(images):
        fidelity.add(image)
        zoom.add(image)
    found = fidelity.result()
    cosine = found.pop("cosine")
    named = {f"fidelity_{name}": value for name, value in found.items()}
    return {**named, "cosine": cosine, "zoom_cosine": zoom.result()}


def measure_drift(encoder: SharpEncoder, images: ImageSet, iterations: int) -> dict[str, Estimate]:
    """Drift of one encoder: cosine_k, norm_k, mean_k and std_k for k from 0 to ``iterations``."""
    meter = DriftMeter(encoder, iterations=iterations)
    for _, image in _with_progress(images):
        meter.add(image)
    return meter.result()


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


def write_json(
    path: Path, task: str, checkpoint: str, encoder: SharpEncoder, images: ImageSet, result: dict[str, Estimate]
) -> None:
    """Write the result with what it was measured on and with."""
    content: dict[str, Any] = {
        "task": task,
        "checkpoint": Path(checkpoint).name,
        "backbone": encoder.backbone.name,
        "factor": encoder.factor,
        "images": Path(images.folder).name,
        "skipped": [list(entry) for entry in images.skipped],
        "result": {name: estimate._asdict() for name, estimate in result.items()},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {encoder.device.type}",
    }
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def _with_progress(items: Iterable[T]) -> Iterable[T]:
    """A progress bar where someone looks at it and tqdm, of the extra ``train``, is there."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, unit="image", file=sys.stderr, disable=None)
