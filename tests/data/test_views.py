"""Views show what their homographies say they show, and masks say where that is picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.data.images import image_to_tensor
from featsharp.data.views import (
    MARGIN,
    ViewConfig,
    Views,
    base_view,
    canvas_margin,
    corner_homography,
    cut_canvas,
    render_views,
    sample_homography,
    sample_views,
    similarity,
)
from featsharp.ops.resize import resize
from featsharp.ops.warp import inside, warp

STILL = ViewConfig(
    num_views=2, zoom=[1.0, 1.0], jitter_zoom=[1.0, 1.0], perspective=[0.0, 0.0], rotation=0.0, shift=0.0, flip=0.0
)
WILD = ViewConfig(
    num_views=4, zoom=[1.0, 2.0], jitter_zoom=[0.9, 2.0], perspective=[0.02, 0.1], rotation=20.0, shift=0.2, flip=0.5
)


def colours_at(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth picture without end, [..., 3] in [0, 1], at picture coordinates in pixels (edges at whole numbers)."""
    waves = (np.sin(x / 31 + y / 57), np.cos(x / 47 - y / 29 + 1), np.sin(x / 83 + 2) * np.cos(y / 37))
    return 0.5 + 0.4 * np.stack(waves, -1)


def smooth_picture(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return Image.fromarray((colours_at(x, y) * 255).round().astype(np.uint8))


def noise_picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def batch_of(canvas: torch.Tensor, mask: torch.Tensor, homographies: np.ndarray) -> Views:
    return Views(canvas[None], mask[None], torch.from_numpy(np.asarray(homographies)).float()[None])


# The base view


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (40, 40)])
@pytest.mark.parametrize(("zoom", "offset"), [(1.0, (0.5, 0.5)), (1.7, (0.2, 0.9)), (2.0, (0.0, 1.0))])
def test_base_view_is_the_plain_antialiased_crop(size, zoom, offset):
    picture = noise_picture(230, 170)
    canvas, mask = cut_canvas(picture, size, zoom, offset)
    base, base_mask = base_view(Views(canvas[None], mask[None], torch.empty(0)))
    scale = min(170 / size[0], 230 / size[1]) / zoom
    top, left = offset[0] * (170 - scale * size[0]), offset[1] * (230 - scale * size[1])
    box = (left, top, left + scale * size[1], top + scale * size[0])
    crop = image_to_tensor(picture.resize(size[::-1], Image.Resampling.BICUBIC, box=box))
    assert base.shape == (1, 3, *size)
    assert base_mask.min() == 1
    # One step of 8 bits for rounding twice.
    assert (base[0] - crop).abs().max() <= 1.01 / 255


def test_margin_holds_real_pixels_where_the_picture_has_them():
    canvas, mask = cut_canvas(noise_picture(300, 300), (64, 64), zoom=2.0)
    assert canvas.shape == (3, 80, 80)
    assert mask.min() == 1
    canvas, mask = cut_canvas(noise_picture(300, 300), (64, 64), zoom=1.0)
    assert mask.sum() == 64 * 64
    assert (canvas * (1 - mask)).abs().max() == 0
    # A wide picture has a margin at its sides only; at the left end of it, on the right side only.
    _, mask = cut_canvas(noise_picture(300, 100), (64, 64), zoom=1.0, offset=(0.5, 0.0))
    assert mask[0, 8:72, 8:].min() == 1
    assert mask.sum() == 64 * 72


@pytest.mark.parametrize("picture_size", [(1, 1), (7, 10), (64, 9)])
def test_tiny_pictures_are_enlarged(picture_size):
    views = sample_views(noise_picture(*picture_size), (48, 64), WILD, np.random.default_rng(0))
    base, mask = base_view(Views(*(x[None] for x in views)))
    assert base.shape == (1, 3, 48, 64)
    assert mask.min() == 1
    assert base.min() >= 0
    assert base.max() <= 1


def test_margin_is_recovered_from_the_canvas_for_all_sizes():
    for length in range(4, 1100):
        my, mx = canvas_margin((length, 64))
        assert (my, mx) == (round(length * MARGIN), 8)
        canvas = torch.zeros(1, 1, 1, 1).expand(1, 1, length + 2 * my, 64 + 2 * mx)
        base, _ = base_view(Views(canvas, canvas, torch.empty(0)))
        assert base.shape[-2:] == (length, 64)


# Homographies


