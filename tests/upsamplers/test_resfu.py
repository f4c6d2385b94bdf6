"""ReSFU and each of its pieces against loops over cells; the tiled one against its pieces."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from featsharp.errors import ConfigError
from featsharp.memory import PeakMeter
from featsharp.upsamplers.resfu import (
    PairedContrast,
    ReSFU,
    Similarity,
    TiledReSFU,
    blur,
    guided_filter,
    inside_image,
    weighted_samples,
)
from featsharp.upsamplers.tile import Tile

SIZES = [((3, 5), (6, 10)), ((3, 5), (9, 15)), ((2, 3), (5, 8)), ((3, 4), (3, 11)), ((1, 1), (2, 3)), ((1, 4), (1, 4))]
PATCH = 4


def randomise(module: torch.nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))


def cells(size):
    return itertools.product(range(size[0]), range(size[1]))


def bilinear_sample(x, y, col):
    """x [C, h, w] at the place (y, col) in cells whose centres are at halves, clamped."""
    out = torch.zeros_like(x[:, 0, 0])
    for i, j in cells(x.shape[1:]):
        place = min(max(y, 0.5), x.shape[1] - 0.5), min(max(col, 0.5), x.shape[2] - 0.5)
        out = out + max(0, 1 - abs(place[0] - i - 0.5)) * max(0, 1 - abs(place[1] - j - 0.5)) * x[:, i, j]
    return out


def loop_samples(x, weights):
    grid, size = x.shape[2:], weights.shape[2:]
    out = x.new_zeros(*x.shape[:2], *size)
    for b, (row, col) in itertools.product(range(len(x)), cells(size)):
        y, place = (row + 0.5) * grid[0] / size[0], (col + 0.5) * grid[1] / size[1]
        for n, (dy, dx) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
            out[b, :, row, col] += weights[b, n, row, col] * bilinear_sample(x[b], y + dy, place + dx)
    return out


def loop_inside(grid, size):
    out = torch.zeros(9, *size, dtype=torch.bool)
    for row, col in cells(size):
        for n, (dy, dx) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
            y, x = (row + 0.5) * grid[0] / size[0] + dy, (col + 0.5) * grid[1] / size[1] + dx
            out[n, row, col] = -1e-9 <= y <= grid[0] + 1e-9 and -1e-9 <= x <= grid[1] + 1e-9
    return out


def loop_box_mean(x):
    out = torch.zeros_like(x)
    for row, col in cells(x.shape[2:]):
        box = x[:, :, max(0, row - 4) : row + 5, max(0, col - 4) : col + 5]
        out[:, :, row, col] = box.mean((2, 3))
    return out


def loop_guided_filter(guide, x):
    """He and Sun's fast guided filter, radius 4 at half the resolution."""
    size = x.shape[2:]

    def resized(y, to):
        return F.interpolate(y, to, mode="bilinear", align_corners=False, antialias=True)

    half = [math.ceil(length / 2) for length in size]
    p, small = resized(guide, half), resized(x, half)
    mean_p, mean_x = loop_box_mean(p), loop_box_mean(small)
    covariance = loop_box_mean((p - 0) * small) - mean_p * mean_x
    variance = loop_box_mean(p * p) - mean_p**2
    a = covariance / (variance + 1e-3)
    b = mean_x - a * mean_p
    return resized(loop_box_mean(a), size) * guide + resized(loop_box_mean(b), size)


def loop_blur(x):
    kernel = torch.tensor([[math.exp(-(dy**2 + dx**2) / 2) for dx in (-1, 0, 1)] for dy in (-1, 0, 1)]).double()
    kernel /= kernel.sum()
    out = torch.zeros_like(x)
    for (row, col), (i, j) in itertools.product(cells(x.shape[2:]), cells((3, 3))):
        y, place = min(max(row + i - 1, 0), x.shape[2] - 1), min(max(col + j - 1, 0), x.shape[3] - 1)
        out[:, :, row, col] += kernel[i, j] * x[:, :, y, place]
    return out


def group_norm(x, weight, bias):
    """Eight groups of channels, each with mean 0 and variance 1 over the map."""
    groups = x.unflatten(1, (8, -1))
    mean = groups.mean((2, 3, 4), keepdim=True)
    variance = groups.var((2, 3, 4), unbiased=False, keepdim=True)
    normed = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
    return normed * weight[:, None, None] + bias[:, None, None]


