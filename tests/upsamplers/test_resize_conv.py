"""Resize-convolution against a loop over cells, and where it starts."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.errors import ConfigError
from featsharp.upsamplers.resize_conv import ResizeConv


def loop(upsampler: ResizeConv, features, image, sizes):
    """The formula, cell by cell."""
    x = features
    for number, (conv, size) in enumerate(zip(upsampler.levels, sizes, strict=True)):
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        guide = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
        out = torch.zeros_like(x)
        for b in range(len(x)):
            for row in range(size[0]):
                for col in range(size[1]):
                    cell = torch.cat([x[b, :, row, col], guide[b, :, row, col]])
                    correction = conv.weight[:, :, 0, 0] @ cell + conv.bias
                    if number + 1 < len(sizes):
                        correction = correction.clamp(min=0)
                    out[b, :, row, col] = x[b, :, row, col] + correction
        x = out
    return x


@pytest.mark.parametrize(
    ("factor", "output_size", "sizes"),
    [
        (2, None, [(6, 10)]),
        (3, None, [(9, 15)]),
        (6, None, [(6, 10), (18, 30)]),
        (2.5, None, [(8, 13)]),  # one level, of 3, cut short
        (4, (9, 17), [(6, 10), (9, 17)]),
        (2, (7, 31), [(7, 31)]),
    ],
)
def test_against_the_loop(factor, output_size, sizes):
    upsampler = ResizeConv(4, factor, start="published").double()
    features = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    image = torch.randn(2, 3, 40, 50, dtype=torch.float64)
    out = upsampler.upsample(features, image, output_size)
    torch.testing.assert_close(out, loop(upsampler, features, image, sizes))


def test_an_image_smaller_than_the_map_is_enlarged():
    upsampler = ResizeConv(4, 3, start="published")
    features, image = torch.randn(1, 4, 3, 5), torch.randn(1, 3, 6, 7)
    large = F.interpolate(image, (9, 15), mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsampler.upsample(features, image), upsampler.upsample(features, large))


def test_the_published_one_has_four_levels_of_two():
    upsampler = ResizeConv(384, 16)
    assert len(upsampler.levels) == 4
    assert sum(p.numel() for p in upsampler.parameters()) == 4 * (387 * 384 + 384)


@pytest.mark.parametrize("levels", [1, 4])
def test_the_default_start_is_close_to_bilinear_levels_and_the_published_one_is_not(levels):
    features, image = torch.randn(1, 8, 4, 5), torch.randn(1, 3, 64, 80)
    bilinear = features
    for _ in range(levels):
        bilinear = F.interpolate(bilinear, scale_factor=2, mode="bilinear", align_corners=False)
    errors = {}
    for start in ("bilinear", "published"):
        out = ResizeConv(8, 2**levels, start=start).upsample(features, image)
        errors[start] = ((out - bilinear).square().mean() / bilinear.var()).sqrt()
    assert errors["bilinear"] < 0.03
    assert errors["published"] > 0.3


def test_factor_one_learns_nothing_and_still_makes_the_size_asked_for():
    features, image = torch.randn(1, 4, 3, 5), torch.randn(1, 3, 40, 50)
    upsampler = ResizeConv(4, 1)
    assert torch.equal(upsampler.upsample(features, image), features)
    expected = F.interpolate(features, (4, 9), mode="bilinear", align_corners=False)
    assert torch.equal(upsampler.upsample(features, image, (4, 9)), expected)


def test_all_levels_learn_from_the_start():
    """A small start, because a convolution of zeros behind a relu never moves."""
    upsampler = ResizeConv(8, 8)
    out = upsampler.upsample(torch.randn(1, 8, 4, 5), torch.randn(1, 3, 64, 80))
    (out - torch.randn_like(out)).square().mean().backward()
    for parameter in upsampler.parameters():
        assert (parameter.grad.abs() > 1e-6).float().mean() > 0.8


def test_unknown_start():
    with pytest.raises(ConfigError, match="unknown start 'sharp'; use 'bilinear' or 'published'"):
        ResizeConv(4, 2, start="sharp")