def test_rotation_keeps_right_angles_on_views_that_are_not_square():
    height, width, angle = 40, 120, 0.3
    matrix = similarity((height, width), 0.7, angle, np.array([0.1, -0.2]))
    half = np.array([width / 2, height / 2])

    def in_pixels(x: float, y: float) -> np.ndarray:
        mapped = matrix @ [x / half[0], y / half[1], 1.0]
        return mapped[:2] * half

    origin = in_pixels(0, 0)
    np.testing.assert_allclose(origin, [0.1 * half[0], -0.2 * half[1]])
    cos, sin = np.cos(angle), np.sin(angle)
    for x, y in ((10.0, 0.0), (0.0, 10.0), (7.0, -3.0)):
        np.testing.assert_allclose(in_pixels(x, y) - origin, 0.7 * np.array([cos * x - sin * y, sin * x + cos * y]))


def test_corner_homography_moves_the_corners():
    moves = np.random.default_rng(0).normal(size=(4, 2)) * 0.2
    matrix = corner_homography(moves)
    corners = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    for corner, move in zip(corners, moves, strict=True):
        mapped = matrix @ [*corner, 1.0]
        np.testing.assert_allclose(mapped[:2] / mapped[2], corner + move, atol=1e-12)
    np.testing.assert_allclose(corner_homography(np.zeros((4, 2))), np.eye(3), atol=1e-12)


@pytest.mark.parametrize("size", [(48, 96), (64, 64)])
def test_homography_is_the_composition_of_its_parts(size):
    config = ViewConfig(jitter_zoom=[1.25, 1.25], perspective=[0.0, 0.0], rotation=0.0, shift=0.0, flip=0.0)
    rng = np.random.default_rng(1)
    matrices = np.stack([sample_homography(size, config, rng) for _ in range(200)])
    np.testing.assert_allclose(matrices[:, 0, 0], 0.8)
    np.testing.assert_allclose(matrices[:, 1, 1], 0.8)
    # A view zoomed by 1.25 may look anywhere inside of the base view, and nowhere else.
    assert np.abs(matrices[:, :2, 2]).max() <= 0.2 + 1e-9
    assert np.abs(matrices[:, :2, 2]).max() > 0.18


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_rendered_views_show_the_picture_at_the_mapped_places(size):
    """Direct geometry: view pixel -> homography -> base view -> place in the picture, against the picture's formula."""
    zoom, offset = 1.6, (0.3, 0.6)
    picture = smooth_picture(310, 270)
    rng = np.random.default_rng(3)
    homographies = np.stack([sample_homography(size, WILD, rng) for _ in range(6)])
    images, masks = render_views(batch_of(*cut_canvas(picture, size, zoom, offset), homographies), size)
    scale = min(270 / size[0], 310 / size[1]) / zoom
    top, left = offset[0] * (270 - scale * size[0]), offset[1] * (310 - scale * size[1])
    u, v = np.meshgrid((2 * np.arange(size[1]) + 1) / size[1] - 1, (2 * np.arange(size[0]) + 1) / size[0] - 1)
    for homography, image, mask in zip(homographies, images, masks, strict=True):
        x, y, w = np.einsum("ij,jhw->ihw", homography, np.stack([u, v, np.ones_like(u)]))
        expected = colours_at(
            left + (x / w + 1) / 2 * scale * size[1],
            top + (y / w + 1) / 2 * scale * size[0],
        )
        difference = (image.permute(1, 2, 0).numpy() - expected)[mask[0].numpy() > 0]
        assert mask.mean() > 0.4
        assert np.abs(difference).max() < 0.012


def test_colours_and_masks_warped_at_once_are_those_warped_one_by_one():
    """To the last bit: stored features are found by the content of their views."""
    rng = np.random.default_rng(5)
    homographies = np.stack([sample_homography((112, 98), WILD, rng) for _ in range(5)])
    views = batch_of(*cut_canvas(smooth_picture(140, 120), (112, 98)), homographies)
    images, masks = render_views(views, (56, 42))
    my, mx = canvas_margin((112, 98))
    share = torch.diag(torch.tensor([98 / (98 + 2 * mx), 112 / (112 + 2 * my), 1.0]))
    to_canvas = share @ views.homographies[0]
    colours, seen = (warp(x.expand(5, -1, -1, -1), to_canvas, (112, 98), padding_mode="zeros") for x in views[:2])
    assert torch.equal(images, resize(colours, (56, 42)))
    assert torch.equal(masks, (resize(seen * inside(to_canvas, (112, 98)), (56, 42)) > 0.99).float())
    assert 0 < masks.mean() < 1