def loop_contrast(block, first, second, dilation, offset):
    """One pair, one cell at a time; ``offset`` is that of the norm, which cancels."""
    first, second = (group_norm(x, block.norm_weight, offset) for x in (first, second))
    weight = block.contrast.weight.unflatten(0, (4, 32))  # [groups, outputs, inputs, 3, 3]
    height, width = first.shape[2:]
    hidden = first.new_zeros(len(first), 128, height, width)
    for b, (row, col) in itertools.product(range(len(first)), cells((height, width))):
        total = block.contrast.bias
        for i, j in cells((3, 3)):
            y = min(max(row + (i - 1) * dilation[0], 0), height - 1)
            x = min(max(col + (j - 1) * dilation[1], 0), width - 1)
            difference = (first[b, :, y, x] - second[b, :, row, col]).unflatten(0, (4, 8))
            total = total + torch.einsum("goi,gi->go", weight[..., i, j], difference).flatten()
        hidden[b, :, row, col] = total
    hidden = hidden.clamp(min=0).unflatten(1, (4, 32))
    hidden = torch.einsum("goi,bgihw->bgohw", block.mix.weight[:, :, 0, 0].unflatten(0, (4, 8)), hidden).flatten(1, 2)
    hidden = (hidden + block.mix.bias[:, None, None]).clamp(min=0)
    hidden = group_norm(hidden, block.norm.weight, block.norm.bias)
    return torch.einsum("oi,bihw->bohw", block.scores.weight[:, :, 0, 0], hidden) + block.scores.bias[:, None, None]


def pointwise(x, conv):
    return torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]


def loop_resfu(similarity, features, guidance, dilation):
    size = guidance.shape[2:]
    query = pointwise(guidance, similarity.query)
    key = F.interpolate(pointwise(features, similarity.key), size, mode="bilinear", align_corners=False)
    offset = torch.randn(32, dtype=features.dtype)
    scores = loop_contrast(similarity.semantic, key, loop_guided_filter(query, key), dilation, offset)
    scores = scores + loop_contrast(similarity.detail, loop_blur(query), query, dilation, offset)
    scores = torch.where(loop_inside(features.shape[2:], size), scores, -1e7)
    return loop_samples(features, scores.softmax(1))


@pytest.mark.parametrize(
    ("factor", "output_size", "dilation"),
    [(2, None, (2, 2)), (3, None, (3, 3)), (1.5, None, (2, 2)), (2, (4, 15), (1, 3)), (1, None, (1, 1))],
)
def test_against_the_loop(factor, output_size, dilation):
    upsampler = ReSFU(4, factor).double()
    randomise(upsampler)
    features = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    image = torch.randn(2, 3, 36, 60, dtype=torch.float64)
    with torch.no_grad():
        out = upsampler.upsample(features, image, output_size)
        guidance = F.adaptive_avg_pool2d(image, out.shape[2:])
        torch.testing.assert_close(out, loop_resfu(upsampler.similarity, features, guidance, dilation))


def test_gradients_are_those_of_the_loop_and_none_is_dead():
    upsampler = ReSFU(3, 2).double()
    randomise(upsampler)
    features = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    guidance = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    results = (
        weighted_samples(features, upsampler.similarity(features, guidance)),
        loop_resfu(upsampler.similarity, features, guidance, (2, 2)),
    )
    weights = torch.randn_like(results[0])
    inputs = [features, *upsampler.parameters()]
    mine, looped = (torch.autograd.grad((out * weights).sum(), inputs) for out in results)
    torch.testing.assert_close(mine, looped)
    assert all(gradient.abs().max() > 1e-9 for gradient in mine)


@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_samples_against_the_loop(grid, size):
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    weights = torch.randn(2, 9, *size, dtype=torch.float64)
    torch.testing.assert_close(weighted_samples(x, weights), loop_samples(x, weights))


def test_gradients_of_the_samples_by_finite_differences():
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 9, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weighted_samples, (x, weights), fast_mode=True)


@pytest.mark.parametrize("size", [(14, 14), (7, 30)])
def test_the_middle_sample_is_the_bilinear_map(size):
    x = torch.randn(2, 3, 7, 7)
    weights = torch.zeros(2, 9, *size)
    weights[:, 4] = 1
    expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(weighted_samples(x, weights), expected)


@pytest.mark.parametrize("train", [False, True])
def test_samples_are_made_one_after_the_other(train):
    x = torch.randn(1, 64, 16, 16, requires_grad=train)
    weights = torch.rand(1, 9, 64, 64, requires_grad=train)
    with PeakMeter() as meter:
        out = weighted_samples(x, weights)
        if train:
            out.backward(torch.ones_like(out))
    # The result, a sample, the same weighted, and three maps of a quarter of that; in training their gradients too.
    # Nine samples that are kept would be nine more.
    assert meter.peak < (8 if train else 4) * out.nbytes


@pytest.mark.parametrize(("grid", "size"), [*SIZES, ((4, 6), (6, 9)), ((30, 7), (45, 49))])
def test_samples_outside_of_the_image(grid, size):
    inside = inside_image(grid, size, torch.device("cpu"))
    assert torch.equal(inside, loop_inside(grid, size))
    assert inside[4].all()
    assert torch.equal(inside, inside.flip(0, 1, 2))  # the image has no preferred side


