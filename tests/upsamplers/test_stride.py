"""Smaller strides: where tokens of overlapping patches lie, and what a real encoder makes of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from featsharp.backbones import from_callable
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError, InputError
from featsharp.ops.resize import resize
from featsharp.upsamplers.stride import Stride, compute_stride, read_tokens

PATCH = 8


def mean_colour(images, *, patch_stride=PATCH):
    """A backbone that is a function of each patch alone."""
    features = F.avg_pool2d(images, PATCH, patch_stride)
    return features, features.amax((2, 3))


def ramps(height, width):
    """Pixel centres: row number, column number and their sum."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([y, x, x + y])[None].double()


def last_centre(length, stride):
    """Of the patches along an axis, in pixels."""
    return (length - PATCH) // stride * stride + PATCH / 2


@pytest.mark.parametrize("factor", [1.5, 2, 3, 4, 5.3, 8])
def test_a_ramp_is_read_where_the_cells_are(factor):
    height, width = 40, 56
    image = ramps(height, width)
    out = Stride(3, factor)(image, mean_colour, (height, width)).high_res[0]
    stride = compute_stride(PATCH, factor)
    rows = (torch.arange(out.shape[1]).double() + 0.5) * height / out.shape[1]
    columns = (torch.arange(out.shape[2]).double() + 0.5) * width / out.shape[2]
    # No patch is centred closer to the border than half its size.
    rows, columns = rows.clamp(4, last_centre(height, stride)), columns.clamp(4, last_centre(width, stride))
    torch.testing.assert_close(out[0], rows[:, None].expand(out.shape[1:]))
    torch.testing.assert_close(out[1], columns.expand(out.shape[1:]))
    torch.testing.assert_close(out[2], rows[:, None] + columns)


def test_stretching_the_tokens_over_the_image_would_shift_them():
    """Why the result is not simply resized: at factor 2 by a quarter of a patch next to the border."""
    image = ramps(40, 40)
    out = Stride(3, 2)(image, mean_colour, (40, 40)).high_res
    stretched = resize(mean_colour(image, patch_stride=4)[0], (10, 10))
    assert out[0, 0, 1, 0] == 6  # the centre of the second of ten cells
    assert stretched[0, 0, 1, 0] == pytest.approx(7.4)


@pytest.mark.parametrize(
    ("grid", "stride", "image_size", "size"),
    [
        ((9, 11), 4, (40, 48), (10, 12)),
        ((17, 12), 2, (40, 31), (13, 15)),
        ((33, 49), 1, (40, 56), (5, 28)),
        ((1, 4), 3, (8, 17), (3, 9)),
    ],
)
def test_reading_equals_a_loop(grid, stride, image_size, size):
    tokens = torch.randn(2, 3, *grid, dtype=torch.float64)

    def matrix(axis):
        """Weights of the tokens for each cell: a triangle, as many tokens wide as lie between cells."""
        weights = np.zeros((size[axis], grid[axis]))
        for cell in range(size[axis]):
            pixel = (cell + 0.5) * image_size[axis] / size[axis]
            centres = [j * stride + PATCH / 2 for j in range(grid[axis])]
            pixel = min(max(pixel, centres[0]), centres[-1])
            reach = stride * max(1, image_size[axis] // size[axis] // stride)
            weights[cell] = [max(0, 1 - abs(pixel - centre) / reach) for centre in centres]
            weights[cell] /= weights[cell].sum()
        return torch.from_numpy(weights)

    expected = torch.einsum("yh,xw,bchw->bcyx", matrix(0), matrix(1), tokens)
    torch.testing.assert_close(read_tokens(tokens, PATCH, stride, image_size, size), expected, atol=1e-12, rtol=1e-12)


def test_gradients_of_reading():
    tokens = torch.randn(1, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: read_tokens(x, PATCH, 3, (20, 26), (6, 4)), tokens)


@pytest.mark.parametrize(
    ("patch", "factor", "stride"),
    [
        (8, 1, 8),
        (8, 2, 4),
        (8, 3, 3),
        (8, 1.5, 5),
        (8, 8, 1),
        (14, 4, 3),
        (14, 8, 2),
        (14, 14, 1),
        (16, 12, 1),
        (5, 2, 2),
    ],
)
def test_strides(patch, factor, stride):
    assert compute_stride(patch, factor) == stride


@pytest.mark.parametrize("output_size", [None, (11, 17), (8, 40)])
def test_a_real_encoder(output_size):
    encoder = create_encoder("toy-vit", "stride", 2)
    image = F.interpolate(torch.randn(2, 3, 6, 9), (70, 101), mode="bicubic")
    low_res_size = (64, 96)
    stride = {None: 4, (11, 17): 6, (8, 40): 2}[output_size]
    with torch.no_grad():
        out = encoder(image, output_size=output_size, return_summary=True, low_res_size=low_res_size)
        small = resize(image, low_res_size)
        low_res, summary = encoder.encode(small)
        tokens = encoder.encode(small, patch_stride=stride).features
    assert tokens.shape[2:] == (1 + 56 // stride, 1 + 88 // stride)
    torch.testing.assert_close(out.low_res, low_res)
    torch.testing.assert_close(out.summary, summary)
    expected = read_tokens(tokens, PATCH, stride, low_res_size, output_size or (16, 24))
    torch.testing.assert_close(out.high_res, expected)


def test_a_module_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8
    )
    backbone = from_callable(transformers.Dinov2Model(config), input_size=(64, 64))
    with torch.no_grad():
        out = create_encoder(backbone, "stride", 2.5)(torch.randn(1, 3, 48, 64))
    assert out.high_res.shape == (1, 32, 15, 20)
    assert out.high_res.isfinite().all()


def test_factor_one_and_images_of_one_patch():
    image = torch.randn(1, 3, 8, 8)
    one = Stride(3, 1)(image, lambda images: mean_colour(images), (8, 8))
    assert torch.equal(one.high_res, one.low_res)
    out = Stride(3, 3)(image, mean_colour, (8, 8))
    torch.testing.assert_close(out.high_res, out.low_res.expand(-1, -1, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    image = F.interpolate(torch.randn(1, 3, 5, 6), (40, 48), mode="bicubic")
    exact = Stride(3, 3)(image, mean_colour, (40, 48)).high_res
    half = Stride(3, 3).to(dtype)(image.to(dtype), mean_colour, (40, 48)).high_res
    assert half.dtype == dtype
    assert F.cosine_similarity(half.float(), exact).mean() > 0.99


def test_beyond_the_patch_size():
    with pytest.raises(ConfigError, match="8 tokens per axis of a 8-pixel patch; got a factor of 9, use at most 8"):
        Stride(3, 9)(torch.randn(1, 3, 16, 16), mean_colour, (16, 16))
    with pytest.raises(ConfigError, match="got a factor of 10, use at most 8"):
        Stride(3, 2)(torch.randn(1, 3, 16, 16), mean_colour, (16, 16), (4, 20))
    with pytest.raises(InputError, match="nearest is 2x3"):
        Stride(3, 2)(torch.randn(1, 3, 16, 16), mean_colour, (16, 16), (1, 3))


def test_a_backbone_without_patches():
    with pytest.raises(ConfigError, match=r"'toy-cnn' .* cannot overlap"):
        create_encoder("toy-cnn", "stride", 2)(torch.randn(1, 3, 64, 64))
