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

from featsharp.errors import ConfigError
from featsharp.ops.backends import choose_backend
from featsharp.ops.local_attention import OP, Problem, local_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

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


def inputs(size, factor, heads, value_heads, window, value_dim=20, dtype=torch.float32):
    height, width = size
    tensors = (
        torch.randn(2, factor * height, factor * width, heads, 5),
        torch.randn(2, height, width, heads, 5),
        torch.randn(2, height, width, value_heads, value_dim),
        torch.randn(heads, window, window),
    )
    return [t.to(DEVICE, dtype).requires_grad_() for t in tensors]


def run(tensors, backend, **options):
    *maps, bias = tensors
    out = local_attention(*maps, window=bias.shape[1], bias=bias, scale=0.7, backend=backend, **options)
    cotangent = torch.sin(torch.arange(out.numel(), device=DEVICE)).view_as(out).to(out.dtype)
    return out, *torch.autograd.grad(out, tensors, cotangent)


# (height, width), queries per key, heads, heads of the value, window, border
CASES = [
    ((2, 3), 1, 2, 2, 7, "clip"),
    ((9, 11), 1, 2, 2, 3, "clip"),
    ((1, 1), 1, 1, 1, 3, "reflect"),
    ((10, 3), 1, 1, 1, 7, "reflect"),
    ((3, 9), 2, 2, 1, 5, "zeros"),
    ((4, 3), 3, 2, 2, 3, "replicate"),
    ((2, 1), 16, 1, 1, 3, "clip"),
    ((5, 9), 1, 1, 1, 1, "zeros"),
]


@runs_kernels
@pytest.mark.parametrize(("size", "factor", "heads", "value_heads", "window", "border"), CASES)
def test_kernels_agree_with_the_reference(size, factor, heads, value_heads, window, border):
    tensors = inputs(size, factor, heads, value_heads, window)
    expected = run(tensors, "reference", border=border)
    torch.testing.assert_close(run(tensors, "triton", border=border), expected, atol=2e-5, rtol=1e-4)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    tensors = inputs((5, 9), 1, 2, 2, 3, dtype=dtype)
    expected = run([t.detach().double().requires_grad_() for t in tensors], "reference")
    found = run(tensors, "triton")
    assert all(x.dtype == dtype for x in found)
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close([x.double() for x in found], list(expected), atol=tolerance, rtol=tolerance)


@runs_kernels
def test_strided_inputs_and_huge_logits():
    qkv = torch.randn(1, 6, 9, 3, 2, 8, device=DEVICE)
    query, key, value = qkv.unbind(3)
    for scale in (1.0, 1e4):
        options = {"window": 3, "scale": scale}
        expected = local_attention(query, key, value, backend="reference", **options)
        found = local_attention(query, key, value, backend="triton", **options)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


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
