"""Features at points of the picture: ``at`` against a plain formula, whatever the picture's size and shape."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from featsharp import create_encoder
from featsharp.errors import InputError
from featsharp.upsamplers import UpsampleFeatures


def features(size: tuple[int, int], cells: tuple[int, int], batch: int = 2, **options) -> UpsampleFeatures:
    torch.manual_seed(0)
    high_res = torch.randn(batch, 5, *cells, **options)
    return UpsampleFeatures(high_res[:, :, ::2, ::2], high_res).of_picture(size)


def plain_bilinear(high_res: torch.Tensor, size: tuple[int, int], x: float, y: float) -> torch.Tensor:
    """[B, C] at a point, from the four cells around it; beyond the outermost centres the cell itself."""
    (height, width), (rows, columns) = size, high_res.shape[-2:]
    row, column = y * rows / height - 0.5, x * columns / width - 0.5
    row, column = min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)
    top, left = math.floor(row), math.floor(column)
    bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    down, across = row - top, column - left
    upper = (1 - across) * high_res[..., top, left] + across * high_res[..., top, right]
    lower = (1 - across) * high_res[..., bottom, left] + across * high_res[..., bottom, right]
    return (1 - down) * upper + down * lower


@pytest.mark.parametrize(("size", "cells"), [((37, 91), (6, 14)), ((480, 300), (17, 9)), ((5, 7), (10, 14))])
def test_features_at_points_are_those_of_the_formula(size, cells):
    out = features(size, cells)
    height, width = size
    points = [(0, 0), (width, height), (0.5, height / 3), (width / 2, 0.25), (0.77 * width, 0.61 * height), (2, 3.5)]
    got = out.at(points)
    assert got.shape == (2, len(points), 5)
    for index, point in enumerate(points):
        expected = plain_bilinear(out.high_res, size, *point)
        torch.testing.assert_close(got[:, index], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.at(point), expected, atol=1e-5, rtol=1e-5)  # [B, C] for one point


def test_a_cell_per_pixel_is_read_at_the_centre_of_the_pixel():
    out = features((9, 13), (9, 13))
    read = out.at([(11.5, 3.5), (0.5, 8.5)])
    torch.testing.assert_close(read, torch.stack([out.high_res[:, :, 3, 11], out.high_res[:, :, 8, 0]], 1))


def test_each_picture_of_a_batch_may_have_points_of_its_own():
    out = features((40, 60), (8, 12), batch=3)
    points = torch.rand(3, 7, 2) * torch.tensor([60.0, 40.0])
    got = out.at(points)
    for picture in range(3):
        one = UpsampleFeatures(*(part[picture : picture + 1] for part in out[:2])).of_picture(out.image_size)
        torch.testing.assert_close(got[picture], one.at(points[picture])[0])
    torch.testing.assert_close(out.at(points[1])[1], got[1])  # the same points for all
    torch.testing.assert_close(out.at(points[1].numpy()), out.at(points[1]))
    assert out.at(torch.zeros(0, 2)).shape == (3, 0, 5)


def test_gradients_reach_features_and_points():
    out = features((11, 23), (4, 6), dtype=torch.float64)
    high_res = out.high_res.clone().requires_grad_()
    # Inside, off the lines on which a bilinear function has no derivative.
    points = (torch.rand(2, 3, 2, dtype=torch.float64) * 6 + torch.tensor([6.0, 2.5])).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda features, xy: UpsampleFeatures(features, features).of_picture((11, 23)).at(xy), (high_res, points)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_points_are_as_exact_as_float32_and_features_keep_their_type(dtype):
    out = features((900, 1300), (30, 50), batch=1).high_res.to(dtype)
    read = UpsampleFeatures(out, out).of_picture((900, 1300)).at([(1234.5, 765.25)])
    assert read.dtype == dtype
    expected = plain_bilinear(out.double(), (900, 1300), 1234.5, 765.25)
    torch.testing.assert_close(read[:, 0].double(), expected, atol=2e-2 if dtype != torch.float64 else 1e-9, rtol=0)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(3, 4), (60.5, 4)], r"the point \(x, y\) = \(60.5, 4\) lies outside .* x is from 0 to 60, y from 0 to 40"),
        ([(3, -0.01)], "lies outside"),
        ([(math.nan, 3)], "lies outside"),
        ([(1, 2, 3)], r"points are \(x, y\): \[2\], \[N, 2\] or, for this batch, \[2, N, 2\]; got \(1, 3\)"),
        (torch.zeros(3, 4, 2), r"got \(3, 4, 2\)"),
        (5.0, r"got \(\)"),
    ],
)
def test_points_that_are_none_of_the_picture_are_refused(points, message):
    with pytest.raises(InputError, match=message):
        features((40, 60), (8, 12)).at(points)


def test_features_of_an_unknown_picture_say_what_to_set():
    plain = UpsampleFeatures(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 4, 4))
    with pytest.raises(InputError, match=r"set image_size = \(height, width\)"):
        plain.at((1, 1))
    plain.image_size = (8, 8)
    assert torch.equal(plain.at((1, 1)), torch.ones(1, 3))


@pytest.mark.parametrize("size", [(150, 410), (333, 90)])
def test_points_are_those_of_the_picture_before_it_was_scaled_for_the_backbone(size):
    """A picture of two colours: its features left and right of the edge are those of either side, in its own pixels."""
    height, width = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (220, 60, 40)
    pixels[height // 3 :, width // 2 :] = (30, 90, 200)
    encoder = create_encoder("toy-vit", "bilinear", 2)
    for out in (encoder.encode_image(pixels), *encoder.encode_image([pixels, pixels[:, ::2]])[:1]):
        assert out.image_size == size
        assert len([*out]) == 3
        assert out.low_res.shape[2:] != size
        for point in ((3.0, 5.0), (width - 4.5, height - 2.0), (0.3 * width, 0.8 * height)):
            expected = plain_bilinear(out.high_res, size, *point)
            torch.testing.assert_close(out.at(point), expected, atol=1e-4, rtol=1e-4)
    assert encoder.encode_image(Image.fromarray(pixels), size=(64, 96)).image_size == size
    assert encoder(torch.rand(2, 3, 72, 104)).image_size == (72, 104)


def test_a_turned_photograph_has_points_of_the_upright_one(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 100, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees for display
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    encoder = create_encoder("toy-vit", "bilinear", 2)
    out, upright = encoder.encode_image(tmp_path / "turned.png"), encoder.encode_image(np.rot90(pixels, -1).copy())
    assert out.image_size == (100, 60)
    torch.testing.assert_close(out.at((55, 95)), upright.at((55, 95)))


def test_the_size_survives_copies_processes_and_batches():
    out = features((40, 60), (8, 12), batch=1)
    leaves, spec = pytree.tree_flatten(out)
    assert [leaf is part for leaf, part in zip(leaves, out, strict=True)] == [True] * 3
    assert isinstance(pytree.tree_unflatten(leaves, spec), UpsampleFeatures)
    for other in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out), copy.copy(out), out._replace(summary=None)):
        assert (other.image_size, len(other), type(other)) == ((40, 60), 3, UpsampleFeatures)
    (batch,) = DataLoader([out, out], batch_size=2)
    assert batch.image_size == (40, 60)
    assert batch.at((1, 1)).shape == (2, 5)
    (mixed,) = DataLoader([out, features((41, 60), (8, 12), batch=1)], batch_size=2)
    assert mixed.image_size is None


@pytest.mark.slow
def test_a_compiled_encoder_gives_points_too():
    encoder = create_encoder("toy-vit", "bilinear", 2)
    images = torch.rand(2, 3, 72, 104)
    compiled = torch.compile(lambda x, xy: (encoder(x), encoder(x).at(xy)), backend="eager", dynamic=True)
    out, read = compiled(images, torch.tensor([[3.0, 70.0]]))
    assert out.image_size == (72, 104)
    torch.testing.assert_close(read, encoder(images).at([(3, 70)]))
