"""NYU Depth v2 as it is published: the labelled set in one MATLAB file, or the folders of lists of frames."""

from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from featsharp.errors import DataError, MissingDependencyError
from featsharp.evaluation.keys import file_key
from featsharp.evaluation.layouts.frames import Frame
from featsharp.evaluation.layouts.labels import LabelledImage
from featsharp.evaluation.layouts.layout import Layout
from featsharp.evaluation.layouts.mat import read_mat
from featsharp.evaluation.layouts.rgbd import read_depth
from featsharp.files import read_lines

LABELLED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
LISTS = {"train": "nyu_train.txt", "val": "nyu_test.txt"}


class LabelledEntry(NamedTuple):
    """One of the frames of the labelled set, number 0 the first; stands where a :class:`LabelledImage` does."""

    path: Path
    number: int

    @property
    def image(self) -> str:
        """Name of the picture."""
        return f"{self.path.name}, frame {self.number + 1}"

    def decode(self, frame: Frame) -> Image.Image:
        """Read the RGB picture; DataError where the file is damaged."""
        return Image.fromarray(np.ascontiguousarray(_read_entry(self, "images", 3).transpose(2, 1, 0)))

    def keys(self) -> list[object]:
        """Return JSON values that change with the picture, and with its label."""
        return [[*file_key(self.path.parent, self.path.name), self.number]] * 2


def read_labelled(root: Path) -> tuple[list[LabelledEntry], list[LabelledEntry]]:
    """List the 795 frames to train on and the 654 to measure on; DataError where a file is missing or another."""
    path = root / LABELLED
    splits = []
    for name in ("trainNdxs", "testNdxs"):
        numbers = read_mat(root / SPLITS).get(name)
        if not isinstance(numbers, np.ndarray) or numbers.dtype.kind not in "uif" or numbers.min(initial=1) < 1:
            raise DataError(f"{root / SPLITS} has no {name}, the numbers from 1 of frames of {LABELLED}")
        splits.append([LabelledEntry(path, int(number) - 1) for number in numbers.ravel()])
    return splits[0], splits[1]


def read_labelled_depth(entry: LabelledEntry) -> np.ndarray:
    """Read depth [H, W] in metres, float64, holes filled as published; DataError where the file is damaged."""
    return np.nan_to_num(_read_entry(entry, "depths", 2).T.astype(np.float64), nan=0, posinf=0, neginf=0)


def read_folders(root: Path) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """List the pictures of both lists, whose lines are ``SCENE/rgb_N.jpg SCENE/sync_depth_N.png FOCAL``.

    Raises:
        DataError: For a list that is missing, and a line that is no such one.
    """
    splits = []
    for name in LISTS.values():
        pairs = []
        for number, line in enumerate(read_lines(root / name), 1):
            words = line.split()
            if not words or words[1:2] == ["None"]:  # a frame without depth
                continue
            if len(words) < 2:
                raise DataError(f"{root / name}, line {number}: expected a picture and its depth, got {line[:60]!r}")
            image, depth = (PurePosixPath(word.lstrip("/")).as_posix() for word in words[:2])
            pairs.append(LabelledImage(root, image, depth))
        splits.append(pairs)
    return splits[0], splits[1]


def read_folders_depth(pair: LabelledImage) -> np.ndarray:
    """Read depth [H, W] in metres, float64, 0 where there is none; DataError where it is missing or damaged."""
    return read_depth(pair.root / pair.label)


def _read_entry(entry: LabelledEntry, variable: str, dimensions: int) -> Any:
    """Read one frame of a variable, whose axes lie in the file from last to first."""
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            f'{entry.path} is read by the package h5py; run: pip install "featsharp[eval]"'
        ) from error
    try:
        with h5py.File(entry.path, "r") as file:
            content = file[variable]
            if content.ndim != dimensions + 1 or (dimensions == 3 and content.shape[1] != 3):
                raise DataError(f"{entry.path}: {variable} of shape {content.shape} are not those of NYU Depth v2")
            return content[entry.number]
    except (OSError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(f"{entry.image}: {variable} cannot be read ({type(error).__name__}: {error})") from error


LABELLED_LAYOUT = Layout(
    f"{LABELLED} and {SPLITS} (NYU Depth v2, labelled set)",
    lambda root: (root / LABELLED).is_file() and (root / SPLITS).is_file(),
    read_labelled,
)

FOLDERS_LAYOUT = Layout(
    f"{' and '.join(LISTS.values())}, lines 'SCENE/rgb_N.jpg SCENE/sync_depth_N.png FOCAL', with their files (NYU "
    "Depth v2, depth in millimetres)",
    lambda root: all((root / name).is_file() for name in LISTS.values()),
    read_folders,
)
