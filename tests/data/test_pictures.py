"""Objects given for pictures: taken with the right pixels, or refused by a message that says what is taken."""

import base64
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode

from featsharp import create_encoder
from featsharp.data import decode_image, picture_to_tensor
from featsharp.errors import DataError, FeatSharpError, InputError
from featsharp.evaluation.fidelity import FidelityMeter
from featsharp.evaluation.zoom import ZoomMeter
from featsharp.implicit.fit import FitConfig, Fitter
from featsharp.model import SharpEncoder
from featsharp.visualization.figures.pca import pca_row

H, W = 40, 56
RGBA = np.random.default_rng(0).integers(0, 256, (H, W, 4), np.uint8)
RGB, GREY = RGBA[..., :3], RGBA[..., 0]
OVER_GREY = RGB * (RGBA[..., 3:] / 255.0) + 128 * (1 - RGBA[..., 3:] / 255.0)
ENCODED = io.BytesIO()
Image.fromarray(RGB).save(ENCODED, "PNG")
PNG = ENCODED.getvalue()


def tensor(pixels: np.ndarray, kind: torch.dtype | None = None) -> torch.Tensor:
    """[c, H, W], as torch has pictures."""
    result = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))
    return result if kind is None else result.to(kind)


def stacked(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.reshape(H, W, 1), 3, -1)


@pytest.fixture(scope="module")
def encoder() -> SharpEncoder:
    return create_encoder("toy-vit", "bilinear", 2)


TAKEN: dict[str, tuple[Any, np.ndarray]] = {
    "uint8 HWC": (RGB, RGB),
    "uint8 CHW": (np.moveaxis(RGB, -1, 0), RGB),
    "uint8 HW": (GREY, stacked(GREY)),
    "uint8 HW1": (GREY[..., None], stacked(GREY)),
    "uint8 1HW": (GREY[None], stacked(GREY)),
    "uint8 RGBA": (RGBA, OVER_GREY),
    "uint8 CHW, RGBA": (np.moveaxis(RGBA, -1, 0), OVER_GREY),
    "uint16": (RGB.astype(np.uint16) * 257, RGB),
    "uint16 grey, big-endian": ((GREY.astype(np.uint16) * 257).astype(">u2"), stacked(GREY)),
    "uint16 RGBA": (RGBA.astype(np.uint16) * 257, OVER_GREY),
    "bool": (GREY > 99, stacked((GREY > 99) * 255)),
    "float32": (RGB.astype(np.float32) / 255, RGB),
    "float64 CHW": (np.moveaxis(RGB, -1, 0) / 255, RGB),
    "float16 grey": ((GREY / 255).astype(np.float16), stacked(GREY)),
    "float32, big-endian": ((RGB / 255).astype(">f4"), RGB),
    "float RGBA": (RGBA / 255, OVER_GREY),
    "mirrored view": (RGB[:, ::-1], RGB[:, ::-1]),
    "channels reversed": (RGB[..., ::-1], RGB[..., ::-1]),
    "every second pixel": (RGB[::2, ::2], RGB[::2, ::2]),
    "nothing masked": (np.ma.masked_array(RGB), RGB),
    "read-only": (np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape), RGB),
    "tensor uint8": (tensor(RGB), RGB),
    "tensor HWC": (torch.from_numpy(RGB.copy()), RGB),
    "tensor HW": (torch.from_numpy(GREY.copy()), stacked(GREY)),
    "tensor uint16": (tensor(RGB.astype(np.uint16) * 257), RGB),
    "tensor bool": (torch.from_numpy(GREY > 99), stacked((GREY > 99) * 255)),
    "tensor float64": (tensor(RGB, torch.float64) / 255, RGB),
    "tensor bfloat16": (torch.ones(3, H, W, dtype=torch.bfloat16), np.full((H, W, 3), 255)),
    "tensor with gradient": ((tensor(RGB, torch.float32) / 255).requires_grad_(), RGB),
    "parameter": (torch.nn.Parameter(tensor(RGB, torch.float32) / 255), RGB),
    "tensor, strides": (tensor(RGB).permute(0, 2, 1), RGB.transpose(1, 0, 2)),
    "bytes": (PNG, RGB),
    "bytearray": (bytearray(PNG), RGB),
    "memoryview": (memoryview(PNG), RGB),
    "PIL": (Image.fromarray(RGB), RGB),
    "PIL L": (Image.fromarray(GREY), stacked(GREY)),
    "PIL RGBA": (Image.fromarray(RGBA), OVER_GREY),
    "PIL, not loaded": (Image.open(io.BytesIO(PNG)), RGB),
}


