"""The Triton kernels of local attention: on a GPU where there is one, otherwise under Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and others may import it before: the kernels run in a process of
their own, which runs this file again.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from gpu_checks import kernel_checks

from featsharp.errors import ConfigError
from featsharp.ops.backends import choose_backend, list_backends
from featsharp.ops.local_attention import OP, Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHECKS = kernel_checks(DEVICE)[OP]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA device; test_under_the_interpreter runs it in another process"
)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run in this process")
@pytest.mark.timeout(600)
def test_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


@runs_kernels
@pytest.mark.parametrize("name", CHECKS)
def test_kernels_agree_with_the_reference(name):
    CHECKS[name]()


def test_every_kernel_has_checks():
    triton = {backend.op for backend in list_backends() if backend.name == "triton"}
    assert kernel_checks(DEVICE).keys() == triton


@pytest.mark.skipif(INTERPRETED, reason="about processes without the interpreter")
@needs_triton
def test_the_choice_of_a_backend_gives_reasons():
    on_cpu = Problem("cpu", (torch.float32,) * 3)
    assert choose_backend(OP, on_cpu).name == "blocked"
    with pytest.raises(ConfigError, match="'triton' of local_attention needs a CUDA device; got cpu"):
        choose_backend(OP, on_cpu, "triton")
    double = Problem("cuda", (torch.float64,) * 3)
    assert choose_backend(OP, double).name == "blocked"
    single = Problem("cuda", (torch.float32,) * 3)
    assert choose_backend(OP, single).name == "blocked"
    assert choose_backend(OP, single, "triton").name == "triton"
    with pytest.raises(ConfigError, match="unknown backend of local_attention 'block'; did you mean 'blocked'"):
        choose_backend(OP, on_cpu, "block")
