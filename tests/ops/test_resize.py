"""Resizing: exactly torch's bilinear when growing, Pillow's antialiased bilinear when shrinking."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from featsharp.errors import InputError
from featsharp.ops.resize import resize, size_of


def pillow(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Channel by channel through Pillow's float images."""
    planes = [Image.fromarray(plane.numpy()) for plane in x.flatten(0, 1)]
    small = [np.asarray(plane.resize(size[::-1], Image.Resampling.BILINEAR)) for plane in planes]
    return torch.from_numpy(np.stack(small)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("size", [(7, 9), (14, 18), (8, 33), (7, 27)])
def test_growing_is_plain_bilinear(size):
    x = torch.randn(2, 3, 7, 9)
    assert torch.equal(resize(x, size), F.interpolate(x, size, mode="bilinear", align_corners=False))


def test_the_same_size_is_the_same_tensor():
    x = torch.randn(1, 2, 3, 4)
    assert resize(x, (3, 4)) is x


@pytest.mark.parametrize("size", [(5, 7), (13, 10), (1, 1), (40, 9), (11, 60)])
def test_shrinking_is_antialiased_as_in_pillow(size):
    x = torch.rand(2, 3, 26, 31)
    torch.testing.assert_close(resize(x, size), pillow(x, size), atol=2e-6, rtol=1e-5)


def test_fine_stripes_shrink_to_grey():
    stripes = torch.arange(32).remainder(2).float().expand(1, 1, 32, 32)
    assert (resize(stripes, (8, 8)) - 0.5).abs().max() < 0.1


def test_pixel_centres():
    ramp = torch.arange(4.0).expand(1, 1, 1, 4)
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(resize(ramp, (1, 8))[0, 0, 0], expected)


@pytest.mark.parametrize("size", [(12, 20), (3, 5), (4, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, size):
    x = torch.rand(1, 2, 6, 10).to(dtype)
    out = resize(x, size)
    assert out.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(out.float(), resize(x.float(), size), atol=2 * eps, rtol=2 * eps)


def test_gradient_passes():
    x = torch.randn(1, 1, 6, 9, dtype=torch.float64, requires_grad=True)
    for size in [(4, 5), (8, 12)]:
        assert torch.autograd.gradcheck(lambda x, size=size: resize(x, size), x, fast_mode=True)


@pytest.mark.parametrize(("shape", "size"), [((3, 4, 4), (2, 2)), ((1, 3, 4, 4), (0, 2))])
def test_what_cannot_be_resized(shape, size):
    with pytest.raises(InputError, match="resize takes"):
        resize(torch.zeros(shape), size)


def test_size_of():
    assert size_of(torch.zeros(2, 3, 4, 5)) == (4, 5)
