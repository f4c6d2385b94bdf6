"""The reader of MATLAB files: against scipy's and h5py's writers, and bytes put together here by the format."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.sparse import eye

from featsharp.errors import DataError
from featsharp.evaluation.layouts.mat import read_mat

DOUBLE, CELL, STRUCT = 6, 1, 2


def element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def matrix(kind: int, shape: tuple[int, ...], content: bytes, name: str = "") -> bytes:
    head = element(6, struct.pack("<II", kind, 0))
    dims = element(5, struct.pack(f"<{len(shape)}i", *shape))
    return element(14, head + dims + element(1, name.encode()) + content)


def write(path: Path, *elements: bytes) -> Path:
    header = b"MATLAB 5.0 MAT-file, written by a test".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
    path.write_bytes(header + b"".join(elements))
    return path


CONTENT: dict[str, Any] = {
    "points": np.array([[1.0, 2, np.nan], [4, 5, 6]]),
    "labels": np.arange(24, dtype=np.uint16).reshape(2, 3, 4),
    "mask": np.array([[True], [False]]),
    "text": "hello",
    "rows": np.array(["ab", "cd"]),
    "empty": np.zeros((0, 3)),
    "struct": {"inner": {"x": np.arange(6.0).reshape(2, 3)}, "text": "y"},
}
CELLS = np.empty((2, 2), dtype=object)
CELLS[:] = [["a", np.eye(2)], [np.zeros((0, 0)), "d"]]
STRUCTS = np.array([(1.0, "x"), (2.0, "y")], dtype=[("value", object), ("name", object)])


def write_v73(path: Path) -> None:
    """The same content as MATLAB's save(..., '-v7.3') lays it out."""

    def put(group: h5py.Group, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            inner = group.create_group(name)
            inner.attrs["MATLAB_class"] = np.bytes_("struct")
            for key, entry in value.items():
                put(inner, key, entry)
            return inner
        if isinstance(value, str) or (isinstance(value, np.ndarray) and value.dtype.kind == "U"):
            lines = np.array([[ord(c) for c in line] for line in np.atleast_1d(value)], np.uint16)
            made = group.create_dataset(name, data=lines.T)
            made.attrs["MATLAB_class"] = np.bytes_("char")
            return made
        if value.dtype == object:
            made = group.create_dataset(name, data=references(value))
            made.attrs["MATLAB_class"] = np.bytes_("cell")
            return made
        if value.size == 0:
            made = group.create_dataset(name, data=np.array(value.shape, np.uint64))
            made.attrs["MATLAB_empty"] = np.uint8(1)
            made.attrs["MATLAB_class"] = np.bytes_("double")
            return made
        made = group.create_dataset(name, data=(value.astype(np.uint8) if value.dtype == bool else value).T)
        kind = {"f": "double", "u": "uint16", "b": "logical"}[value.dtype.kind]
        made.attrs["MATLAB_class"] = np.bytes_(kind)
        return made

    def references(values: np.ndarray) -> np.ndarray:
        targets = [
            put(file["#refs#"], f"{len(file['#refs#'])}_{i}", np.atleast_2d(v) if isinstance(v, float) else v).ref
            for i, v in enumerate(values.T.ravel())
        ]
        made = np.empty(len(targets), h5py.ref_dtype)
        made[:] = targets
        return made.reshape(values.T.shape)

    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_group("#refs#")
        for name, value in CONTENT.items():
            put(file, name, value)
        put(file, "cells", CELLS)
        structs = file.create_group("structs")
        structs.attrs["MATLAB_class"] = np.bytes_("struct")
        for field in STRUCTS.dtype.names or ():
            column = np.empty((1, 2), object)
            column[0] = list(STRUCTS[field])
            structs.create_dataset(field, data=references(column))
    with path.open("r+b") as out:
        out.write(b"MATLAB 7.3 MAT-file".ljust(124) + struct.pack("<HH", 0x0200, 0x4D49))


@pytest.mark.parametrize("version", ["7", "6", "7.3"])
def test_every_kind_of_variable_in_every_version(tmp_path: Path, version: str) -> None:
    path = tmp_path / "a.mat"
    if version == "7.3":
        write_v73(path)
    else:
        savemat(path, CONTENT | {"cells": CELLS, "structs": STRUCTS}, do_compression=version == "7")
    variables = read_mat(path)
    assert set(variables) == {*CONTENT, "cells", "structs"}
    for name in ("points", "labels", "mask"):
        np.testing.assert_array_equal(variables[name], CONTENT[name])
        assert variables[name].dtype in (CONTENT[name].dtype, np.uint8)
    assert variables["empty"].shape == (0, 3)
    assert variables["text"] == "hello"
    assert variables["rows"] == ["ab", "cd"]
    np.testing.assert_array_equal(variables["struct"]["inner"]["x"], CONTENT["struct"]["inner"]["x"])
    assert variables["struct"]["text"] == "y"
    first, third, second, fourth = variables["cells"]  # column by column
    assert (first, fourth) == ("a", "d")
    np.testing.assert_array_equal(second, np.eye(2))
    assert third.size == 0
    assert [(row["value"].item(), row["name"]) for row in variables["structs"]] == [(1.0, "x"), (2.0, "y")]


@pytest.mark.parametrize("pattern", ["bsds/train/groundTruth/*.mat", "pf_willow/*/*.mat"])
def test_real_annotations(pattern: str) -> None:
    files = sorted((Path(__file__).resolve().parents[3] / "shared" / "data").glob(pattern))[:8]
    if not files:
        pytest.skip(f"the files {pattern} of shared/data are not here")
    for path in files:
        variables, expected = read_mat(path), loadmat(path)
        if "pts_coord" in variables:
            np.testing.assert_array_equal(variables["pts_coord"], expected["pts_coord"])
            continue
        assert len(variables["groundTruth"]) == expected["groundTruth"].size
        for mine, theirs in zip(variables["groundTruth"], expected["groundTruth"].ravel(order="F"), strict=True):
            for field in ("Segmentation", "Boundaries"):
                np.testing.assert_array_equal(mine[field], theirs[field][0, 0])


def test_every_cut_of_a_file_is_a_message(tmp_path: Path) -> None:
    names = struct.pack("<I", 4 << 16 | 5) + struct.pack("<i", 4) + element(1, b"key\0")
    content = names + matrix(DOUBLE, (2, 2), element(9, np.arange(4.0).tobytes()))
    whole = write(tmp_path / "whole.mat", matrix(STRUCT, (1, 1), content, "s")).read_bytes()
    assert read_mat(tmp_path / "whole.mat")["s"]["key"].shape == (2, 2)
    path = tmp_path / "cut.mat"
    for length in range(129, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.mat is damaged"):
            read_mat(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a MATLAB file"),
        (b"x" * 400, "is not a MATLAB file"),
        (b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n", "is damaged"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.mat"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"other\.mat {message}"):
        read_mat(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.mat cannot be read"):
        read_mat(tmp_path / "gone.mat")


def test_what_is_not_read_says_so(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"s": eye(3, format="csc")})
    with pytest.raises(DataError, match=r"a\.mat holds a sparse matrix"):
        read_mat(tmp_path / "a.mat")


def test_damage_inside(tmp_path: Path) -> None:
    broken = {
        "values": matrix(DOUBLE, (2, 2), element(9, np.arange(3.0).tobytes()), "x"),  # three of four
        "cells": matrix(CELL, (1, 1 << 30), b"", "x"),
        "packed": struct.pack("<II", 15, 4) + b"abcd",
        "cut": struct.pack("<II", 15, 12) + zlib.compress(matrix(DOUBLE, (1, 1), b""))[:12],
        "deep": _nested(3000),
    }
    for name, content in broken.items():
        with pytest.raises(DataError, match=rf"{name}\.mat is damaged"):
            read_mat(write(tmp_path / f"{name}.mat", content))


def _nested(depth: int) -> bytes:
    content = matrix(DOUBLE, (1, 1), element(9, bytes(8)))
    for _ in range(depth):
        content = matrix(CELL, (1, 1), content, "x")
    return content


@pytest.mark.parametrize(("package", "version"), [("scipy", "7"), ("h5py", "7.3")])
def test_without_the_package_the_command_to_install_it_is_named(tmp_path: Path, package: str, version: str) -> None:
    path = tmp_path / "a.mat"
    write_v73(path) if version == "7.3" else savemat(path, {"x": 1.0})
    # A folder of that name without the package in it, first on the path.
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom featsharp.evaluation.layouts.mat import read_mat\n"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}read_mat({str(path)!r})"], capture_output=True, text=True, check=False
    )
    assert f'read by the package {package}; run: pip install "featsharp[eval]"' in run.stderr
