"""RGB-D frames of a moving camera, in the files that tools for 7-Scenes write.

ROOT/NAME.color.jpg (or .png)      the picture
ROOT/NAME.depth.png                16 bit, millimetres along the optical axis; 0 and 65535 where there is no depth
ROOT/NAME.pose.txt                 4 x 4, from camera to world, metres
ROOT/camera-intrinsics.txt         3 x 3, in pixels, of pictures and depth alike
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from featsharp.errors import DataError
from featsharp.files import list_files

INTRINSICS = "camera-intrinsics.txt"
LAYOUT = f"expected NAME.color.jpg with NAME.depth.png and NAME.pose.txt, and {INTRINSICS} beside them"
_COLOURS = (".color.jpg", ".color.png")
_NO_DEPTH = 65535
# Largest deviation of the product of a rotation and its transpose from the identity.
_ROUNDING = 1e-2


class RgbdFrame(NamedTuple):
    """Files of a frame."""

    color: Path
    depth: Path
    pose: Path


def find_frames(root: Path) -> list[RgbdFrame]:
    """List the frames of a folder by name; the depth and the pose of one may be missing.

    Raises:
        DataError: When there is none.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {LAYOUT}")
    names = [name for name in list_files(root, deep=False) if name.endswith(_COLOURS)]
    if not names:
        raise DataError(f"{root} holds no RGB-D frame; {LAYOUT}")
    stems = [name.rsplit(".", 2)[0] for name in names]
    return [
        RgbdFrame(root / name, root / f"{stem}.depth.png", root / f"{stem}.pose.txt")
        for name, stem in zip(names, stems, strict=True)
    ]


def read_intrinsics(root: Path) -> np.ndarray:
    """Read the camera matrix [3, 3] of a folder, float64; DataError where it is missing or none."""
    path = root / INTRINSICS
    matrix = _read_matrix(path, 3)
    if not np.array_equal(matrix[2], [0, 0, 1]) or min(matrix[0, 0], matrix[1, 1]) <= 0:
        raise DataError(f"{path} is no camera matrix: rows fx 0 cx, 0 fy cy, 0 0 1 with positive focal lengths")
    return matrix


def read_pose(path: Path) -> np.ndarray:
    """Read a pose [4, 4], float64; DataError where it is missing or not rigid."""
    pose = _read_matrix(path, 4)
    rotation = pose[:3, :3]
    if not np.array_equal(pose[3], [0, 0, 0, 1]) or np.abs(rotation @ rotation.T - np.eye(3)).max() > _ROUNDING:
        raise DataError(f"{path} is no pose of a camera: a rotation and a shift, with a last row 0 0 0 1")
    return pose


def read_depth(path: Path) -> np.ndarray:
    """Read depth [H, W] in metres, float64, 0 where there is none; DataError where it is missing or damaged."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            if not image.mode.startswith("I"):
                raise DataError(f"{path}: depth is one number of 16 bits per pixel; this image is of mode {image.mode}")
            depth = np.asarray(image).astype(np.float64)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; every frame needs its depth") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded as depth ({error})") from error
    depth[depth == _NO_DEPTH] = 0
    return depth / 1000


def _read_matrix(path: Path, size: int) -> np.ndarray:
    try:
        matrix = np.array([line.split() for line in path.read_text(encoding="ascii").splitlines() if line.strip()])
        numbers = matrix.astype(np.float64)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {LAYOUT}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a matrix ({error})") from error
    if numbers.shape != (size, size) or not np.isfinite(numbers).all():
        raise DataError(f"{path}: expected {size} x {size} finite numbers; got shape {numbers.shape}")
    return numbers
