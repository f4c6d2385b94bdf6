"""Reads MATLAB files of version 5 to 7, in which many data sets keep their annotations.

Format: "MAT-File Format", The MathWorks, chapter 1 (level 5 files): a header of 128 bytes, then elements, each a tag
(type, bytes) and data padded to 8 bytes. A variable is an element "matrix" whose parts are elements again; since
version 7 each variable is compressed by zlib.

The files are data of strangers: every length is checked against what is there.
"""

import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featsharp.errors import DataError

__all__ = ["read_mat"]

HEADER_BYTES = 128
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_INFLATED = 1 << 30  # bytes; of one variable, so that a small file cannot fill the memory

# Types of elements.
MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXT = {1: "utf-8", 2: "utf-8", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}

# Classes of matrices.
CELL, STRUCT, CHAR = 1, 2, 4
NUMERIC = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
UNREAD = {3: "an object", 5: "a sparse matrix", 16: "a function handle", 17: "an object"}
LOGICAL, COMPLEX = 0x02, 0x08


def read_mat(path: str | Path) -> dict[str, Any]:
    """The variables of a MATLAB file by name.

    A numeric or logical matrix becomes an array of MATLAB's own shape (a number is [1, 1]) and type, in native byte
    order; a text becomes str, a text of several rows a list of them; a cell array becomes the list of its cells and a
    struct array the list of its dicts, both column by column; a 1 x 1 struct becomes its dict.

    Raises:
        DataError: For a file that is missing, damaged or of another version, and for objects, sparse matrices and
            functions.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if content[512:520] == HDF5_SIGNATURE or content[:8] == HDF5_SIGNATURE:
        raise DataError(f"{path} is a MATLAB 7.3 file (HDF5); save it again with save(..., '-v7')")
    order = {b"IM": "<", b"MI": ">"}.get(content[126:HEADER_BYTES])
    if order is None:
        raise DataError(f"{path} is not a MATLAB file of version 5 to 7")
    try:
        return _variables(_Elements(memoryview(content)[HEADER_BYTES:], order))
    except _UnreadError as error:
        raise DataError(f"{path} holds {error}, which is not read here; only numbers, texts, cells, structs") from None
    except (ValueError, LookupError, OverflowError, struct.error, zlib.error, RecursionError) as error:
        raise DataError(f"{path} is damaged: {str(error) or type(error).__name__}") from None


class _UnreadError(Exception):
    """A class of matrix that this module does not read."""


class _Element(NamedTuple):
    """Data with its type."""

    kind: int
    data: memoryview


class _Elements:
    """The elements of some bytes, one after another."""

    def __init__(self, data: memoryview, order: str) -> None:
        self.data, self.order = data, order

    def __bool__(self) -> bool:
        return len(self.data) > 0

    def next(self) -> _Element:
        (word,) = struct.unpack_from(self.order + "I", self.data)
        if word >> 16:  # up to four bytes, in the tag itself
            kind, start, length, end = word & 0xFFFF, 4, word >> 16, 8
        else:
            kind, length = struct.unpack_from(self.order + "II", self.data)
            start, end = 8, 8 + length + (-length % 8 if kind != COMPRESSED else 0)
        # The last element of a file may lack its padding.
        if start + length > min(end, len(self.data)):
            raise ValueError(f"an element of {length} bytes where {max(0, len(self.data) - start)} are left")
        found = _Element(kind, self.data[start : start + length])
        self.data = self.data[end:]
        return found

    def numbers(self) -> np.ndarray:
        """The next element as a line of numbers."""
        kind, data = self.next()
        if kind not in NUMBERS:
            raise ValueError(f"numbers of the unknown type {kind}")
        stored = np.dtype(self.order + NUMBERS[kind])
        return np.frombuffer(data, stored).astype(stored.newbyteorder("="))

    def matrix(self) -> "_Elements":
        """The parts of the next element, a matrix."""
        kind, data = self.next()
        if kind != MATRIX:
            raise ValueError(f"an element of type {kind} where a matrix was expected")
        return _Elements(data, self.order)

    def text(self) -> str:
        kind, data = self.next()
        if kind not in TEXT:
            raise ValueError(f"text of the unknown type {kind}")
        ending = {"<": "-le", ">": "-be"}[self.order] if kind in (4, 17, 18) else ""
        return bytes(data).decode(TEXT[kind] + ending)


def _variables(elements: _Elements) -> dict[str, Any]:
    found = {}
    while elements:
        kind, data = elements.next()
        if kind == COMPRESSED:
            inflater = zlib.decompressobj()
            inflated = inflater.decompress(data, MAX_INFLATED)
            if not inflater.eof:
                raise ValueError("a compressed variable is cut off, or larger than 1 GiB")
            parts = _Elements(memoryview(inflated), elements.order).matrix()
        elif kind == MATRIX:
            parts = _Elements(data, elements.order)
        else:
            continue  # no variable
        name, value = _matrix(parts)
        if name:  # MATLAB's own bookkeeping has none
            found[name] = value
    return found


def _matrix(parts: _Elements) -> tuple[str, Any]:
    """The name and value of a matrix."""
    if not parts:  # MATLAB's shorthand for []
        return "", np.zeros((0, 0))
    flags = int(parts.numbers()[0])
    kind, flags = flags & 0xFF, flags >> 8
    if kind in UNREAD:
        raise _UnreadError(UNREAD[kind])
    shape = tuple(int(n) for n in parts.numbers())
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"a matrix of shape {shape}")
    name = parts.text()
    if kind in NUMERIC:
        return name, _numeric(parts, kind, flags, shape)
    reader: Callable[[_Elements, tuple[int, ...]], Any] = {CELL: _cell, STRUCT: _struct, CHAR: _char}[kind]
    return name, reader(parts, shape)


def _numeric(parts: _Elements, kind: int, flags: int, shape: tuple[int, ...]) -> np.ndarray:
    # MATLAB stores whole numbers in the smallest type that holds them, whatever the class.
    values = parts.numbers().astype(NUMERIC[kind])
    if flags & COMPLEX:
        values = values + 1j * parts.numbers().astype(NUMERIC[kind])
    return values.astype(bool if flags & LOGICAL else values.dtype).reshape(shape, order="F")


def _cell(parts: _Elements, shape: tuple[int, ...]) -> list[Any]:
    return [_matrix(parts.matrix())[1] for _ in range(math.prod(shape))]


def _struct(parts: _Elements, shape: tuple[int, ...]) -> Any:
    length = int(parts.numbers()[0])
    packed = bytes(parts.next().data)
    if length < 1:
        raise ValueError(f"field names of {length} bytes")
    names = [
        packed[start : start + length].partition(b"\0")[0].decode("utf-8") for start in range(0, len(packed), length)
    ]
    found = [{name: _matrix(parts.matrix())[1] for name in names} for _ in range(math.prod(shape) if names else 0)]
    return found[0] if math.prod(shape) == 1 and found else found


def _char(parts: _Elements, shape: tuple[int, ...]) -> str | list[str]:
    text = parts.text()
    if len(text) != math.prod(shape):
        raise ValueError(f"a text of {len(text)} characters and shape {shape}")
    rows = shape[0]
    lines = [text[row::rows] for row in range(rows)]  # stored column by column
    return lines[0] if rows == 1 else lines if rows else ""
