"""The reader of MATLAB files: against bytes put together here by the format's description, and against SciPy."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from featsharp.errors import DataError
from featsharp.evaluation.mat import read_mat

DOUBLE, UINT16, CHAR, CELL, STRUCT, SPARSE = 6, 11, 4, 1, 2, 5


def element(kind: int, data: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def small(kind: int, data: bytes, order: str = "<") -> bytes:
    """An element of up to four bytes, packed into its tag."""
    return struct.pack(order + "I", len(data) << 16 | kind) + data.ljust(4, b"\0")


def matrix(
    kind: int, shape: tuple[int, ...], content: bytes, name: str = "", flags: int = 0, order: str = "<"
) -> bytes:
    head = element(6, struct.pack(order + "II", flags << 8 | kind, 0), order)
    dims = element(5, struct.pack(f"{order}{len(shape)}i", *shape), order)
    return element(14, head + dims + element(1, name.encode(), order) + content, order)


def write(path: Path, *elements: bytes, order: str = "<") -> Path:
    header = b"MATLAB 5.0 MAT-file, written by a test".ljust(124) + struct.pack(order + "H", 0x0100)
    path.write_bytes(header + struct.pack(order + "H", 0x4D49) + b"".join(elements))
    return path


def test_a_double_matrix_stored_as_bytes(tmp_path: Path) -> None:
    # Column by column, in the smallest type that holds the numbers.
    path = write(tmp_path / "a.mat", matrix(DOUBLE, (2, 3), element(2, bytes([1, 4, 2, 5, 3, 6])), "points"))
    found = read_mat(path)["points"]
    assert found.dtype == np.float64
    assert found.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_small_elements_and_the_other_byte_order(tmp_path: Path) -> None:
    content = matrix(DOUBLE, (1, 2), small(3, struct.pack(">2h", -7, 300), ">"), "x", order=">")
    found = read_mat(write(tmp_path / "a.mat", content, order=">"))["x"]
    assert found.tolist() == [[-7, 300]]
    assert found.dtype == np.dtype(np.float64)  # native


def test_compressed_cells_of_structs(tmp_path: Path) -> None:
    """The nesting of the boundary annotations of BSDS."""
    labels = matrix(UINT16, (1, 2), small(4, struct.pack("<2H", 1, 999)))
    edges = matrix(9, (2, 1), small(2, bytes([0, 1])), flags=0x02)
    names = small(5, struct.pack("<i", 8)) + element(1, b"labels\0\0edges\0\0\0")
    cells = matrix(CELL, (1, 1), matrix(STRUCT, (1, 1), names + labels + edges), "truth")
    packed = zlib.compress(cells)
    path = write(tmp_path / "a.mat", struct.pack("<II", 15, len(packed)) + packed)
    (found,) = read_mat(path)["truth"]
    assert found["labels"].tolist() == [[1, 999]]
    assert found["labels"].dtype == np.uint16
    assert found["edges"].tolist() == [[False], [True]]
    assert found["edges"].dtype == bool


def test_two_variables_and_text_of_two_rows(tmp_path: Path) -> None:
    one = matrix(CHAR, (1, 3), small(16, b"cat"), "name")
    two = matrix(CHAR, (2, 2), element(4, "acbd".encode("utf-16-le")), "rows")
    assert read_mat(write(tmp_path / "a.mat", one, two)) == {"name": "cat", "rows": ["ab", "cd"]}


def test_as_scipy_reads_it(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io")
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind}_{number}": (rng.standard_normal(shape) * 50).astype(kind)
        for kind in ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "c16", "?")
        for number, shape in enumerate([(3, 4), (2, 3, 4), (1, 1), (0, 3)])
    }
    nested = {"a": {"b": np.arange(6.0).reshape(2, 3), "text": "hello"}}
    cells = np.empty((2, 2), dtype=object)
    cells[:] = [["a", np.eye(2)], [np.zeros((0, 0)), "d"]]
    structs = np.array([(1.0, "x"), (2.0, "y")], dtype=[("value", object), ("name", object)])
    for compressed in (False, True):
        path = tmp_path / f"{compressed}.mat"
        io.savemat(path, arrays | nested | {"cells": cells, "structs": structs}, do_compression=compressed)
        found, expected = read_mat(path), io.loadmat(path)
        for name in arrays:
            assert found[name].shape == expected[name].shape
            np.testing.assert_array_equal(found[name], arrays[name])
            assert found[name].dtype == arrays[name].dtype
        assert found["a"]["text"] == "hello"
        np.testing.assert_array_equal(found["a"]["b"], nested["a"]["b"])
        first, third, second, fourth = found["cells"]  # column by column
        assert (first, fourth) == ("a", "d")
        np.testing.assert_array_equal(second, np.eye(2))
        assert third.size == 0
        assert [row["name"] for row in found["structs"]] == ["x", "y"]
        assert [row["value"].item() for row in found["structs"]] == [1.0, 2.0]


@pytest.mark.parametrize("pattern", ["bsds/train/groundTruth/*.mat", "pf_willow/*/*.mat"])
def test_real_annotations_as_scipy_reads_them(pattern: str) -> None:
    files = sorted((Path(__file__).resolve().parents[3] / "shared" / "data").glob(pattern))[:8]
    if not files:
        pytest.skip(f"the files {pattern} of shared/data are not here")
    io = pytest.importorskip("scipy.io")
    for path in files:
        found, expected = read_mat(path), io.loadmat(path)
        if "pts_coord" in found:
            np.testing.assert_array_equal(found["pts_coord"], expected["pts_coord"])
            continue
        assert len(found["groundTruth"]) == expected["groundTruth"].size
        for mine, theirs in zip(found["groundTruth"], expected["groundTruth"].ravel(order="F"), strict=True):
            for field in ("Segmentation", "Boundaries"):
                np.testing.assert_array_equal(mine[field], theirs[field][0, 0])


def test_every_cut_of_a_file_is_a_message(tmp_path: Path) -> None:
    names = small(5, struct.pack("<i", 4)) + element(1, b"key\0")
    whole = write(
        tmp_path / "whole.mat",
        matrix(STRUCT, (1, 1), names + matrix(DOUBLE, (2, 2), element(9, np.arange(4.0).tobytes())), "s"),
    ).read_bytes()
    assert read_mat(tmp_path / "whole.mat")["s"]["key"].shape == (2, 2)
    path = tmp_path / "cut.mat"
    for length in range(129, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.mat is damaged"):
            read_mat(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a MATLAB file"),
        (b"x" * 400, "not a MATLAB file"),
        (b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n", "7.3 file .* '-v7'"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.mat"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"other\.mat .*{message}"):
        read_mat(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.mat cannot be read"):
        read_mat(tmp_path / "gone.mat")


def test_what_is_not_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.mat holds a sparse matrix"):
        read_mat(write(tmp_path / "a.mat", matrix(SPARSE, (2, 2), b"", "s")))


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
    found = matrix(DOUBLE, (1, 1), small(2, b"\1"))
    for _ in range(depth):
        found = matrix(CELL, (1, 1), found, "x")
    return found
