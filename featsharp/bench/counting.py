"""Floating-point operations of modules, by PyTorch's FlopCounterMode.

Convention: a multiply-add is two operations. Linear layers, matrix products, convolutions, attention, and our local
attention and local filter are counted. Element-wise functions, norms, softmax, interpolation, and products for which
PyTorch has no formula (of a matrix and a vector, Fourier transforms, recurrent layers) are not.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

# The operators whose formulas are below.
import featsharp.ops.local_attention  # noqa: F401 (registers the operator)
import featsharp.ops.local_filter  # noqa: F401
from featsharp.backbones.base import Backbone
from featsharp.bench.measure import find_failure, noise
from featsharp.bench.workloads import backbone_passes, is_foreign
from featsharp.builder import SharpEncoder
from featsharp.errors import ConfigError, FeatSharpError
from featsharp.upsamplers.base import Upsampler

logger = logging.getLogger(__name__)

# Libraries of operators that PyTorch's counter has formulas for.
KNOWN_LIBRARIES = {"aten", "prim", "prims", "profiler"}
# The unit of Cost.relative: a pass of a ViT-S/14 over 224 x 224 pixels.
LAYERS, EMBED_DIM, PATCH, SIDE = 12, 384, 14, 224


@dataclass(frozen=True)
class Counter:
    """Result of :func:`counting`, complete when its context ends.

    Attributes:
        flops: PyTorch's counter.
        uncounted: Operators of other libraries without a formula, as "library::name". Code outside of operators (NumPy,
            a bare kernel) is neither counted nor listed.
    """

    flops: FlopCounterMode
    uncounted: set[str]


@contextmanager
def counting() -> Iterator[Counter]:
    """Count the floating-point operations within this context, without gradients."""
    other = _OtherLibraries()
    fused = torch.backends.mha.get_fastpath_enabled()
    # The fused operator of nn.MultiheadAttention hides its products.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with other, FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops, torch.no_grad():
            yield Counter(flops, other.names)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@dataclass(frozen=True)
class Operations:
    """Count of one call.

    Attributes:
        total: Floating-point operations.
        passes: Shapes [B, 3, H, W] of the batches that the backbone encodes.
        uncounted: Operators of other libraries without a formula.
    """

    total: int
    passes: list[tuple[int, ...]]
    uncounted: list[str]


def count_operations(module: Backbone | SharpEncoder, shape: tuple[int, ...], device: torch.device) -> Operations:
    """Count the operations of a backbone or an encoder for images of a shape.

    Shapes alone are enough for most modules; one that depends on values is run, with a warning.

    Args:
        module: In eval mode, on the device. It is not changed.
        shape: [B, 3, H, W].
        device: Of the operators that are counted.

    Raises:
        FeatSharpError: As raised by the module; ConfigError when memory runs out, or a function of the user fails.
    """
    try:
        mode = FakeTensorMode()
        with FakeCopyMode(mode):
            # A copy, as modules may cache fake tensors for later calls.
            fake = copy.deepcopy(module)
        with mode:
            return _count(fake, torch.empty(shape, device=device))
    except FeatSharpError:
        raise
    except Exception as error:  # of any kind: foreign code that depends on values, or cannot be copied
        logger.warning(
            "counting on real tensors, which takes time and memory, since shapes alone do not do: %s: %s",
            type(error).__name__,
            error,
        )
    counts: list[Operations] = []
    images = noise(shape, device)
    failure = find_failure(lambda: counts.append(_count(module, images)), foreign=is_foreign(module))
    if failure is not None:
        raise ConfigError(failure)
    return counts[0]


@dataclass(frozen=True)
class Cost:
    """Cost of sharp features of one picture of 224 x 224 pixels by a ViT-S/14."""

    parameters: int  # of the upsampler
    passes: int  # images that the backbone encodes, of any size
    relative: float  # operations of passes and upsampler, in units of one backbone pass


def count_cost(upsampler: Upsampler) -> Cost:
    """Count the cost of an upsampler that was built for 384 channels, from shapes alone."""
    passes, operations = 0, 0.0

    def encode(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, None]:
        nonlocal passes, operations
        stride = patch_stride or PATCH
        grid = [(side - PATCH) // stride + 1 for side in images.shape[-2:]]
        passes += len(images)
        operations += len(images) * _vit_operations(grid[0] * grid[1])
        return images.new_empty(len(images), EMBED_DIM, *grid), None

    side = int(SIDE * upsampler.input_upsample_factor)
    with FakeTensorMode(allow_non_fake_inputs=True), counting() as counter:
        upsampler.eval()(torch.empty(1, 3, side, side), encode, (SIDE, SIDE))
    total = operations + counter.flops.get_total_flops()
    parameters = sum(p.numel() for p in upsampler.parameters())
    return Cost(parameters, passes, total / _vit_operations((SIDE // PATCH) ** 2))


def _vit_operations(tokens: int) -> float:
    """Compute the operations of one pass: linear layers 24 T C^2 and attention 4 T^2 C per layer."""
    return LAYERS * (24.0 * tokens * EMBED_DIM**2 + 4.0 * tokens**2 * EMBED_DIM)


def _count(module: Backbone | SharpEncoder, images: Tensor) -> Operations:
    backbone = module if isinstance(module, Backbone) else module.backbone
    with counting() as counter:
        batches = backbone_passes(backbone, lambda: module(images))
    shapes = [tuple(batch.shape) for batch in batches]
    return Operations(counter.flops.get_total_flops(), shapes, sorted(counter.uncounted))


class _OtherLibraries(TorchDispatchMode):
    """Mode that collects the names of operators that neither PyTorch nor we have a formula for."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A higher-order operator, such as flex_attention, has no overloads.
        packet = getattr(func, "_overloadpacket", func)
        if func.namespace not in KNOWN_LIBRARIES and packet not in FORMULAS and packet not in flop_registry:
            self.names.add(f"{func.namespace}::{func.name().rpartition('::')[2].partition('.')[0]}")
        return func(*args, **(kwargs or {}))


def _local_attention(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    bias: object,
    window: int,
    *rest: object,
    **out: object,
) -> int:
    """Count products with keys and values of a window for every query: query [B, H, W, heads, C], value [..., D]."""
    return 2 * math.prod(query[:4]) * window**2 * (query[4] + value[4])


def _local_filter(weights: Sequence[int], value: Sequence[int], *rest: object, **out: object) -> int:
    """Count products of every weight with all channels: weights [B, H, W, groups, k, k], value [..., C]."""
    return 2 * math.prod(weights) * value[4]


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: object, **out: object) -> int:
    """Count the products of attention on the CPU, for which torch 2.4 has no formula."""
    return int(sdpa_flop_count(query, key, value))


# Given to each counter: torch 2.4 does not find those that are registered.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.featsharp.local_attention: _local_attention,
    torch.ops.featsharp.local_filter: _local_filter,
}
