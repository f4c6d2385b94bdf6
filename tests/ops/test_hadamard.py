"""Hadamard matrices: orthogonality, entries, which orders exist, and which construction is picked."""

import math

import pytest
import torch

from featsharp.errors import ConfigError
from featsharp.ops.hadamard import hadamard, has_hadamard, nearest_orders, require_hadamard

SPEC_ORDERS = (12, 20, 36, 44, 104, 384, 768, 1024, 1152, 1280, 1408, 1536, 1664)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 28, 76, 240, *SPEC_ORDERS])
def test_entries_and_orthogonality(order):
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(order)), rtol=0, atol=1e-15)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-12)


def test_orthogonality_survives_float32():
    matrix = hadamard(1152).float().double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(1152).double(), rtol=0, atol=1e-6)


def test_every_listed_construction_against_its_definition():
    """Orders 12 (Paley I, q 11) and 36 (Paley II, q 17), entry by entry from Euler's criterion."""

    def core(q, corner):
        legendre = [0 if d == 0 else (1 if pow(d, (q - 1) // 2, q) == 1 else -1) for d in range(q)]
        rows = [[0] + [1] * q] + [[corner] + [legendre[(i - j) % q] for j in range(q)] for i in range(q)]
        return torch.tensor(rows, dtype=torch.float64)

    skew = core(11, -1)
    assert torch.equal(skew, -skew.T)
    torch.testing.assert_close(hadamard(12) * math.sqrt(12), torch.eye(12, dtype=torch.float64) + skew)

    symmetric = core(17, 1)
    assert torch.equal(symmetric, symmetric.T)
    expected = torch.zeros(36, 36, dtype=torch.float64)
    for i in range(18):
        for j in range(18):
            sign = symmetric[i, j]
            block = [[1, -1], [-1, -1]] if sign == 0 else [[sign, sign], [sign, -sign]]
            expected[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = torch.tensor(block, dtype=torch.float64)
    torch.testing.assert_close(hadamard(36) * 6, expected)


@pytest.mark.parametrize(
    ("order", "sylvester"),
    [(384, 32), (768, 64), (1024, 1024), (1152, 32), (1280, 64), (1408, 32), (1536, 128), (1664, 16)],
)
def test_the_largest_sylvester_part_comes_first(order, sylvester):
    part = order // sylvester
    base = hadamard(part) if part > 1 else torch.ones(1, 1, dtype=torch.float64)
    torch.testing.assert_close(hadamard(order), torch.kron(hadamard(sylvester), base))


def test_products_of_two_paley_matrices_are_found():
    torch.testing.assert_close(hadamard(1360), torch.kron(hadamard(20), hadamard(68)))


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 7, 50, 382, 92, 100])
def test_orders_without_a_construction_are_refused(order):
    assert not has_hadamard(order)
    with pytest.raises(ConfigError, match=rf"order {order} .*nearest: .*phi-s-onlyalpha"):
        hadamard(order)
    with pytest.raises(ConfigError, match=f"order {order} "):
        require_hadamard(order)


@pytest.mark.parametrize(("order", "expected"), [(0, (0, 1)), (3, (2, 4)), (92, (88, 96)), (385, (384, 388))])
def test_nearest_orders(order, expected):
    assert nearest_orders(order) == expected


def test_what_is_said_to_exist_can_be_built():
    for order in range(1, 161):
        if has_hadamard(order):
            hadamard(order)
        else:
            assert order % 4 or order in (52, 92, 100, 116, 156)
