"""Feature maps written straight to a memory-mapped file, for maps larger than memory."""

import io
import json
import os
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from featsharp.errors import ConfigError, FeatSharpError
from featsharp.files import replacing

# torch dtype -> (name in safetensors files, a NumPy dtype of the same bytes)
_DTYPES = {
    torch.float32: ("F32", np.float32),
    torch.float16: ("F16", np.float16),
    torch.bfloat16: ("BF16", np.uint16),
    torch.float64: ("F64", np.float64),
}


class MappedFeatures:
    """A file that the high-resolution features of one picture are written to while they are computed.

    A context manager that writes atomically: the file appears when the block ends without an error. Features are those
    of a batch of one picture, [1, C, H, W]; the file holds [C, H, W]. The tensor maps the file, so it stays valid
    afterwards and takes memory only for the parts that are read. On systems that lock mapped files (Windows) the file
    cannot be renamed at the end.

    Args:
        path: ``.safetensors``, with the tensors low_res and high_res, or ``.npy``, with the high-resolution map alone.
        metadata: Texts to put into a safetensors file.

    Raises:
        ConfigError: For another ending, or a dtype that the format lacks (bfloat16 in .npy).
        FeatSharpError: When the file cannot be written, a full disk included (space is reserved first).

    Example:
        >>> with MappedFeatures("photo.safetensors") as file:  # doctest: +SKIP
        ...     out = encoder.encode_image("photo.jpg", allocate=file.allocate)
    """

    def __init__(self, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".safetensors", ".npy"):
            raise ConfigError(f"features are written to .safetensors or .npy files; got {self.path}")
        self._metadata = metadata or {}
        self._file: BinaryIO | None = None
        self._block = ExitStack()

    def allocate(self, low_res: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Create the file with space for high-resolution features; return them mapped, of ``shape`` and ``dtype``."""
        if len(low_res) != 1:
            raise ConfigError(f"one file takes the features of one picture; got a batch of {len(low_res)}")
        low = _Entry(tuple(low_res.shape[1:]), low_res.dtype)
        high = _Entry(tuple(shape[1:]), dtype)
        header, offsets, size = self._layout({"low_res": low, "high_res": high})
        try:
            if self._file is None:
                self._file = self._block.enter_context(replacing(self.path))
            self._file.seek(0)
            self._file.truncate()  # where it was made for another picture before
            self._file.write(header)
            self._file.flush()
            _reserve(self._file.fileno(), size)
        except OSError as error:
            raise FeatSharpError(
                f"cannot write {self.path}, {size / 2**20:.0f} MiB: {error.strerror or error}; free some space or "
                "choose another folder"
            ) from error
        if "low_res" in offsets:
            _map(self._file.name, low, offsets["low_res"]).copy_(low_res[0])
        return _map(self._file.name, high, offsets["high_res"])[None]

    def _layout(self, tensors: dict[str, "_Entry"]) -> tuple[bytes, dict[str, int], int]:
        """Compute the header of the file, the offsets of its tensors, and its size."""
        if self.path.suffix == ".npy":
            entry = tensors["high_res"]
            if entry.dtype == torch.bfloat16:
                raise ConfigError(f"NumPy has no bfloat16; write to .safetensors instead of {self.path}")
            header = _npy_header(entry.shape, _DTYPES[entry.dtype][1])
            return header, {"high_res": len(header)}, len(header) + entry.nbytes
        entries: dict[str, object] = {"__metadata__": self._metadata} if self._metadata else {}
        starts, end = {}, 0
        # The wider type first, so that every tensor starts at a multiple of its size.
        for key, entry in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            starts[key], end = end, end + entry.nbytes
            name = _DTYPES[entry.dtype][0]
            entries[key] = {"dtype": name, "shape": entry.shape, "data_offsets": [starts[key], end]}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return header, {key: len(header) + start for key, start in starts.items()}, len(header) + end

    def __enter__(self) -> "MappedFeatures":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file = None
        self._block.__exit__(kind, error, trace)


class _Entry(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _map(path: str, entry: _Entry, offset: int) -> Tensor:
    values = np.memmap(path, _DTYPES[entry.dtype][1], "r+", offset, entry.shape)
    return torch.from_numpy(values).view(entry.dtype)


def _reserve(descriptor: int, size: int) -> None:
    """Make a file ``size`` bytes long, with the space allocated on the disk where the system supports that."""
    if hasattr(os, "posix_fallocate"):
        # Writing to a mapped page without space on the disk would end the process.
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def _npy_header(shape: tuple[int, ...], dtype: type) -> bytes:
    file = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": description, "fortran_order": False, "shape": shape})
    return file.getvalue()