@pytest.mark.parametrize("name", TAKEN)
def test_pixels_of_a_picture(name: str, encoder: SharpEncoder) -> None:
    given, expected = TAKEN[name]
    pixels = picture_to_tensor(given)
    assert pixels.dtype == torch.float32
    assert not pixels.requires_grad
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy() * 255, expected, atol=0.51 if "A" in name else 0.1)
    image = decode_image(given)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image) - expected).max() <= 0.51
    twin = encoder.encode_image(Image.fromarray(np.round(expected).astype(np.uint8))).high_res
    torch.testing.assert_close(encoder.encode_image(given).high_res, twin, atol=0.02, rtol=0.02)


def test_pixels_of_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    written = io.BytesIO()
    Image.fromarray(RGB).save(written, "PNG")  # which leaves it at its end
    with path.open("rb") as file, tempfile.SpooledTemporaryFile() as spooled, tempfile.NamedTemporaryFile() as named:
        spooled.write(PNG)
        named.write(PNG)
        for given in (path, str(path), file, file, written, written, spooled, named):
            assert np.array_equal(np.asarray(decode_image(given)), RGB)  # type: ignore[arg-type]
    reader, writer = os.pipe()
    os.write(writer, PNG)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert np.array_equal(np.asarray(decode_image(pipe)), RGB)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_a_matrix_is_an_array() -> None:
    assert np.array_equal(np.asarray(decode_image(np.asmatrix(GREY))), stacked(GREY))


def test_floats_keep_their_precision(encoder: SharpEncoder) -> None:
    pixels = torch.rand(3, H, W)
    assert torch.equal(picture_to_tensor(pixels), pixels)
    with torch.no_grad():
        expected = encoder(encoder.input_conditioner(pixels[None]), denormalize=True)
    out = encoder.encode_image(pixels, size=(H, W))
    assert torch.equal(out.high_res, expected.high_res)


def test_what_is_given_is_left_alone() -> None:
    floats, levels = torch.rand(4, H, W), RGBA.copy()
    before = floats.clone()
    picture_to_tensor(floats)
    assert torch.equal(floats, before)
    decode_image(levels).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(levels, RGBA)
    rgb = RGB.copy()
    decode_image(rgb).putpixel((0, 0), (1, 2, 3))
    picture_to_tensor(rgb).zero_()
    assert np.array_equal(rgb, RGB)


def closed(image: Image.Image) -> Image.Image:
    image.close()
    return image


def closed_file() -> io.BytesIO:
    file = io.BytesIO(PNG)
    file.close()
    return file


