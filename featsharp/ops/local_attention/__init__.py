"""Attention of every query over the small window of keys around it: the operation that JBU and FeatSharp share.

    out[q] = sum_p softmax_p( scale * <query[q], key[c + p]> + bias[p] ) * value[c + p]

with c = q // f the key cell of the query and p in a K x K window. JBU is the case of tied query and key, one head, a
Gaussian bias and a mirrored border (FeatUp, arXiv 2403.10516; its exp-product form equals this softmax). FeatSharp has
16 heads, a distance bias and clipped windows (arXiv 2502.16025). SAPA has queries finer than keys, and zeros beyond the
border (arXiv 2209.12866). A value of one head under a query of several gets their mean weights, as in JAFAR.

Shapes: B batch, H x W keys, f queries per key cell and axis, N heads, D and E channels per head, K window.
"""

import importlib.util
import os
from typing import Any, List  # noqa: UP035 (the schema of an operator in torch 2.4 knows no list[bool])

import torch
from torch import Tensor

from featsharp.errors import InputError
from featsharp.memory import register_scratch
from featsharp.ops.backends import Backend, Problem, choose_backend, register_backends, wanted_backend
from featsharp.ops.local_attention import reference
from featsharp.ops.recording import is_recording
from featsharp.ops.windows import Border, check_window

OP = "local_attention"


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    border: Border = "clip",
    backend: str | None = None,
) -> Tensor:
    """Attend from every query to the ``window x window`` keys around it.

    Args:
        query: [B, f*H, f*W, N, D], f >= 1 whole.
        key: [B, H, W, N, D].
        value: [B, H, W, N, E], or [B, H, W, 1, E]: then the heads' weights are averaged.
        window: K, odd.
        bias: [N, K, K], added to the scaled scores; entry (i, j) belongs to the key at offset (i - K//2, j - K//2).
        scale: Factor on the scores, a number or a tensor of one element (it may need a gradient).
        border: Values beyond the edge of the map; see :data:`featsharp.ops.windows.Border`.
        backend: Name of an implementation (``featsharp doctor`` lists them); None: the fastest that can run.

    Returns:
        [B, f*H, f*W, N or 1, E] in the dtype of ``value``. Scores and softmax are float32 (float64 for float64 values).

    Raises:
        InputError: When shapes do not fit together.
        ConfigError: For an even window, an unknown border, or a backend that is unknown or cannot run.

    Example:
        >>> x = torch.randn(1, 5, 7, 2, 4)
        >>> local_attention(x, x, torch.ones(1, 5, 7, 2, 3), window=3).shape
        torch.Size([1, 5, 7, 2, 3])
    """
    check_window(window, border)
    _check_shapes(query, key, value, window, bias)
    if bias is None:
        bias = torch.zeros(query.shape[3], window, window, dtype=torch.float32, device=query.device)
    backend = wanted_backend(backend)
    if backend == "reference" or (backend is None and is_recording()):  # differentiable as it is, and known elsewhere
        return reference.forward(query * scale, key, value, bias, window, border)
    return torch.ops.featsharp.local_attention(query * scale, key, value, bias, window, border, backend)


def _reason_against_triton(problem: Problem) -> str | None:
    if problem.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA device; got {problem.device}"
    if torch.float64 in problem.dtypes:
        return "computes in float32; got float64"
    if importlib.util.find_spec("triton") is None:
        return "needs triton; pip install triton"
    return None


register_backends(
    Backend(
        OP,
        "triton",
        "one kernel, nothing but inputs and outputs in memory",
        "featsharp.ops.local_attention.triton_kernel",
        _reason_against_triton,
        # The kernels compile for GPUs and are right under Triton's interpreter; they wait for a run on a real GPU.
        automatic=False,
    ),
    Backend(
        OP,
        "blocked",
        "matrix products of small blocks with their surroundings; any device",
        "featsharp.ops.local_attention.blocked",
        lambda problem: None,
    ),
    Backend(
        OP,
        "reference",
        "gathers every window; readable, any device",
        "featsharp.ops.local_attention.reference",
        lambda problem: None,
    ),
)


# One opaque operator, so that torch.compile keeps whole graphs and the choice of a backend stays out of them.
@torch.library.custom_op("featsharp::local_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str, backend: str | None
) -> Tensor:
    module = choose_backend(OP, _problem(query, key, value), backend).load()
    return module.forward(query, key, value, bias, window, border)


@torch.library.custom_op("featsharp::local_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    out: Tensor,
    window: int,
    border: str,
    needed: List[bool],  # noqa: UP006
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = choose_backend(OP, _problem(query, key, value), backend).load()
    return module.backward(grad, query, key, value, bias, out, window, border, needed)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str, backend: str | None) -> Tensor:
    return value.new_empty(*query.shape[:3], *value.shape[3:])


def _scratch_bytes(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str, backend: str | None
) -> int:
    module = choose_backend(OP, _problem(query, key, value), backend).load()
    return int(module.scratch_bytes(query, key, value, bias, window, border))


register_scratch(torch.ops.featsharp.local_attention.default, _scratch_bytes)


@_backward.register_fake
def _(grad, query, key, value, bias, out, window, border, needed, backend):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, bias))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window, ctx.border, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.featsharp.local_attention_backward(
        grad, *ctx.saved_tensors, ctx.window, ctx.border, list(needed := ctx.needs_input_grad[:4]), ctx.backend
    )
    return *(x if need else None for x, need in zip(gradients, needed, strict=True)), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


def _problem(query: Tensor, key: Tensor, value: Tensor) -> Problem:
    dtypes = (query.dtype, key.dtype, value.dtype)
    return Problem(value.device.type, dtypes)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, window: int, bias: Tensor | None) -> None:
    fits = (
        query.ndim == key.ndim == value.ndim == 5
        and query.shape[3:] == key.shape[3:]
        and key.shape[:3] == value.shape[:3]
        and value.shape[3] in (1, key.shape[3])
        and query.shape[0] == key.shape[0]
        and min(key.shape) >= 1
        and query.shape[1] % key.shape[1] == query.shape[2] % key.shape[2] == 0
        and query.shape[1] // key.shape[1] == query.shape[2] // key.shape[2] >= 1
    )
    if not fits:
        raise InputError(
            "local_attention takes query [B, f*H, f*W, N, D], key [B, H, W, N, D] and value [B, H, W, N or 1, E], f "
            f"whole, none of them 0; got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (query.shape[3], window, window):
        raise InputError(f"the bias must be [N, K, K] = {(query.shape[3], window, window)}; got {tuple(bias.shape)}")
