"""Pictures with an EXIF orientation and their labels match, or the mismatch is named."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featsharp.errors import DataError
from featsharp.evaluation.layouts.frames import Frame, decode_labelled, read_orientation
from featsharp.evaluation.layouts.label_files import read_label_file

# How a picture [h, w] is stored, for viewers to show it upright: by EXIF orientation (TIFF 6.0, tag 274).
STORE = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}


def encode(pixels: Any, kind: str, orientation: int) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    tag = {"exif": exif} if orientation != 1 else {}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **options, **tag)
    return buffer.getvalue()


def scene(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of smooth levels, and a label map that is 1 where it is bright."""
    y, x = np.mgrid[:height, :width]
    levels = (255 * (0.7 * y / height + 0.3 * x / width)).astype(np.uint8)
    return np.repeat(levels[..., None], 3, 2), (levels > 120).astype(np.uint8)


def overlap(picture: Image.Image, labels: np.ndarray) -> float:
    """Share of the pixels whose label is that of their level."""
    return float(((np.asarray(picture)[..., 0] > 120) == (labels == 1)).mean())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_read(kind, orientation):
    assert read_orientation(encode(scene(24, 40)[0], kind, orientation)) == orientation


def test_damaged_metadata_is_no_orientation():
    assert read_orientation(b"") == 1
    assert read_orientation(encode(scene(24, 40)[0], "JPEG", 6)[:40]) == 1
    assert read_orientation(encode(scene(24, 40)[0], "PNG", 77)) == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_the_size_shows_which_pixels_labels_lie_on(kind, orientation):
    picture, upright = scene(24, 40)
    stored = STORE[orientation](upright)
    data = encode(STORE[orientation](picture), kind, orientation)
    for labels in (stored, upright):
        image = decode_labelled(data, "x", Frame("labels/x", labels.shape))
        assert overlap(image, labels) > 0.98
    with pytest.raises(DataError, match=r"labels/x: the labels are 24x24 pixels, the image x is 40x24"):
        decode_labelled(data, "x", Frame("labels/x", (24, 24)))


@pytest.mark.parametrize(
    ("orientation", "size"), [(2, (24, 40)), (3, (24, 40)), (4, (24, 40)), (6, (32, 32)), (6, None)]
)
def test_what_no_size_shows_is_refused(orientation, size):
    data = encode(STORE[orientation](scene(*(size or (24, 40)))[0]), "JPEG", orientation)
    with pytest.raises(DataError, match=f"x: labels/x may be for .* EXIF orientation {orientation} turns"):
        decode_labelled(data, "x", Frame("labels/x", size))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("size", [(24, 40), (32, 32)])
def test_labels_with_the_orientation_of_their_picture_match(kind, orientation, size, tmp_path):
    picture, labels = (STORE[orientation](part) for part in scene(*size))
    (tmp_path / "x.tif").write_bytes(encode(labels, kind, orientation))
    read = read_label_file(tmp_path / "x.tif", "labels/x")
    for of_picture in ("JPEG", "PNG", "TIFF"):
        image = decode_labelled(encode(picture, of_picture, orientation), "x", read.frame)
        assert overlap(image, read.values) > 0.98


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("of_picture", [1, 6])
def test_labels_with_an_orientation_of_their_own_are_refused(kind, of_picture, tmp_path):
    picture, labels = scene(32, 32)
    (tmp_path / "x.png").write_bytes(encode(labels, kind, 8))
    frame = read_label_file(tmp_path / "x.png", "labels/x").frame
    message = f"labels/x: the labels have EXIF orientation 8, the image x has {of_picture}; store both upright"
    with pytest.raises(DataError, match=message):
        decode_labelled(encode(picture, "JPEG", of_picture), "x", frame)


def test_missing_and_damaged_pictures_are_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.jpg: no such file"):
        decode_labelled(Path(tmp_path / "x.jpg"), "x.jpg", Frame("labels/x", (1, 1)))
    with pytest.raises(DataError, match=r"x\.jpg: .*empty"):
        decode_labelled(b"", "x.jpg", Frame("labels/x", (1, 1)))
