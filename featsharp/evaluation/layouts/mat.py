"""MATLAB files, in which many data sets keep their annotations: versions 4 to 7 by scipy.io, 7.3 (HDF5) by h5py."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from featsharp.errors import DataError, MissingDependencyError

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_COMPRESSION = 1032  # of zlib: no variable has more elements than that times the bytes of its file
_ONLY = "only numbers, texts, cells and structs are read"


def read_mat(path: str | Path) -> dict[str, Any]:
    """Read the variables of a MATLAB file by name.

    A numeric or logical matrix becomes an array of MATLAB's shape (a number is [1, 1]), of the type in the file; a text
    becomes str, a text of several rows a list of them; a cell array becomes the list of its cells and a struct array
    the list of its dicts, both column by column; a 1 x 1 struct becomes its dict.

    Raises:
        DataError: For a file that is missing, damaged or no MATLAB file; for objects, sparse matrices and functions.
        MissingDependencyError: Without scipy, or h5py for version 7.3.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(520)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if _HDF5_SIGNATURE in (head[:8], head[512:]):
        read = _read_hdf5
    elif head[126:128] in (b"IM", b"MI"):
        read = _read_scipy
    else:
        raise DataError(f"{path} is not a MATLAB file of version 5 to 7.3")
    try:
        return read(path)
    except (MissingDependencyError, DataError):
        raise
    except Exception as error:  # damaged files raise any kind of exception in both packages
        raise DataError(f"{path} is damaged: {str(error) or type(error).__name__}") from None


def _read_scipy(path: str | Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat, whosmat
    except ImportError as error:
        raise _missing("scipy", path) from error
    # scipy allocates as many cells as a damaged header claims.
    most = _MAX_COMPRESSION * Path(path).stat().st_size
    for name, shape, _ in whosmat(path):
        if math.prod(shape) > most:
            raise ValueError(f"variable {name!r} of shape {shape} is larger than the file")
    content = loadmat(path, chars_as_strings=True)
    return {name: _from_scipy(value, path) for name, value in content.items() if not name.startswith("__")}


def _from_scipy(value: Any, path: str | Path) -> Any:
    # Subclasses of arrays are functions and objects.
    if type(value) is not np.ndarray:
        raise DataError(f"{path} holds {_kind_of(value)}, which is not read here; {_ONLY}")
    items = value.ravel(order="F")
    if value.dtype.names is not None:
        structs = [{name: _from_scipy(item[name], path) for name in value.dtype.names} for item in items]
        return structs[0] if len(structs) == 1 else structs
    if value.dtype.kind == "O":
        return [_from_scipy(item, path) for item in items]
    if value.dtype.kind in "US":
        texts = [str(item) for item in items]
        return texts[0] if len(texts) == 1 else texts or ""
    return value


def _kind_of(value: Any) -> str:
    return "a sparse matrix" if hasattr(value, "tocsc") else "an object or a function"


def _read_hdf5(path: str | Path) -> dict[str, Any]:
    try:
        import h5py
    except ImportError as error:
        raise _missing("h5py", path) from error
    with h5py.File(path, "r") as file:
        return {name: _from_hdf5(file, value, path) for name, value in file.items() if not name.startswith("#")}


def _from_hdf5(file: Any, value: Any, path: str | Path) -> Any:
    import h5py

    kind = bytes(value.attrs.get("MATLAB_class", b"")).decode()
    if "MATLAB_sparse" in value.attrs or kind == "function_handle" or "MATLAB_object_decode" in value.attrs:
        raise DataError(f"{path} holds a sparse matrix, an object or a function, which is not read here; {_ONLY}")
    if isinstance(value, h5py.Group):
        fields = {name: _from_hdf5(file, field, path) for name, field in value.items()}
        # The fields of a struct array are matrices of references without a class.
        if fields and all("MATLAB_class" not in field.attrs for field in value.values()):
            return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]
        return fields
    content = value[()]
    if "MATLAB_empty" in value.attrs:  # the data is the shape
        if kind == "cell":
            return []
        return np.zeros(tuple(int(n) for n in content))
    if content.dtype == h5py.ref_dtype:
        return [_from_hdf5(file, file[reference], path) for reference in content.ravel()]
    content = content.T  # HDF5 is row-major, MATLAB column-major
    if kind == "char":
        rows = ["".join(map(chr, row)) for row in content.tolist()]
        return rows[0] if len(rows) == 1 else rows or ""
    return content.astype(bool) if kind == "logical" else content


def _missing(package: str, path: str | Path) -> MissingDependencyError:
    return MissingDependencyError(f'{path} is read by the package {package}; run: pip install "featsharp[eval]"')
