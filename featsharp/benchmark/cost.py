"""What an upsampler costs, counted from shapes alone: parameters, backbone passes, floating-point operations.

The measure of everything is one pass of a ViT-S/14 (12 layers, 384 channels) over 224 x 224 pixels. Products are
counted, in the upsampler and in the passes that it asks for; interpolation, norms and activations are not. For times
see :mod:`featsharp.benchmark.encode`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

# The operators whose products are counted below.
import featsharp.ops.local_attention
import featsharp.ops.local_filter  # noqa: F401
from featsharp.upsamplers.base import Upsampler

LAYERS, EMBED_DIM, PATCH, SIDE = 12, 384, 14, 224

# PyTorch's operators that multiply matrices and that its counter knows nothing about.
ATEN_WITHOUT_FORMULA = {
    f"aten::{name}"
    for name in ("mv", "addmv", "dot", "vdot", "addbmm", "_int_mm", "_trilinear", "_native_multi_head_attention")
}
# Operators of these libraries that are not in the list above multiply nothing.
PLAIN_LIBRARIES = {"aten", "prim", "prims", "profiler"}


@dataclass(frozen=True)
class Cost:
    """What sharp features of one picture take."""

    parameters: int  # of the upsampler
    passes: int  # images that go through the backbone, of whatever size
    relative: float  # operations of passes and upsampler, in units of one backbone pass


def count_cost(upsampler: Upsampler) -> Cost:
    """The cost of an upsampler that was built for 384 channels; nothing is computed."""
    passes, operations = 0, 0.0

    def encode(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, None]:
        nonlocal passes, operations
        stride = patch_stride or PATCH
        grid = [(side - PATCH) // stride + 1 for side in images.shape[-2:]]
        passes += len(images)
        operations += len(images) * vit_operations(grid[0] * grid[1])
        return images.new_empty(len(images), EMBED_DIM, *grid), None

    side = int(SIDE * upsampler.input_upsample_factor)
    with FakeTensorMode(allow_non_fake_inputs=True), counting() as counter:
        upsampler.eval()(torch.empty(1, 3, side, side), encode, (SIDE, SIDE))
    total = operations + counter.flops.get_total_flops()
    parameters = sum(p.numel() for p in upsampler.parameters())
    return Cost(parameters, passes, total / vit_operations((SIDE // PATCH) ** 2))


@dataclass(frozen=True)
class Counter:
    """What :func:`counting` found, complete when its context ends.

    Attributes:
        flops: PyTorch's counter.
        uncounted: Operators that may multiply and that nobody gave a formula, as "library::name".
    """

    flops: FlopCounterMode
    uncounted: set[str]


@contextmanager
def counting() -> Iterator[Counter]:
    """Count the floating-point operations of products within this context, without gradients: 2 per multiply-add."""
    watch = _OperatorsWithoutFormula()
    fused = torch.backends.mha.get_fastpath_enabled()
    # The fused operator of nn.MultiheadAttention hides its products.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with watch, FlopCounterMode(display=False) as flops, torch.no_grad():
            yield Counter(flops, watch.found)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _OperatorsWithoutFormula(TorchDispatchMode):
    """Collects names of operators that a count misses."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        known = func.namespace in PLAIN_LIBRARIES or func._overloadpacket in flop_registry
        if not known or name in ATEN_WITHOUT_FORMULA:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def vit_operations(tokens: int) -> float:
    """Of one pass: linear layers 24 T C^2 and attention 4 T^2 C per layer, a multiplication and an addition each."""
    return LAYERS * (24.0 * tokens * EMBED_DIM**2 + 4.0 * tokens**2 * EMBED_DIM)


@register_flop_formula(torch.ops.featsharp.local_attention)
def _local_attention(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    bias: object,
    window: int,
    *rest: object,
    **out: object,
) -> int:
    return 2 * math.prod(query[:4]) * window**2 * (query[4] + value[4])


@register_flop_formula(torch.ops.featsharp.local_filter)
def _local_filter(weights: Sequence[int], value: Sequence[int], *rest: object, **out: object) -> int:
    return 2 * math.prod(weights) * value[4]
