"""Reproducible orders from integer arithmetic alone: the same on every machine and with every version of a library."""

import hashlib


def hash_bits(*values: int) -> int:
    """Hash integers to 64 pseudo-random bits."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


def shuffled(position: int, length: int, key: int) -> int:
    """Map ``position`` by a pseudo-random permutation of range(length).

    A Feistel network permutes the next power of two; values beyond the length are sent through it again until they
    fall inside, which keeps it a permutation.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for turn in range(6):
            left, right = right, left ^ (hash_bits(key, turn, right) & mask)
        value = left << half | right
        if value < length:
            return value


def floor_sum(count: int, modulus: int, step: int, start: int) -> int:
    """Sum floor((step * i + start) / modulus) over i < count, by Euclid's reduction: O(log modulus) steps."""
    total = 0
    while True:
        whole, step = divmod(step, modulus)
        offset, start = divmod(start, modulus)
        total += whole * (count * (count - 1) // 2) + offset * count
        # The rest counts lattice points under a line of slope < 1: count them along the other axis.
        rows, start = divmod(step * count + start, modulus)
        if rows == 0:
            return total
        count, modulus, step = rows, step, modulus
