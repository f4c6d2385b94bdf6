"""Layouts of depth: twins with the rules of the published files, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featsharp.errors import DataError
from featsharp.evaluation.layouts.depth import open_depth
from featsharp.evaluation.layouts.frames import Frame

SIZE = (24, 32)


def make_frames(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *SIZE, 3), np.uint8), rng.uniform(0.7, 9.9, (count, *SIZE)).astype(np.float32)


def write_labelled(root: Path, count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """MATLAB writes images [H, W, 3, N] and depths [H, W, N] with its axes from last to first, numbers from 1."""
    h5py, io = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    pictures, depths = make_frames(count)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = pictures.transpose(1, 2, 3, 0).T
        file["depths"] = depths.transpose(1, 2, 0).T
    numbers = np.arange(1, count + 1)[:, None]
    io.savemat(root / "splits.mat", {"trainNdxs": numbers[1:], "testNdxs": numbers[:1]})
    return pictures, depths


def test_the_labelled_set(tmp_path):
    pictures, depths = write_labelled(tmp_path)
    data = open_depth(tmp_path)
    assert (data.layout, len(data.train), len(data.val)) == ("nyu-labelled", 4, 1)
    assert data.scored.size == (426, 560)
    for entry, number in ((data.val[0], 0), (data.train[2], 3)):
        assert np.array_equal(np.asarray(entry.decode(Frame("depth", SIZE))), pictures[number])
        assert np.array_equal(data.read(entry), depths[number].astype(np.float64))
        assert entry.image == f"nyu_depth_v2_labeled.mat, frame {number + 1}"
    assert data.train[0].keys() != data.train[1].keys()


def test_a_labelled_set_of_other_variables(tmp_path):
    h5py = pytest.importorskip("h5py")
    write_labelled(tmp_path)
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.zeros((5, *SIZE, 3), np.uint8)
    data = open_depth(tmp_path)
    with pytest.raises(DataError, match=r"images of shape \(5, 24, 32, 3\) are not those of NYU Depth v2"):
        data.val[0].decode(Frame("depth"))
    with pytest.raises(DataError, match="depths cannot be read"):
        data.read(data.val[0])
    pytest.importorskip("scipy.io").savemat(tmp_path / "splits.mat", {"testNdxs": np.ones((1, 1))})
    with pytest.raises(DataError, match=r"splits\.mat has no trainNdxs"):
        open_depth(tmp_path)


def test_the_folders_of_lists(tmp_path):
    pictures, depths = make_frames(3)
    for number in range(3):
        folder = tmp_path / f"room_{number}"
        folder.mkdir()
        Image.fromarray(pictures[number]).save(folder / "rgb_1.png")
        Image.fromarray((1000 * depths[number]).astype(np.uint16)).save(folder / "sync_depth_1.png")
    line = "/room_{0}/rgb_1.png /room_{0}/sync_depth_1.png 518.8579\n"
    (tmp_path / "nyu_train.txt").write_text(line.format(0) + line.format(2))
    (tmp_path / "nyu_test.txt").write_text(line.format(1) + "room_1/rgb_2.png None 518.8579\n")
    data = open_depth(tmp_path)
    assert (data.layout, len(data.train), len(data.val)) == ("nyu", 2, 1)
    assert np.array_equal(np.asarray(data.val[0].decode(Frame("depth", SIZE))), pictures[1])
    assert data.read(data.train[1]) == pytest.approx(depths[2], abs=1e-3)
    (tmp_path / "nyu_train.txt").write_text("room_0/rgb_1.png")
    with pytest.raises(DataError, match=r"nyu_train\.txt, line 1: expected a picture and its depth"):
        open_depth(tmp_path)


def test_frames_of_a_camera_are_split_apart_in_time(tmp_path):
    (tmp_path / "camera-intrinsics.txt").write_text("1 0 0\n0 1 0\n0 0 1\n")
    for number in range(20):
        (tmp_path / f"{number:03d}.color.jpg").touch()
    data = open_depth(tmp_path)
    assert [pair.image[:3] for pair in data.train] == [f"{number:03d}" for number in range(13)]
    assert [pair.label for pair in data.val] == [f"{number:03d}.depth.png" for number in range(15, 20)]
    assert data.scored is None


def test_a_folder_of_something_else_is_told_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"nyu-labelled: nyu_depth_v2_labeled\.mat and splits\.mat.*nyu_train\.txt"):
        open_depth(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_depth(tmp_path / "none")
    (tmp_path / "nyu_train.txt").touch()
    (tmp_path / "nyu_test.txt").touch()
    with pytest.raises(DataError, match="has no training pictures; layout 'nyu' expects nyu_train"):
        open_depth(tmp_path)