@pytest.mark.parametrize("size", [(6, 10), (23, 40), (1, 1), (1, 7)])
def test_the_guided_filter_against_the_loop(size):
    guide, x = torch.randn(2, 2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(guided_filter(guide, x), loop_guided_filter(guide, x))


def test_the_guided_filter_finds_a_linear_relation():
    guide = 10 * torch.randn(1, 4, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(guided_filter(guide, 3 * guide - 2), 3 * guide - 2, atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_guided_filter_of_half_types_computes_in_float32(dtype):
    """Variances of half types around a mean of 100 would be noise, and squares of 300 infinite in float16."""
    guide = (300 + 4 * torch.randn(1, 4, 20, 24)).to(dtype)
    x = torch.randn(1, 4, 20, 24).to(dtype)
    out = guided_filter(guide, x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), guided_filter(guide.float(), x.float()), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("size", [(6, 10), (1, 1), (1, 7)])
def test_blur_against_the_loop(size):
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(blur(x), loop_blur(x), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("factor", [2, 3, 1.5])
def test_a_constant_map_stays_constant_up_to_the_border(factor):
    upsampler = ReSFU(2, factor)
    randomise(upsampler)
    source = torch.tensor([1.5, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 5)
    with torch.no_grad():
        out = upsampler.upsample(source, torch.randn(1, 3, 48, 80))
    torch.testing.assert_close(out, source[..., :1, :1].expand_as(out))


def test_the_default_start_is_close_to_the_bilinear_map_and_the_published_one_is_a_blur():
    features, image = torch.randn(1, 8, 6, 7), torch.randn(1, 3, 48, 56)
    bilinear = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
    errors = {
        start: (ReSFU(8, 2, start=start).upsample(features, image) - bilinear).square().mean() / bilinear.var()
        for start in ("bilinear", "published")
    }
    assert errors["bilinear"] < 0.05
    assert errors["published"] > 0.3


def test_number_of_parameters():
    # Norm, 3x3 convolution of 8 to 128 channels in 4 groups, 1x1 of 128 to 32 in 4 groups, norm, 1x1 to 9 scores.
    contrast = 32 + (128 * 8 * 9 + 128) + (32 * 32 + 32) + 2 * 32 + (32 * 9 + 9)
    assert sum(p.numel() for p in PairedContrast().parameters()) == contrast == 10793
    assert sum(p.numel() for p in ReSFU(384, 2).parameters()) == 2 * contrast + (3 * 32 + 32) + (384 * 32 + 32)
    tiled = TiledReSFU(384, 2)
    assert sum(p.numel() for p in tiled.parameters()) == 2 * contrast + (387 * 32 + 32) + (384 * 32 + 32)


def encode(images):
    """Colours of each patch in random directions, and their mean."""
    directions = torch.randn(8, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(3))
    features = F.conv2d(images, directions.to(images.dtype), stride=PATCH)
    return features, features.mean((2, 3))


@pytest.mark.parametrize(("factor", "output_size"), [(2, None), (3, None), (1.5, None), (2, (7, 9))])
def test_tiles_are_guidance_beside_the_image(factor, output_size):
    upsampler = TiledReSFU(8, factor)
    randomise(upsampler, 0.1)
    image = torch.randn(2, 3, 36, 60)
    arguments = (image, encode, (3 * PATCH, 5 * PATCH), output_size)
    with torch.no_grad():
        out, tiles = upsampler(*arguments), Tile(8, factor)(*arguments)
        guidance = torch.cat([F.adaptive_avg_pool2d(image, tiles.high_res.shape[2:]), tiles.high_res], 1)
        expected = weighted_samples(tiles.low_res, upsampler.similarity(tiles.low_res, guidance))
        unseen = torch.cat([guidance[:, :3], 0 * tiles.high_res], 1)
        blind = weighted_samples(tiles.low_res, upsampler.similarity(tiles.low_res, unseen))
    torch.testing.assert_close(out.high_res, expected)
    assert (out.high_res - blind).abs().max() > 0.01
    assert torch.equal(out.low_res, tiles.low_res)
    assert torch.equal(out.summary, tiles.summary)
    assert upsampler.input_upsample_factor == factor


def test_batches_of_tiles_can_be_bounded():
    image, sizes = torch.randn(2, 3, 24, 40), []

    def counting(images):
        sizes.append(len(images))
        return encode(images)

    upsampler = TiledReSFU(8, 2)
    with torch.no_grad():
        full = upsampler(image, counting, (12, 20)).high_res
        upsampler.max_tile_batch = 3
        bounded = upsampler(image, counting, (12, 20)).high_res
    assert sizes == [10, 3, 3, 3, 1]
    torch.testing.assert_close(bounded, full)


def test_options_that_cannot_work():
    with pytest.raises(ConfigError, match="unknown start 'sharp'; use 'bilinear' or 'published'"):
        ReSFU(4, 2, start="sharp")
    with pytest.raises(ConfigError, match="max_tile_batch must be a whole number of at least 1; got 0"):
        TiledReSFU(4, 2, max_tile_batch=0)


def test_similarity_of_half_types_sums_to_one():
    similarity = Similarity(8, 3, "bilinear").to(torch.float16)
    features, guidance = torch.randn(1, 8, 3, 5).half(), torch.randn(1, 3, 6, 10).half()
    with torch.no_grad():
        weights = similarity(features, guidance)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(1, 6, 10))
    assert (weights[:, :3, 0] == 0).all()  # above the image
