"""Tensors as plain bytes in files: their layout in safetensors and .npy files, and maps of them in memory.

:class:`MappedFeatures` is the file of one picture that is written while its features are computed.
"""

import errno
import io
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from featsharp.errors import ConfigError, DataError
from featsharp.files import cannot_write, replacing
from featsharp.names import readable

# torch dtype -> (name in safetensors files, a NumPy dtype of the same bytes)
_DTYPES = {
    torch.float32: ("F32", np.float32),
    torch.float16: ("F16", np.float16),
    torch.bfloat16: ("BF16", np.uint16),
    torch.float64: ("F64", np.float64),
}
# Shape and type of a tensor.
Shape = tuple[tuple[int, ...], torch.dtype]


class Placed(NamedTuple):
    """A tensor in a file: path relative to some folder, offset of its bytes, name of its type, shape."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


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
        # Names of files may hold bytes that are no text, which safetensors cannot read back.
        self._metadata = {key: readable(value) for key, value in (metadata or {}).items()}
        self._file: BinaryIO | None = None
        self._block = ExitStack()

    def allocate(self, low_res: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Create the file with space for high-resolution features; return them mapped, of ``shape`` and ``dtype``."""
        if len(low_res) != 1:
            raise ConfigError(f"one file takes the features of one picture; got a batch of {len(low_res)}")
        low = (tuple(low_res.shape[1:]), low_res.dtype)
        high = (tuple(shape[1:]), dtype)
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
            raise cannot_write(self.path, error, f", {size / 2**20:.0f} MiB") from error
        if "low_res" in offsets:
            _map(self._file.name, low, offsets["low_res"], "r+").copy_(low_res[0])
        return _map(self._file.name, high, offsets["high_res"], "r+")[None]

    def _layout(self, tensors: dict[str, Shape]) -> tuple[bytes, dict[str, int], int]:
        """Compute the header of the file, the offsets of its tensors, and its size."""
        if self.path.suffix == ".npy":
            header = npy_header(*tensors["high_res"])
            return header, {"high_res": len(header)}, len(header) + _bytes_of(*tensors["high_res"])
        return safetensors_layout(tensors, self._metadata)

    def __enter__(self) -> "MappedFeatures":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file = None
        try:
            self._block.__exit__(kind, error, trace)
        except OSError as failure:  # of the renaming
            if failure is error:
                raise
            raise cannot_write(self.path, failure) from failure


def safetensors_layout(tensors: Mapping[str, Shape], metadata: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Lay out a safetensors file.

    Args:
        tensors: Shape and type by name.
        metadata: Texts by name.

    Returns:
        Its header, the offset of each tensor in the file, and the size of the file.
    """
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    starts, end = {}, 0
    # The widest type first, so that every tensor starts at a multiple of its size.
    for key, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
        starts[key], end = end, end + _bytes_of(shape, dtype)
        entries[key] = {"dtype": _DTYPES[dtype][0], "shape": shape, "data_offsets": [starts[key], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {key: len(header) + start for key, start in starts.items()}, len(header) + end


def npy_header(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """Make what stands before the values in a .npy file; raises ConfigError for bfloat16, which NumPy lacks."""
    if dtype == torch.bfloat16:
        raise ConfigError("NumPy has no bfloat16; write safetensors instead of .npy")
    file = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(_DTYPES[dtype][1]))
    np.lib.format.write_array_header_1_0(file, {"descr": description, "fortran_order": False, "shape": shape})
    return file.getvalue()


def as_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a contiguous tensor on the CPU, of any of the types above."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def map_tensor(folder: Path, place: Placed) -> Tensor:
    """Map a tensor of a file; changes stay in memory.

    Raises:
        DataError: For a file that is missing or too short.
    """
    dtype = getattr(torch, place.dtype)
    try:
        return _map(folder / place.file, (place.shape, dtype), place.offset, "c")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / place.file}: cannot be mapped, is it damaged? ({error})") from error


def _bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def _map(path: str | Path, entry: Shape, offset: int, mode: Literal["r+", "c"]) -> Tensor:
    shape, dtype = entry
    return torch.from_numpy(np.memmap(path, _DTYPES[dtype][1], mode, offset, shape)).view(dtype)


def _reserve(descriptor: int, size: int) -> None:
    """Make a file ``size`` bytes long, with the space allocated on the disk where the system supports that."""
    if hasattr(os, "posix_fallocate"):
        # Writing to a mapped page without space on the disk would end the process.
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # of the file system
                raise
    os.truncate(descriptor, size)