def left_lazy() -> Image.Image:
    with Image.open(io.BytesIO(PNG)) as image:
        return image


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.rand(3, H, W)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "None is no picture; a picture is a path"),
    "number": (lambda: 3, "an object of type int is no picture; a picture is"),
    "numpy number": (lambda: np.uint8(3), "an object of type uint8 is no picture"),
    "dict": (lambda: {"image": RGB}, "an object of type dict is no picture"),
    "set": (lambda: {"a.jpg"}, "an object of type set is no picture"),
    "generator": (lambda: (path for path in ["a.jpg"]), "an object of type generator is no picture"),
    "pixels in lists": (lambda: [[[0, 0, 0]]], "an object of type list is no picture"),
    "ambiguous": (lambda: np.zeros((3, H, 3), np.uint8), "channels may be first or last"),
    "ambiguous RGBA": (lambda: torch.zeros(1, H, 4), "channels may be first or last"),
    "two channels": (lambda: np.zeros((H, W, 2), np.uint8), r"shape \(40, 56, 2\) .* no side has 1, 3 or 4 channels"),
    "features": (lambda: torch.rand(384, 16, 16), "no side has 1, 3 or 4 channels"),
    "batch": (lambda: torch.rand(2, 3, H, W), "a batch; give a list of its pictures"),
    "batch of arrays": (lambda: np.zeros((1, H, W, 3), np.uint8), "a batch; give a list of its pictures"),
    "row": (lambda: np.zeros(7, np.uint8), r"shape \(7,\)"),
    "scalar": (lambda: torch.tensor(1.0), r"shape \(\)"),
    "no pixels": (lambda: np.zeros((0, W, 3), np.uint8), r"shape \(0, 56, 3\)"),
    "int64": (lambda: RGB.astype(np.int64), "type int64 .* no known range"),
    "int32 tensor": (lambda: tensor(RGB, torch.int32), "type int32 .* no known range"),
    "uint32": (lambda: RGB.astype(np.uint32), "type uint32 .* no known range"),
    "complex": (lambda: RGB.astype(complex), "type complex128 .* no known range"),
    "objects": (lambda: np.array(["a.jpg", "b.jpg"]), "no known range"),
    "levels in floats": (lambda: RGB.astype(np.float32), r"lie in 0\.\.1, and these are 0\.\.255; divide"),
    "whitened": (lambda: torch.randn(3, H, W), r"give whitened images to encoder\(images\)"),
    "a little below": (lambda: np.full((H, W), -0.01), r"lie in 0\.\.1, and these are -0\.01\.\.-0\.01"),
    "NaN": (lambda: np.full((H, W), np.nan), r"these are nan\.\.nan"),
    "one NaN": (lambda: torch.rand(3, H, W).index_fill_(1, torch.tensor(3), torch.nan), "these are nan"),
    "infinite": (lambda: np.full((H, W), np.inf), r"these are inf\.\.inf"),
    "masked": (lambda: np.ma.masked_less(RGB, 9), r"some of its pixels are masked; .* filled"),
    "meta": (lambda: torch.empty(3, H, W, device="meta"), "has no pixels in memory"),
    "fake": (fake, "has no pixels in memory"),
    "sparse": (lambda: torch.eye(W).to_sparse(), "has no pixels in memory"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.rand(3, H)], layout=torch.jagged),
        "type NestedTensor is no picture",
    ),
    "empty path": (lambda: "", "an empty path"),
    "https": (lambda: "https://me:secret@host/a.jpg?token=secret", "https: addresses are not read; download it"),
    "http path": (lambda: Path("http://host/a.jpg"), "http: addresses are not read; download it"),
    "s3": (lambda: "s3://bucket/a.jpg", "s3: addresses are not read"),
    "file": (lambda: "file:///tmp/a.jpg", "file: addresses are not read; give the path alone"),
    "data": (lambda: "data:image/png;base64," + base64.b64encode(PNG).decode(), "a data: URI is not read; give its"),
    "bytes in a string": (lambda: PNG.decode("latin-1"), "null characters is no path"),
    "view of an array": (lambda: memoryview(RGB), "a memoryview of 40 x 56 x 3 items .* as the array that it views"),
    "view of words": (lambda: memoryview(np.zeros(9, np.uint16)), "a memoryview of 9 items of 2 bytes"),
    "text file": (lambda: io.StringIO("x"), "str instead of bytes; open it with 'rb'"),
    "closed file": (closed_file, "the file is closed"),
    "file for writing": (lambda: io.BufferedWriter(io.BytesIO()), "open for writing alone; open it with 'rb'"),
    "closed PIL": (lambda: closed(Image.new("RGB", (W, H))), "the PIL image is closed"),
    "closed before loading": (lambda: closed(Image.open(io.BytesIO(PNG))), "the PIL image is closed"),
    "lazy PIL after with": (left_lazy, r"the PIL image is closed; call its load\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture(name: str, encoder: SharpEncoder) -> None:
    make, message = REFUSED[name]
    for call in (decode_image, picture_to_tensor, lambda given: encoder.encode_image([RGB, given])):
        with pytest.raises(InputError, match=message) as refused:
            call(make())
        text = str(refused.value)
        assert "decoded" not in text
        assert "secret" not in text
        assert len(text) < 600


def test_files_that_cannot_be_used(tmp_path: Path, encoder: SharpEncoder) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    for given, message in (
        (io.BytesIO(b"x"), "not an image that can be read"),
        (b"", "the file is empty"),
        (tmp_path / "a.jpg", r"a\.jpg: not an image that can be read"),
        (b"/nowhere/x.jpg", "not the content of an image file but a path; give a path as a str or Path"),
        (os.fsencode(tmp_path), "a path; give a path as a str"),
        (tmp_path, "a folder; give a file, or a list of files"),
        (tmp_path / "absent.jpg", r"absent\.jpg: no such file"),
        (tmp_path / "a.jpg" / "b.jpg", r"b\.jpg: cannot be read \(Not a directory\)"),
        ("a\ud8ff.jpg", r"cannot be read \('utf-8' codec"),
        (base64.b64encode(PNG).decode().replace("/", "_"), r"\.\.\.: cannot be read \(File name too long\)"),
    ):
        with pytest.raises(DataError, match=message) as refused:
            encoder.encode_image(given)
        assert len(str(refused.value)) < 600


def test_a_file_may_have_the_name_of_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("s3:/bucket/a.png")
    path.parent.mkdir(parents=True)
    path.write_bytes(PNG)
    assert np.array_equal(np.asarray(decode_image("s3://bucket/a.png")), RGB)


def test_a_list_of_objects_is_a_batch(tmp_path: Path, encoder: SharpEncoder) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    batches = []
    hook = encoder.backbone.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    results = encoder.encode_image([path, PNG, RGB, tensor(RGB), Image.fromarray(RGB), io.BytesIO(PNG)])
    hook.remove()
    assert batches == [6]
    for result in results:
        torch.testing.assert_close(result.high_res, results[0].high_res)
    batch = torch.rand(2, 3, H, W)
    assert len(encoder.encode_image(list(batch))) == 2


def test_a_fit_takes_the_same_objects(encoder: SharpEncoder) -> None:
    config = FitConfig(views=2, dim=2)
    fits = [Fitter(encoder.backbone, given, config, size=(H, W)) for given in (RGB, PNG)]
    assert torch.equal(fits[0].fitted.image, fits[1].fitted.image)
    with pytest.raises(FeatSharpError, match="None is no picture"):
        Fitter(encoder.backbone, None, config)  # type: ignore[arg-type]


def test_meters_and_figures_take_the_same_objects(tmp_path: Path, encoder: SharpEncoder) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    meters = [(FidelityMeter(encoder, views=2), ZoomMeter(encoder, crops=2)) for _ in range(2)]
    for (fidelity, zoom), picture in zip(meters, (tmp_path / "a.png", RGB), strict=True):
        fidelity.add(picture)
        zoom.add(picture)
    assert meters[0][0].result() == meters[1][0].result()
    assert meters[0][1].result() == meters[1][1].result()
    rows = [pca_row(picture, {"bilinear": encoder}) for picture in (tmp_path / "a.png", RGB)]
    assert torch.equal(rows[0].maps["bilinear"], rows[1].maps["bilinear"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_of_another_device(encoder: SharpEncoder) -> None:
    assert torch.equal(picture_to_tensor(tensor(RGB).cuda()), picture_to_tensor(RGB))
