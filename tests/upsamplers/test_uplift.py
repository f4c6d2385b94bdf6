"""UPLiFT: its attender and steps by loops, strips of the image, and how often it doubles."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box, whole
from featsharp.ops.resize import enlarge_aligned, resample_box, resample_chunk, resize
from featsharp.upsamplers.uplift import OFFSETS, FittedBlock, UPLiFT, weigh_neighbours


def randomised(*arguments, **options):
    """In eval mode, with statistics of batches that are not trivial."""
    upsampler = UPLiFT(*arguments, **options).eval()
    for module in upsampler.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return upsampler


@pytest.mark.parametrize("grid", [(4, 6), (1, 3), (2, 1)])
def test_neighbours_are_weighed_as_in_the_loop(grid):
    size = 2 * grid[0], 2 * grid[1]
    x = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 17, *size, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, 3, *size, dtype=torch.float64)
    for y, col, (n, (dy, dx)) in itertools.product(range(size[0]), range(size[1]), enumerate(OFFSETS)):
        at = min(max(y // 2 + dy, 0), grid[0] - 1), min(max(col // 2 + dx, 0), grid[1] - 1)
        expected[:, :, y, col] += (weights[:, n, y, col, None] * x[:, :, at[0], at[1]]).detach()
    out = weigh_neighbours(x, weights, whole(size))
    torch.testing.assert_close(out.detach(), expected, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(out.square().sum(), (x, weights))
    for top, left in itertools.product(range(2), range(2)):
        box = Box(min(top, size[0] - 1), size[0], left, size[1])
        part = weigh_neighbours(x, box.cut(weights), box)
        torch.testing.assert_close(part.detach(), box.cut(expected), atol=1e-12, rtol=0)
        if box.covers(size):
            torch.testing.assert_close(torch.autograd.grad(part.square().sum(), (x, weights)), gradients)


def test_the_input_of_a_block_is_cut_or_padded_and_added():
    x = torch.randn(1, 5, 3, 3)
    for outputs in (3, 5, 8):
        block = FittedBlock(5, outputs, 2).eval()
        with torch.no_grad():
            added = block(x) - block.layers(x)
        kept = min(5, outputs)
        torch.testing.assert_close(added[:, :kept], x[:, :kept], atol=1e-6, rtol=0)
        assert not added[:, kept:].any()


@torch.no_grad()
def test_a_doubling_equals_the_formula():
    upsampler = randomised(7, 2).double()
    features, image = torch.randn(2, 7, 3, 4).double(), torch.randn(2, 3, 48, 64).double()
    levels = [image]
    for block in upsampler.encoder:
        levels.append(block(levels[-1]))
    # One pixel per cell, the one in its corner.
    y = upsampler.coarse(torch.cat([features, levels[5][..., ::16, ::16]], 1))
    y = F.conv_transpose2d(y, upsampler.expand.weight, upsampler.expand.bias, stride=2) + F.interpolate(
        y, scale_factor=2, mode="bilinear", align_corners=True
    )
    g = upsampler.fine(torch.cat([y, levels[4][..., ::8, ::8]], 1))
    weights = (F.conv2d(g, upsampler.attend.weight, upsampler.attend.bias) + g[:, :17]).softmax(1)
    expected = weigh_neighbours(features, weights, whole((6, 8)))
    torch.testing.assert_close(upsampler.upsample(features, image), expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_strips_of_the_image_and_chunks_are_as_the_whole():
    upsampler = randomised(5, 4).double()
    features, image = torch.randn(1, 5, 4, 3).double(), torch.randn(1, 3, 60, 60).double()
    expected = upsampler.encode_image(image, (4, 3), 2)
    strips = upsampler.encode_image(image, (4, 3), 2, max_numbers=1)
    for guide, whole_guide in zip(strips, expected, strict=True):
        torch.testing.assert_close(guide, whole_guide, atol=1e-10, rtol=1e-10)
    for size in ((16, 12), (11, 9), (4, 3)):
        compute = upsampler.prepare_chunks(features, image, size)
        everything = compute(whole(size))
        for box in (Box(0, 1, 0, 1), Box(1, 4, 1, 3), Box(size[0] - 2, size[0], 0, size[1])):
            # Positions of the enlargement with aligned corners are float32.
            torch.testing.assert_close(compute(box), box.cut(everything), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("factor", "size", "count"), [(2, (6, 8), 1), (3, (9, 12), 2), (4, (12, 16), 2), (2, (3, 4), 1), (2, (13, 8), 3)]
)
def test_it_doubles_as_often_as_the_size_needs(factor, size, count):
    features = torch.zeros(1, 5, 3, 4)
    assert UPLiFT(5, factor).count_doublings(features, size) == count
    if factor != 3:
        assert UPLiFT(5, factor, published=True).count_doublings(features, size) == math.log2(factor)


def test_output_stays_in_the_hull_of_the_features():
    features = torch.randn(2, 8, 5, 3)
    out = randomised(8, 4).upsample(features, torch.randn(2, 3, 70, 50), (19, 9))
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    assert out.shape == (2, 8, 19, 9)
    assert (out >= low - 1e-5).all()
    assert (out <= high + 1e-5).all()


def test_parameters_are_those_of_the_published_models():
    for factor in (2, 16):
        with torch.device("meta"):
            assert sum(p.numel() for p in UPLiFT(384, factor).parameters()) == 789_521


def test_factors_that_cannot_be():
    with pytest.raises(ConfigError, match="got factor 1, use 2"):
        UPLiFT(8, 1)
    with pytest.raises(
        ConfigError, match="UPLiFT as published takes factors that are powers of two; got 3, use 2 or 4"
    ):
        UPLiFT(8, 3, published=True)


@pytest.mark.parametrize(("source", "size"), [((8, 12), (5, 7)), ((4, 3), (9, 10)), ((6, 6), (6, 4)), ((1, 5), (1, 3))])
def test_chunks_of_resized_maps(source, size):
    x = torch.randn(2, 3, *source, dtype=torch.float64)
    expected = resize(x, size)
    for box in (whole(size), Box(0, 1, 1, 3), Box(size[0] - 1, size[0], 0, size[1])):
        chunk = resample_box(box, source, size)
        out = resample_chunk(chunk.cut(x), chunk, source, size, box)
        torch.testing.assert_close(out, box.cut(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", [(5, 4), (1, 3)])
def test_chunks_of_maps_enlarged_with_aligned_corners(grid):
    size = 2 * grid[0], 2 * grid[1]
    x = torch.randn(1, 2, *grid)
    expected = F.interpolate(x, size, mode="bilinear", align_corners=True)
    assert torch.equal(enlarge_aligned(x, whole(grid), grid, size, whole(size)), expected)
    for box in (Box(0, 1, 2, size[1]), Box(size[0] - 2, size[0], 0, 3)):
        chunk = Box(max(0, box.top // 2 - 1), grid[0], max(0, box.left // 2 - 1), grid[1])
        torch.testing.assert_close(enlarge_aligned(chunk.cut(x), chunk, grid, size, box), box.cut(expected))