def test_shrunk_views_are_the_views_shrunk():
    views = batch_of(*cut_canvas(smooth_picture(200, 200), (64, 96), 1.5), np.stack([np.eye(3)] * 2))
    small, masks = render_views(views, (32, 48))
    large, _ = render_views(views, (64, 96))
    assert small.shape == (2, 3, 32, 48)
    assert masks.min() == 1
    # Cells of a smooth picture are the mean of their pixels, up to the wider antialias kernel.
    assert (small - torch.nn.functional.avg_pool2d(large, 2)).abs().max() < 0.01


def test_view_without_jitter_is_the_base_view():
    sample = sample_views(noise_picture(150, 120), (40, 56), STILL, np.random.default_rng(0))
    views = Views(*(x[None] for x in sample))
    images, masks = render_views(views, (40, 56))
    base, _ = base_view(views)
    assert torch.equal(views.homographies[0, 0], torch.eye(3))
    assert masks.min() == 1
    assert (images - base).abs().max() < 1e-4


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (-5, 2), (0, -4)])
def test_shift_by_whole_pixels_is_exact_and_masked_where_the_picture_ends(dx, dy):
    height, width = 40, 64
    matrix = np.eye(3)
    matrix[:2, 2] = 2 * dx / width, 2 * dy / height
    # No margin: the picture has the shape of the view.
    views = batch_of(*cut_canvas(noise_picture(width, height), (height, width)), matrix[None])
    images, masks = render_views(views, (height, width))
    base, _ = base_view(views)
    rows, cols = np.arange(height) + dy, np.arange(width) + dx
    valid = ((rows >= 0) & (rows < height))[:, None] & ((cols >= 0) & (cols < width))
    np.testing.assert_array_equal(masks[0, 0].numpy(), valid)
    moved = base[0][:, rows.clip(0, height - 1)][:, :, cols.clip(0, width - 1)]
    assert ((images[0] - moved) * masks[0]).abs().max() < 1e-4


def test_shift_into_the_margin_shows_real_pixels():
    height, width = 40, 64
    matrix = np.eye(3)
    matrix[0, 2] = 2 * 8 / width  # the whole margin of 8 pixels
    canvas, mask = cut_canvas(noise_picture(300, 300), (height, width), 2.0)
    images, masks = render_views(batch_of(canvas, mask, matrix[None]), (height, width))
    assert masks.min() == 1
    assert (images[0] - canvas[:, 5:45, 16:80]).abs().max() < 1e-4


def test_flipped_view_is_mirrored():
    config = ViewConfig(num_views=1, jitter_zoom=[1.0, 1.0], perspective=[0.0, 0.0], rotation=0.0, shift=0.0, flip=1.0)
    views = Views(*(x[None] for x in sample_views(noise_picture(90, 90), (48, 40), config, np.random.default_rng(0))))
    images, masks = render_views(views, (48, 40))
    assert masks.min() == 1
    assert (images - base_view(views)[0].flip(-1)).abs().max() < 1e-4


def test_inverse_homography_brings_the_base_view_back():
    size = (64, 96)
    rng = np.random.default_rng(5)
    config = ViewConfig(jitter_zoom=[0.95, 1.0], rotation=5.0, shift=0.05)
    for _ in range(4):
        homography = sample_homography(size, config, rng)
        inverse = np.linalg.inv(homography)
        np.testing.assert_allclose(homography @ inverse, np.eye(3), atol=1e-12)
        views = batch_of(*cut_canvas(smooth_picture(300, 300), size, 2.0), homography[None])
        images, masks = render_views(views, size)
        back = torch.from_numpy(inverse).float()[None]
        shown = warp(masks, back, size, padding_mode="zeros") > 0.99
        assert shown.float().mean() > 0.7
        difference = (warp(images, back, size, padding_mode="zeros") - base_view(views)[0]).abs().amax(1, keepdim=True)
        assert difference[shown].max() < 0.01


# Randomness


def test_the_generator_decides_everything():
    picture = noise_picture(120, 100)

    def draw(seed: int) -> Views:
        return sample_views(picture, (32, 40), WILD, np.random.default_rng(seed))

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.homographies, other.homographies)
    assert not torch.equal(first.canvas, other.canvas)
    assert first.homographies.shape == (4, 3, 3)
    assert first.homographies.dtype == torch.float32
