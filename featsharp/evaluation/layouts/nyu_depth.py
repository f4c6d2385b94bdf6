"""NYU Depth v2: pictures of rooms with the distance of every pixel in metres, 795 to train on and 654 to test on.

nyu_depth_v2_labeled.mat     the data set's own file (HDF5), with splits.mat beside it: numbers from 1, of trainNdxs and
                             testNdxs; ``depths`` are filled in
{train,test}/**/rgb_X.jpg    the usual folders of methods that predict depth, with sync_depth_X.png beside each picture:
                             16 bit, millimetres

Both have 0 where there is no depth. MATLAB's arrays lie in HDF5 with their axes turned around: [picture, column, row].
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featsharp.data.images import decode_image
from featsharp.errors import DataError, MissingDependencyError
from featsharp.evaluation.keys import file_key
from featsharp.evaluation.layouts.layout import Sample
from featsharp.evaluation.layouts.mat import read_mat
from featsharp.evaluation.layouts.rgbd import read_depth
from featsharp.files import list_files

LABELED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
LAYOUT = (
    f"expected {LABELED} with {SPLITS} beside it, or train and test with rgb_X.jpg and sync_depth_X.png side by side"
)


def list_nyu_depth(root: Path) -> tuple[list[Sample], list[Sample]]:
    """List the training and the test pictures; no picture is read.

    Raises:
        DataError: When the folder has neither layout, a split is empty, or a number of the lists is out of range.
        MissingDependencyError: Without h5py or scipy, where they are needed.
    """
    if (root / LABELED).is_file():
        splits = _list_labeled(root)
    elif (root / "train").is_dir() and (root / "test").is_dir():
        splits = _list_folder(root, "train"), _list_folder(root, "test")
    else:
        raise DataError(f"{root} is no NYU Depth v2; {LAYOUT}")
    for split, images in zip(("training", "test"), splits, strict=True):
        if not images:
            raise DataError(f"{root} has no {split} pictures; {LAYOUT}")
    return splits


def _list_folder(root: Path, split: str) -> list[Sample]:
    images = []
    for name in list_files(root / split):
        picture = Path(name)
        if not picture.name.startswith("rgb_") or picture.suffix.lower() not in (".jpg", ".png"):
            continue
        depth = picture.with_name(f"sync_depth_{picture.stem.removeprefix('rgb_')}.png").as_posix()
        images.append(_folder_image(root, f"{split}/{name}", f"{split}/{depth}"))
    return images


def _folder_image(root: Path, picture: str, depth: str) -> Sample:
    return Sample(
        picture,
        [file_key(root, picture), file_key(root, depth)],
        lambda: decode_image(root / picture, name=picture),
        lambda: read_depth(root / depth).astype(np.float32),
    )


def _list_labeled(root: Path) -> tuple[list[Sample], list[Sample]]:
    path = root / LABELED
    count = len(_read_hdf5(path, "depths", None))
    lists = read_mat(root / SPLITS)
    splits = []
    for field in ("trainNdxs", "testNdxs"):
        numbers = np.asarray(lists.get(field, []), np.float64).ravel()
        wrong = numbers[(numbers < 1) | (numbers > count) | (numbers != np.floor(numbers))]
        if len(wrong):
            raise DataError(f"{root / SPLITS}: {field} holds {wrong[0]:g}; pictures are numbered from 1 to {count}")
        splits.append([_labeled_image(path, int(number)) for number in numbers])
    return splits[0], splits[1]


def _labeled_image(path: Path, number: int) -> Sample:
    def image() -> Image.Image:
        pixels = _read_hdf5(path, "images", number - 1)  # [3, W, H]
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(2, 1, 0)))

    def depth() -> np.ndarray:
        metres: np.ndarray = _read_hdf5(path, "depths", number - 1).T.astype(np.float32)
        return np.where(np.isfinite(metres), metres, 0)

    return Sample(f"{path.name}#{number}", [file_key(path.parent, path.name), number], image, depth)


def _read_hdf5(path: Path, name: str, index: int | None) -> Any:
    """Read one picture of a variable; None for its shape alone, as zeros that take no memory."""
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            f'{path} is read by the package h5py; run: pip install "featsharp[eval]"'
        ) from error
    try:
        with h5py.File(path, "r") as file:
            variable = file[name]
            wanted = (3, "uint8") if name == "images" else (2, "float32")
            shape = variable.shape
            if len(shape) != wanted[0] + 1 or variable.dtype.name != wanted[1] or math.prod(shape) == 0:
                raise DataError(f"{path}: {name} is {variable.dtype} {shape}; {LAYOUT}")
            return np.broadcast_to(np.uint8(0), shape) if index is None else variable[index]
    except DataError:
        raise
    except Exception as error:  # damaged files raise any kind of exception
        raise DataError(f"{path} cannot be read as {LABELED}: {error}") from error
