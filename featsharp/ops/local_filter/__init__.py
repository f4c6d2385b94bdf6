"""Weighted sums over the small window around every query, with weights that are given: reassembly as in CARAFE.

    out[q] = sum_p weights[q, p] * value[c + p]

with c = q // f the value cell of the query and p in a K x K window. The weights are used as they are, so a softmax, a
product of kernels or a nearest-neighbour mask is the caller's. CARAFE (arXiv 1905.02188) predicts them from the
features; methods whose weights come from queries and keys are better served by :mod:`featsharp.ops.local_attention`,
which never holds them.

Shapes: B batch, H x W values, f queries per value cell and axis, N heads, E channels per head, K window.
"""

from typing import Any

import torch
from torch import Tensor

from featsharp.errors import InputError
from featsharp.memory import register_scratch
from featsharp.ops.backends import Backend, Problem, choose_backend, register_backends, wanted_backend
from featsharp.ops.local_filter import reference
from featsharp.ops.recording import is_recording
from featsharp.ops.windows import Border, check_window

OP = "local_filter"


def local_filter(weights: Tensor, value: Tensor, *, border: Border = "zeros", backend: str | None = None) -> Tensor:
    """Sum the ``K x K`` values around every query with the weights given for it.

    Args:
        weights: [B, f*H, f*W, N, K, K], f >= 1 whole, K odd; entry (i, j) belongs to the value at offset
            (i - K//2, j - K//2).
        value: [B, H, W, N, E].
        border: Values beyond the edge of the map; see :data:`featsharp.ops.windows.Border`. "clip" and "zeros"
            are the same here: weights of values that do not exist are lost, not redistributed. Under "shift" an entry
            beyond the edge is that of the value K cells further in.
        backend: Name of an implementation (``featsharp doctor`` lists them); None: the fastest that can run.

    Returns:
        [B, f*H, f*W, N, E] in the dtype of ``value``; sums are float32 (float64 for float64 values).

    Raises:
        InputError: When shapes do not fit together.
        ConfigError: For an even window, an unknown border, or a backend that is unknown or cannot run.

    Example:
        >>> mean = torch.full((1, 10, 14, 1, 3, 3), 1 / 9)
        >>> local_filter(mean, torch.ones(1, 5, 7, 1, 8), border="replicate").shape
        torch.Size([1, 10, 14, 1, 8])
    """
    _check_shapes(weights, value)
    check_window(int(weights.shape[-1]), border)
    backend = wanted_backend(backend)
    if backend == "reference" or (backend is None and is_recording()):  # differentiable as it is, and known elsewhere
        return reference.forward(weights, value, border)
    return torch.ops.featsharp.local_filter(weights, value, border, backend)


register_backends(
    Backend(
        OP,
        "blocked",
        "matrix products of small blocks with their surroundings; any device",
        "featsharp.ops.local_filter.blocked",
        lambda problem: None,
    ),
    Backend(
        OP,
        "reference",
        "one shifted map after the other; readable, any device",
        "featsharp.ops.local_filter.reference",
        lambda problem: None,
    ),
)


@torch.library.custom_op("featsharp::local_filter", mutates_args=())
def _forward(weights: Tensor, value: Tensor, border: str, backend: str | None) -> Tensor:
    return choose_backend(OP, _problem(weights, value), backend).load().forward(weights, value, border)


@torch.library.custom_op("featsharp::local_filter_backward", mutates_args=())
def _backward(grad: Tensor, weights: Tensor, value: Tensor, border: str, backend: str | None) -> tuple[Tensor, Tensor]:
    return choose_backend(OP, _problem(weights, value), backend).load().backward(grad, weights, value, border)


@_forward.register_fake
def _(weights: Tensor, value: Tensor, border: str, backend: str | None) -> Tensor:
    return value.new_empty(*weights.shape[:4], value.shape[4])


def _scratch_bytes(weights: Tensor, value: Tensor, border: str, backend: str | None) -> int:
    module = choose_backend(OP, _problem(weights, value), backend).load()
    return int(module.scratch_bytes(weights, value, border))


register_scratch(torch.ops.featsharp.local_filter.default, _scratch_bytes)


@_backward.register_fake
def _(grad, weights, value, border, backend):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (weights, value))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, value, ctx.border, ctx.backend = inputs
    ctx.save_for_backward(weights, value)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.featsharp.local_filter_backward(grad, *ctx.saved_tensors, ctx.border, ctx.backend)
    return *gradients, None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


def _problem(weights: Tensor, value: Tensor) -> Problem:
    return Problem(value.device.type, (weights.dtype, value.dtype))


def _check_shapes(weights: Tensor, value: Tensor) -> None:
    fits = (
        weights.ndim == 6
        and value.ndim == 5
        and weights.shape[0] == value.shape[0]
        and weights.shape[3] == value.shape[3]
        and weights.shape[4] == weights.shape[5]
        and min(value.shape) >= 1
        and weights.shape[1] % value.shape[1] == weights.shape[2] % value.shape[2] == 0
        and weights.shape[1] // value.shape[1] == weights.shape[2] // value.shape[2] >= 1
    )
    if not fits:
        raise InputError(
            "local_filter takes weights [B, f*H, f*W, N, K, K] and value [B, H, W, N, E], f whole; got "
            f"{tuple(weights.shape)}, {tuple(value.shape)}"
        )
