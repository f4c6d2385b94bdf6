"""Image files come out as upright 8-bit RGB, and damaged ones as a DataError that names them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.data import IMAGE_EXTENSIONS, decode_image, image_to_tensor
from featsharp.data.images import is_image_name
from featsharp.errors import DataError, InputError

GREY = 128  # what shows through transparent pixels


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def random_pixels(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def decoded(data: bytes | str | Path | Image.Image) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.array(image)


def smooth(height: int = 33, width: int = 47) -> np.ndarray:
    """A colour gradient, which lossy formats keep closely."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 2], -1).astype(np.uint8)


def test_rgb_is_exact_from_bytes_path_and_image(tmp_path: Path) -> None:
    pixels = random_pixels(13, 21, 3)
    image = Image.fromarray(pixels)
    path = tmp_path / "x.png"
    path.write_bytes(encode(image))
    for data in (path.read_bytes(), path, str(path), image, Image.open(path)):
        assert np.array_equal(decoded(data), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "PNG"])
def test_common_formats(kind: str) -> None:
    pixels = smooth()
    tolerance = {"JPEG": 12, "WEBP": 24, "GIF": 40}.get(kind, 0)
    assert np.abs(decoded(encode(Image.fromarray(pixels), kind)).astype(int) - pixels).max() <= tolerance


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (8, 6))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    indices = random_pixels(6, 8) % 3
    image.putdata(indices.ravel().tolist())
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    assert np.array_equal(decoded(encode(image)), colours[indices])
    colours[1] = GREY
    assert np.array_equal(decoded(encode(image, transparency=1)), colours[indices])
    assert np.array_equal(decoded(encode(image, "GIF", transparency=1)), colours[indices])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = smooth(32, 48)
    # How an upright picture is laid out in a file of that orientation.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **exact.get(kind, {}))
    result = decode_image(data)
    assert np.abs(np.array(result).astype(int) - upright).max() <= 6
    assert np.abs(np.array(decode_image(data, upright=False)).astype(int) - stored).max() <= 6
    assert np.array_equal(decoded(result), np.array(result)), "decoding the result again must not turn it again"


def test_orientation_of_16_bit_grey() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = random_pixels(5, 9, dtype=np.uint16)
    result = decoded(encode(Image.fromarray(values), exif=exif))
    assert np.array_equal(result[..., 0], np.rint(np.rot90(values, -1) / 257))


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00garbage that is no TIFF header", b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_a_good_image(exif: bytes) -> None:
    pixels = smooth()
    assert np.abs(decoded(encode(Image.fromarray(pixels), "JPEG", exif=exif)).astype(int) - pixels).max() <= 12


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (12, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decoded(data).astype(int) - (200, 0, 0)).max() <= 4


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 500)])
def test_tiny_images_decode(size: tuple[int, int]) -> None:
    assert decode_image(encode(Image.new("RGB", size))).size == size


def test_the_given_image_is_left_alone() -> None:
    image = Image.new("RGBA", (5, 4), (10, 20, 30, 0))
    decode_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (10, 20, 30, 0)
    same = Image.new("RGB", (5, 4))
    decode_image(same).putpixel((0, 0), (9, 9, 9))
    assert same.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_truncated_files(kind: str, share: float) -> None:
    data = encode(Image.fromarray(random_pixels(40, 50, 3)), kind)
    with pytest.raises(DataError, match=r"^folder/half\.img: "):
        decode_image(data[: int(len(data) * share)], name="folder/half.img")


def test_files_that_are_no_image(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.jpg", tmp_path / "text.jpg"
    empty.touch()
    text.write_text("not a picture at all")
    with pytest.raises(DataError, match=r"empty\.jpg: the file is empty \(0 bytes\)"):
        decode_image(empty)
    with pytest.raises(DataError, match=r"text\.jpg: not an image that can be read; known are JPEG"):
        decode_image(str(text))
    with pytest.raises(DataError, match=r"absent\.jpg: no such file"):
        decode_image(tmp_path / "absent.jpg")
    with pytest.raises(DataError, match="a folder; give a file"):
        decode_image(tmp_path)


def test_formats_that_run_other_programs_are_not_opened() -> None:
    with pytest.raises(DataError, match="not an image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow warns at the first and raises at the second
def test_decompression_bomb(side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="bomb: too many pixels"):
        decode_image(bomb, name="bomb")


def test_image_to_tensor() -> None:
    pixels = random_pixels(5, 9, 3)
    tensor = image_to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 5, 9)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert np.array_equal(tensor.numpy(), pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    with pytest.raises(InputError, match="mode RGB, got L; pass it through decode_image"):
        image_to_tensor(Image.new("L", (4, 4)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", True),
        ("deep/er/B.JPEG", True),
        ("./a.png", True),
        ("../../up.png", True),
        ("/abs.tiff", True),
        ("._a.jpg", False),
        (".cache/a.jpg", False),
        ("a.json", False),
        ("a.jpg.txt", False),
        ("jpg", False),
        ("a.eps", False),
    ],
)
def test_image_names(name: str, expected: bool) -> None:
    assert is_image_name(name) is expected


def test_every_extension_counts() -> None:
    assert all(is_image_name(f"x{extension}") for extension in IMAGE_EXTENSIONS)
