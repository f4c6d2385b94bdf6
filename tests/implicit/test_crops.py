"""Views: a picture of known ramps shows where each one looks, and the warp of a map agrees."""

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.data.images import image_to_tensor
from featsharp.implicit.crops import Canvas, CropConfig, sample_crops
from featsharp.ops.resize import resize
from featsharp.ops.views import View

SIZE = (30, 50)


def ramps(height: int, width: int) -> Image.Image:
    """Red grows with the column, green with the row, from 0 to 250."""
    columns, rows = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([columns, rows, np.zeros_like(rows)], -1) * 250).round().astype(np.uint8))


def crops(count: int, **options: float) -> View:
    return sample_crops(count, CropConfig(**options), np.random.default_rng(0))


def test_a_view_shows_the_place_that_its_homography_names():
    views = Canvas(ramps(120, 200)).render(crops(40), SIZE)
    for view, homography in zip(views, crops(40).to_base.double().numpy(), strict=True):
        for row, column in ((5, 7), (15, 25), (24, 44)):
            x, y, _ = homography @ [(2 * column + 1) / 50 - 1, (2 * row + 1) / 30 - 1, 1]
            if max(abs(x), abs(y)) < 0.9:  # away from where the ramp is folded
                assert view[0, row, column].item() == pytest.approx((x + 1) / 2 * 250 / 255, abs=0.006)
                assert view[1, row, column].item() == pytest.approx((y + 1) / 2 * 250 / 255, abs=0.006)


def test_views_agree_with_the_warp_of_a_map_mirrored_margin_too():
    picture = ramps(120, 200)
    drawn = crops(30)
    views = Canvas(picture).render(drawn, SIZE)
    warped = resize(drawn.warp(image_to_tensor(picture)[None], (120, 200)), SIZE)
    assert (drawn.inside(SIZE) == 0).any()
    # The mirror is blurred by both, but not over the same pixels.
    assert (views - warped).abs().max() < 0.03
    assert (views - warped).abs().mean() < 0.003


def test_the_view_that_is_the_picture():
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (61, 83, 3), np.uint8))
    (view,) = Canvas(picture).render(View.crop(1, (0, 0)), SIZE)
    expected = resize(image_to_tensor(picture)[None], SIZE)[0]
    # At the borders the view is made of mirrored pixels too.
    assert (view - expected)[:, 1:-1, 1:-1].abs().max() < 2 / 255


def test_draws_are_those_asked_for():
    drawn = crops(2000).to_base
    scale = drawn[:, 0, 0].abs()
    assert torch.equal(scale, drawn[:, 1, 1])
    assert 0.45 < (scale < 1).float().mean() < 0.55
    assert 0.45 < (drawn[:, 0, 0] < 0).float().mean() < 0.55
    assert (1 / scale).max() <= 1.8 + 1e-6
    assert (1 / scale).max() > 1.75
    edge = drawn[:, :2, 2].abs() + scale[:, None]
    assert edge.max() <= 1 + 60 / 224 + 1e-6
    assert edge.max() > 1.2
    assert torch.equal(
        crops(5, zoom_probability=0, flip_probability=0).to_base[:, :2, :2], torch.eye(2).expand(5, 2, 2)
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 400)])
def test_odd_pictures(height, width):
    views = Canvas(ramps(height, width)).render(crops(5), (16, 24))
    assert views.shape == (5, 3, 16, 24)
