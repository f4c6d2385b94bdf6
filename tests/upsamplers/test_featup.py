"""JBU against the product of kernels as published, and against blurs that are known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from featsharp.errors import ConfigError
from featsharp.upsamplers.base import prime_factors
from featsharp.upsamplers.featup import FeatUp, JBULevel, pool_guidance


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] to [B, C, 49, H, W], mirrored beyond the border."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (3, 3, 3, 3), mode="reflect")
    return torch.stack([padded[..., dy : dy + height, dx : dx + width] for dy in range(7) for dx in range(7)], 2)


def squared_offsets() -> torch.Tensor:
    steps = [i / 3 for i in range(-3, 4)]
    return torch.tensor([y * y + x * x for y in steps for x in steps], dtype=torch.float64)


def published_level(level: JBULevel, source, guidance, range_alpha, spatial_alpha):
    """Range kernel times spatial kernel over their sum, which is kept above 1e-7."""
    keys = level.keys(guidance)
    logits = (neighbours(keys) * keys[:, :, None]).sum(1)  # [B, 49, H, W]
    temperature = level.log_temperature.exp().clamp(1e-4, 1e4)
    range_kernel = range_alpha.exp() * (temperature * logits).softmax(1)
    spatial_kernel = spatial_alpha.exp() * (-squared_offsets() / (2 * level.sigma**2)).exp()
    product = range_kernel * spatial_kernel[None, :, None, None]
    weights = product / product.sum(1, keepdim=True).clamp(min=1e-7)
    large = F.interpolate(source, scale_factor=level.factor, mode="bilinear", align_corners=False)
    return (neighbours(large) * weights[:, None]).sum(2)


@pytest.mark.parametrize(("factor", "sigma", "temperature"), [(2, 1.0, 0.0), (3, 1.0, 0.5), (2, -0.4, -1.0)])
def test_equals_the_published_product(factor, sigma, temperature):
    level = JBULevel(factor, start="published").double()
    with torch.no_grad():
        level.sigma.fill_(sigma)
        level.log_temperature.fill_(temperature)
    source = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    guidance = torch.randn(2, 3, 3 * factor, 4 * factor, dtype=torch.float64)
    alphas = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.3, -0.2)]
    expected = published_level(level, source, guidance, *alphas)
    torch.testing.assert_close(level(source, guidance), expected, atol=1e-6, rtol=1e-6)
    # The two scalars of the published code that are left out here never had a gradient.
    weights = torch.randn_like(expected)
    for gradient in torch.autograd.grad((expected * weights).sum(), alphas):
        assert gradient.abs() < 1e-10


def test_gradients_equal_those_of_the_published_product():
    level = JBULevel(2, start="published").double()
    source = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    guidance = torch.randn(1, 3, 6, 8, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    inputs = [source, *level.parameters()]
    weights = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    mine, published = (
        torch.autograd.grad((out * weights).sum(), inputs)
        for out in (level(source, guidance), published_level(level, source, guidance, zero, zero))
    )
    torch.testing.assert_close(mine, published, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_constant_guidance_gives_a_gaussian_blur_of_the_bilinear_map(sigma):
    level = JBULevel(2, start="published").double()
    torch.nn.init.constant_(level.sigma, sigma)
    source = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    out = level(source, torch.full((1, 3, 10, 8), 0.4, dtype=torch.float64))
    kernel = (-squared_offsets() / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).reshape(1, 1, 7, 7).expand(3, 1, 7, 7)
    large = F.interpolate(source, scale_factor=2, mode="bilinear", align_corners=False)
    expected = F.conv2d(F.pad(large, (3, 3, 3, 3), mode="reflect"), kernel, groups=3)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("start", ["published", "bilinear"])
def test_a_constant_source_stays_constant(start):
    upsampler = FeatUp(2, 6, start=start)
    source = torch.tensor([1.5, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 5)
    out = upsampler.upsample(source, torch.randn(1, 3, 40, 50))
    torch.testing.assert_close(out, source[..., :1, :1].expand(1, 2, 18, 30))


def test_the_filter_follows_edges_of_the_image():
    """Keys that tell black from white: no weight crosses the edge, however coarse the source."""
    level = JBULevel(2, start="published")
    with torch.no_grad():
        for convolution in (level.keys[0], level.keys[2]):
            torch.nn.init.zeros_(convolution.weight)
            torch.nn.init.zeros_(convolution.bias)
        level.keys[0].weight[0, 0], level.keys[0].weight[1, 0] = 10.0, -10.0
        level.keys[2].weight[0, 0], level.keys[2].weight[1, 1] = 10.0, 10.0
    image = torch.ones(1, 3, 16, 16)
    image[..., 8:] = -1
    source = torch.randn(1, 1, 8, 8)
    source[..., 4:] += 100  # left and right of the edge
    out = level(source, image)[0, 0]
    # The pixel left of the edge sees bilinear mixtures at most in its own column.
    assert out[:, :7].max() < 10
    assert out[:, 9:].min() > 80
    blurred = level(source, torch.zeros_like(image))[0, 0]
    assert blurred[:, 6].min() > 10


def test_levels_are_the_prime_factors_each_with_its_own_parameters():
    upsampler = FeatUp(4, 12)
    assert [level.factor for level in upsampler.levels] == [2, 2, 3]
    # Two 1x1 convolutions (3 -> 32 -> 32), a temperature, a sigma; not the two inert scalars of the paper's code.
    assert sum(p.numel() for p in upsampler.parameters()) == 3 * (1188 - 2)
    assert len(FeatUp(4, 1).levels) == 0


def test_a_stack_runs_level_by_level_on_the_pooled_image():
    upsampler = FeatUp(3, 6)
    source, image = torch.randn(1, 3, 2, 3), torch.randn(1, 3, 24, 36)
    half = upsampler.levels[0](source, F.avg_pool2d(image, 6))
    expected = upsampler.levels[1](half, F.avg_pool2d(image, 2))
    torch.testing.assert_close(upsampler.upsample(source, image), expected)


@settings(deadline=None)
@given(st.integers(1, 5000))
def test_prime_factors(number):
    primes = prime_factors(number)
    assert math.prod(primes) == number
    assert primes == sorted(primes)
    assert all(prime % divisor for prime in primes for divisor in range(2, math.isqrt(prime) + 1))


def test_the_bilinear_start_is_close_to_the_bilinear_map_and_the_published_one_is_a_blur():
    source, image = torch.randn(1, 4, 6, 8), torch.rand(1, 3, 48, 64)
    bilinear = F.interpolate(source, scale_factor=2, mode="bilinear", align_corners=False)
    error = {
        start: (FeatUp(4, 2, start=start).upsample(source, image) - bilinear).square().mean() / bilinear.var()
        for start in ("bilinear", "published")
    }
    assert error["bilinear"] < 0.02
    assert error["published"] > 0.2


def test_unknown_start():
    with pytest.raises(ConfigError, match="unknown start 'sharp'; use 'published' or 'bilinear'"):
        FeatUp(4, 2, start="sharp")


def test_guidance_is_averaged_over_cells():
    image = torch.randn(1, 3, 12, 20)
    torch.testing.assert_close(pool_guidance(image, (3, 4)), F.avg_pool2d(image, (4, 5)))
    assert torch.equal(pool_guidance(image, (12, 20)), image)


def test_guidance_from_a_small_image_is_enlarged():
    image = torch.randn(1, 3, 4, 5)
    expected = F.interpolate(image, (8, 10), mode="bilinear", align_corners=False)
    assert torch.equal(pool_guidance(image, (8, 10)), expected)
    assert pool_guidance(image, (3, 10)).shape == (1, 3, 3, 10)
