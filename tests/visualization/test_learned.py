"""Pictures of what training learns show the numbers that they are made of."""

import matplotlib
import pytest
import torch
from torch import Tensor

from featsharp.visualization.colours import VIRIDIS, colour_map
from featsharp.visualization.learned import (
    MAX_KERNELS,
    bias_picture,
    kernel_picture,
    middle_range,
    uncertainty_picture,
)


def test_colours_are_those_of_viridis():
    values = torch.linspace(0, 1, 256)
    expected = torch.from_numpy(matplotlib.colormaps["viridis"](values.numpy())[:, :3]).T
    found = colour_map(values[None], 0, 1)[:, 0]
    assert (found - expected).abs().max() < 0.03
    # In grey, equal steps look equal: brightness rises throughout.
    assert (torch.tensor([0.2126, 0.7152, 0.0722]) @ found).diff().min() > 0


def test_colours_end_at_their_range():
    dark, bright = (torch.tensor(colour) / 255 for colour in (VIRIDIS[0], VIRIDIS[-1]))
    found = colour_map(torch.tensor([[-9.0, 2.0, 4.0, 99.0]]), 2, 4)[:, 0].T
    assert torch.allclose(found, torch.stack([dark, dark, bright, bright]))
    assert torch.allclose(colour_map(torch.full((2, 3), 7.0), 7, 7), dark[:, None, None].expand(3, 2, 3))


def value_at(colour: Tensor) -> float:
    """Where on the colour map a colour stands, in [0, 1]."""
    scale = colour_map(torch.linspace(0, 1, 1001)[None], 0, 1)[:, 0]
    return (scale - colour[:, None]).abs().sum(0).argmin().item() / 1000


def test_kernels_are_enlarged_whole_and_kept_apart():
    kernels = torch.rand(2, 3, 4, 4)
    picture = kernel_picture(kernels, 140)
    assert picture.shape == (3, 90, 140)  # 2 * 4 + 1 by 3 * 4 + 2 squares of 10 pixels
    for row in range(2):
        for col in range(3):
            corner = picture[:, 50 * row : 50 * row + 40, 50 * col : 50 * col + 40]
            cells = corner[:, ::10, ::10]
            assert torch.equal(cells.repeat_interleave(10, 1).repeat_interleave(10, 2), corner)
            for y, x in ((0, 0), (1, 3), (3, 2)):
                expected = (kernels[row, col, y, x] / kernels.max()).item()
                assert value_at(cells[:, y, x]) == pytest.approx(expected, abs=0.01)
    assert (picture[:, 40:50] == 1).all()
    assert (picture[:, :, 40:50] == 1).all()


def test_many_kernels_are_thinned_out():
    kernels = torch.rand(3, 2 * MAX_KERNELS, 3, 3)
    assert torch.equal(kernel_picture(kernels, 500), kernel_picture(kernels[::2, ::2], 500))


def test_a_single_kernel_fills_the_picture():
    assert kernel_picture(torch.rand(1, 1, 5, 5), 224).shape == (3, 225, 225)


def test_bias_shows_components_and_length_without_its_mean():
    bias = torch.randn(1, 8, 4, 6)
    picture = bias_picture(bias, (40, 60))
    assert picture.shape == (3, 40, 120)
    assert torch.allclose(bias_picture(bias + 5, (40, 60)), picture, atol=1e-3)
    length = (bias - bias.mean((2, 3), keepdim=True))[0].norm(dim=0)
    assert value_at(picture[:, 15, 60 + 25]) == pytest.approx((length[1, 2] / length.max()).item(), abs=0.01)


def test_uncertainty_has_a_row_for_each_image_and_one_scale_for_all():
    image = torch.rand(3, 8, 8)
    picture = uncertainty_picture([(image, torch.zeros(4, 4)), (image, torch.ones(4, 4))], (0, 2), (16, 24))
    assert picture.shape == (3, 32, 48)
    assert torch.equal(picture[:, :16:2, :24:3], image)
    assert value_at(picture[:, 0, 30]) == 0
    assert value_at(picture[:, 20, 30]) == pytest.approx(0.5, abs=0.01)


def test_middle_range_leaves_out_the_ends():
    values = torch.arange(1001.0)
    assert middle_range([values[:300], values[300:]]) == (10, 990)
    assert middle_range([torch.full((2, 2), 3.0)]) == (3, 3)
