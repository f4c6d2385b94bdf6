"""Counting the floating-point operations of products, and naming those that the count misses."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

# The operators whose products are counted below.
import featsharp.ops.local_attention
import featsharp.ops.local_filter  # noqa: F401

# Libraries of PyTorch most of whose operators multiply no matrices. Of any other library nobody knows.
PLAIN_LIBRARIES = {"aten", "prim", "prims", "profiler"}

# Parts, between underscores, of the names of PyTorch's operators that multiply matrices or do as much work.
_PRODUCT = re.compile(
    r"\w*mm|\w*mv|v?dot|vecdot|addr|matmul|(bi|tri)?linear|attention|conv(\dd)?|convolution"
    r"|transformer|lstm|gru|rnn|cdist|pdist|euclidean|fft|linalg|cholesky|matrix|combination"
    r"|inverse|(sp)?solve|lu|svd|geqrf|orgqr|ormqr"
)
# Operators named so that do not.
_NO_PRODUCT = re.compile(
    r"_?linalg_(check_errors|cross|diagonal|_?powsum|vector_norm)|_thnn_fused_\w+|lu_unpack|slice_inverse"
    r"|fft_r?fftfreq|mkldnn_reorder_\w+|\w+_flatten_weight"
)


@dataclass(frozen=True)
class Counter:
    """What :func:`counting` found, complete when its context ends.

    Attributes:
        flops: PyTorch's counter.
        uncounted: Operators without a formula, as "library::name": PyTorch's whose names say that they multiply
            matrices, and all of other libraries. What is no operator (NumPy, a bare kernel) is neither counted nor
            named.
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


def may_multiply(library: str, name: str) -> bool:
    """Whether an operator may multiply matrices, by its name: "aten" and "mv", say."""
    if library not in PLAIN_LIBRARIES:
        return True
    return not _NO_PRODUCT.fullmatch(name) and any(_PRODUCT.fullmatch(part) for part in name.split("_"))


class _OperatorsWithoutFormula(TorchDispatchMode):
    """Collects names of operators that a count misses."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().rpartition("::")[2].partition(".")[0]
        # A higher-order operator, such as flex_attention, has no overloads.
        if getattr(func, "_overloadpacket", func) not in flop_registry and may_multiply(func.namespace, name):
            self.found.add(f"{func.namespace}::{name}")
        return func(*args, **(kwargs or {}))


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
