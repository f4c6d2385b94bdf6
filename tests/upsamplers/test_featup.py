"""JBU against the product of kernels as published, and against blurs that are known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box, whole
from featsharp.upsamplers.base import prime_factors
from featsharp.upsamplers.chunked import works_in_chunks
from featsharp.upsamplers.featup import FeatUp, FixedUpLevel, JBULevel


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


@pytest.mark.parametrize(
    ("factor", "size", "sizes"),
    [
        (1.5, None, [(5, 8)]),
        (2, (9, 10), [(9, 10)]),
        (5.1, None, [(6, 10), (15, 26)]),
        (4, (7, 20), [(6, 10), (7, 20)]),
        (6, (40, 31), [(6, 10), (40, 31)]),
    ],
)
def test_the_last_level_makes_the_size_asked_for(factor, size, sizes):
    upsampler = FeatUp(3, factor).double()
    source, image = torch.randn(2, 3, 3, 5).double(), torch.randn(2, 3, 61, 83).double()
    expected = source
    for level, level_size in zip(upsampler.levels, sizes, strict=True):
        large = F.interpolate(expected, level_size, mode="bilinear", align_corners=False)
        expected = level.filter(large, F.adaptive_avg_pool2d(image, level_size))
    out = upsampler.upsample(source, image, size)
    assert out.shape[-2:] == sizes[-1]
    torch.testing.assert_close(out, expected)
    # In chunks, too.
    compute = upsampler.prepare_chunks(source, image, sizes[-1])
    for box in (whole(sizes[-1]), Box(2, 5, 3, 7), Box(4, 5, 0, 8)):
        torch.testing.assert_close(compute(box), box.cut(expected), atol=1e-6, rtol=1e-6)


def test_without_a_level_a_larger_map_is_bilinear():
    source, image = torch.randn(1, 3, 3, 5), torch.randn(1, 3, 20, 30)
    expected = F.interpolate(source, (4, 9), mode="bilinear", align_corners=False)
    assert torch.equal(FeatUp(3, 1).upsample(source, image, (4, 9)), expected)
    assert torch.equal(FeatUp(3, 1).upsample(source, image), source)


def fixed_up_level(level: FixedUpLevel, source, image, size):
    """FeatUp's own level, dropout off; the kernel comes before the guidance in the input of the fix-up."""
    guidance = F.adaptive_avg_pool2d(image, size)
    keys = level.keys[3](F.gelu(level.keys[0](guidance)))
    logits = (neighbours(keys) * keys[:, :, None]).sum(1)
    range_kernel = (level.log_temperature.exp().clamp(1e-4, 1e4) * logits).softmax(1)
    product = range_kernel * (-squared_offsets() / (2 * level.sigma**2)).exp()[None, :, None, None]
    total = product.sum(1, keepdim=True)
    kernel = product / total.clamp(min=1e-7)
    kernel = kernel + 0.1 * level.fixup[3](F.gelu(level.fixup[0](torch.cat([kernel, guidance], 1))))
    large = F.interpolate(source, size, mode="bicubic", align_corners=False)
    return (neighbours(large) * kernel[:, None]).sum(2), total


@pytest.mark.parametrize("weights", [2**22, 1, 49 * 11 * 2 * 4])
@pytest.mark.parametrize(("sigma", "theta"), [(1.0, 0.2), (-0.1, 2.5)])
def test_a_level_of_featups_own_flavour(sigma, theta, weights):
    level = FixedUpLevel(2, max_weights=weights).double().eval()
    with torch.no_grad():
        level.sigma.fill_(sigma)
        level.log_temperature.fill_(theta)
        level.keys[3].weight.mul_(3)
    source = torch.randn(2, 5, 4, 5, dtype=torch.float64, requires_grad=True)
    # Smaller than the result in one direction: the average then repeats pixels.
    image = torch.randn(2, 3, 7, 30, dtype=torch.float64)
    expected, total = fixed_up_level(level, source, image, (9, 11))
    out = level(source, image, (9, 11))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    assert (sigma > 0) == (total > 1e-7).all()  # the floor of the published product is active, or not
    direction = torch.randn_like(expected)
    inputs = [source, *level.parameters()]
    mine, published = (torch.autograd.grad((x * direction).sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(mine, published, atol=1e-5, rtol=1e-4)


def test_featups_own_flavour():
    upsampler = FeatUp(4, 16, flavour="featup")
    # 24,932 for the stack, and C^2 + C.
    assert sum(p.numel() for p in upsampler.parameters()) == 4 * 6233 + 4**2 + 4
    assert sum(p.numel() for p in FeatUp(4, 16, flavour="featup", final_fixup=False).parameters()) == 4 * 6233
    assert (upsampler.keeps_space, FeatUp(4, 16).keeps_space) == ("nearly", "yes")
    assert (works_in_chunks(upsampler), works_in_chunks(FeatUp(4, 16))) == (False, True)
    source, image = torch.randn(1, 4, 2, 3), torch.randn(1, 3, 40, 50)
    upsampler.train()
    assert not torch.equal(upsampler.upsample(source, image), upsampler.upsample(source, image))  # dropout
    upsampler.eval()
    out = upsampler.upsample(source, image)
    assert torch.equal(out, upsampler.upsample(source, image))
    assert out.shape == (1, 4, 32, 48)
    before = source
    for level in upsampler.levels:
        before = level(before, image)
    weight, bias = upsampler.final_fixup.layers[1].weight, upsampler.final_fixup.layers[1].bias
    torch.testing.assert_close(out, before + 0.1 * F.conv2d(before, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_featups_own_flavour_in_half_precision(dtype):
    upsampler = FeatUp(8, 3, flavour="featup").eval()
    source, image = torch.randn(1, 8, 1, 5).to(dtype), torch.randn(1, 3, 30, 40).to(dtype)
    with torch.no_grad():
        exact = upsampler.upsample(source.float(), image.float())
        out = upsampler.to(dtype).upsample(source, image)
    assert out.dtype == dtype
    assert F.cosine_similarity(out.float(), exact).min() > 0.99


def test_unknown_flavour():
    with pytest.raises(ConfigError, match="unknown flavour 'own'; use 'featsharp' or 'featup'"):
        FeatUp(4, 2, flavour="own")
