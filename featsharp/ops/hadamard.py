"""Normalised Hadamard matrices of the orders that exist and that simple constructions reach.

A Hadamard matrix has entries +-1 and orthogonal rows. Divided by sqrt(n) it is a rotation that spreads any vector's
energy evenly over the axes, which is what PHI-S (arXiv 2410.01680) needs.

Constructions (Sylvester 1867, Paley 1933), joined by Kronecker products, the Sylvester part as large as possible:
    Sylvester   order 2^k
    Paley I     order q + 1,      q prime, q mod 4 = 3
    Paley II    order 2 (q + 1),  q prime, q mod 4 = 1

Paley's constructions also work for prime powers q; only prime q is built here, which covers the channel counts of
common vision encoders. Orders from 4 on must be multiples of 4.
"""

import math
from functools import cache

import torch
from torch import Tensor

from featsharp.errors import ConfigError


def hadamard(order: int) -> Tensor:
    """Build a Hadamard matrix divided by the root of its order.

    Returns:
        [order, order] float64 on the CPU, every entry +-1/sqrt(order), rows orthonormal.

    Raises:
        ConfigError: When none of the constructions reaches ``order``.
    """
    plan = _plan(order)
    if plan is None:
        raise _no_construction(order)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for construction, size in plan:
        matrix = torch.kron(matrix, _BUILDERS[construction](size))
    # Sums of +-1 are exact in float64, so this check needs no tolerance.
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64)), f"order {order}: {plan}"
    return matrix / math.sqrt(order)


def has_hadamard(order: int) -> bool:
    """Return whether :func:`hadamard` can build this order."""
    return _plan(order) is not None


def require_hadamard(order: int) -> None:
    """Raise the ConfigError of :func:`hadamard` for an order it cannot build, without building anything."""
    if not has_hadamard(order):
        raise _no_construction(order)


def nearest_orders(order: int) -> tuple[int, int]:
    """Return the nearest orders below (0 when there is none) and above ``order`` that can be built."""
    below, above = max(order - 1, 0), max(order + 1, 1)
    while below and not has_hadamard(below):
        below -= 1
    while not has_hadamard(above):
        above += 1
    return below, above


def _no_construction(order: int) -> ConfigError:
    near = " and ".join(str(n) for n in nearest_orders(order) if n)
    return ConfigError(
        f"no Hadamard matrix of order {order} can be built (1, 2 and most multiples of 4 can; nearest: {near}); for "
        "features of this width use normalizer 'phi-s-onlyalpha', 'layernorm' or 'none'"
    )


@cache
def _plan(order: int) -> tuple[tuple[str, int], ...] | None:
    """Kronecker factors (construction, order), left to right, or None when no combination reaches the order."""
    if order < 1:
        return None
    power = order & -order  # the largest power of two that divides order
    if power == order:
        return (("sylvester", order),)
    sylvester = power // 4
    while sylvester >= 1:
        paley = _paley_kind(order // sylvester)
        if paley:
            factors = ((paley, order // sylvester),)
            return (("sylvester", sylvester), *factors) if sylvester > 1 else factors
        sylvester //= 2
    for left in range(12, math.isqrt(order) + 1, 4):
        if order % left == 0 and (order // left) % 4 == 0:
            plans = _plan(left), _plan(order // left)
            if plans[0] is not None and plans[1] is not None:
                return plans[0] + plans[1]
    return None


def _paley_kind(order: int) -> str | None:
    """The one of Paley's constructions that gives exactly this order."""
    if order % 4 == 0 and _is_prime(order - 1):
        return "paley1"
    half = order // 2 - 1
    if order % 4 == 0 and half % 4 == 1 and _is_prime(half):
        return "paley2"
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(step, matrix)
    return matrix


def _paley1(order: int) -> Tensor:
    return torch.eye(order, dtype=torch.float64) + _paley_core(order - 1, corner=-1.0)


def _paley2(order: int) -> Tensor:
    core = _paley_core(order // 2 - 1, corner=1.0)
    zero_block = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    sign_block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron((core == 0).double(), zero_block) + torch.kron(core, sign_block)


def _paley_core(prime: int, corner: float) -> Tensor:
    """[[0, 1^T], [corner 1, Q]] with Q_ij the Legendre symbol of i - j: [prime + 1, prime + 1]."""
    numbers = torch.arange(prime)
    symbol = torch.full((prime,), -1.0, dtype=torch.float64)
    symbol[numbers.square() % prime] = 1.0
    symbol[0] = 0.0
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 0] = 1.0, corner
    core[1:, 1:] = symbol[(numbers[:, None] - numbers[None, :]) % prime]
    return core


_BUILDERS = {"sylvester": _sylvester, "paley1": _paley1, "paley2": _paley2}
