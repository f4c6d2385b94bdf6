"""CARAFE against a loop over cells, its borders and its starts."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from featsharp.errors import ConfigError, InputError
from featsharp.upsamplers.carafe import CARAFE

IMAGE = torch.zeros(1, 3, 8, 8)


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))


def loop_level(level, x, border):
    """The formula, one cell and one of its neighbours at a time."""
    _, channels, height, width = x.shape
    gain, k = level.factor, level.kernel_size
    compressed = torch.einsum("oc,bchw->bohw", level.compressor.weight[:, :, 0, 0], x)
    compressed = compressed + level.compressor.bias[:, None, None]
    reach = level.encoder.weight.shape[-1] // 2
    out = torch.zeros(len(x), channels, gain * height, gain * width, dtype=x.dtype)
    for b, row, col in itertools.product(range(len(x)), range(gain * height), range(gain * width)):
        y, x_ = row // gain, col // gain
        logits = torch.zeros(k, k, dtype=x.dtype)
        for i, j in itertools.product(range(k), range(k)):
            channel = (i * k + j) * gain**2 + (row % gain) * gain + col % gain
            total = level.encoder.bias[channel]
            for dy, dx in itertools.product(range(-reach, reach + 1), repeat=2):
                if 0 <= y + dy < height and 0 <= x_ + dx < width:
                    weight = level.encoder.weight[channel, :, dy + reach, dx + reach]
                    total = total + weight @ compressed[b, :, y + dy, x_ + dx]
            logits[i, j] = total
        weights = logits.exp() / logits.exp().sum()
        for i, j in itertools.product(range(k), range(k)):
            cy, cx = y + i - k // 2, x_ + j - k // 2
            if border == "zeros" and not (0 <= cy < height and 0 <= cx < width):
                continue
            cy, cx = min(max(cy, 0), height - 1), min(max(cx, 0), width - 1)
            out[b, :, row, col] += weights[i, j] * x[b, :, cy, cx]
    return out


@pytest.mark.parametrize("border", ["replicate", "zeros"])
@pytest.mark.parametrize(
    ("factor", "options"),
    [(2, {}), (3, {"kernel_size": 3}), (2, {"kernel_size": 3, "encoder_kernel": 1, "compressed": 5})],
)
def test_against_the_loop(factor, options, border):
    upsampler = CARAFE(3, factor, border=border, **{"compressed": 4, **options}).double()
    randomise(upsampler)
    features = torch.randn(1, 3, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = loop_level(upsampler.levels[0], features, border)
        torch.testing.assert_close(upsampler.upsample(features, IMAGE.double()), expected)


def test_each_level_reads_the_one_before():
    upsampler = CARAFE(3, 6, compressed=4, kernel_size=3).double()
    randomise(upsampler)
    features = torch.randn(1, 3, 2, 3, dtype=torch.float64)
    assert [level.factor for level in upsampler.levels] == [2, 3]
    with torch.no_grad():
        half = loop_level(upsampler.levels[0], features, "replicate")
        expected = loop_level(upsampler.levels[1], half, "replicate")
        out = upsampler.upsample(features, IMAGE.double())
    assert out.shape == (1, 3, 12, 18)
    torch.testing.assert_close(out, expected)


def test_gradients_by_finite_differences():
    upsampler = CARAFE(2, 2, compressed=2, kernel_size=3).double()
    randomise(upsampler)
    names, values = zip(*upsampler.named_parameters(), strict=True)
    features = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return torch.func.functional_call(upsampler.levels[0], dict(zip(names, parameters, strict=True)), (x,))

    names = [name.removeprefix("levels.0.") for name in names]
    assert torch.autograd.gradcheck(call, (features, *values), fast_mode=True)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_constant_map_stays_constant_up_to_the_border(factor):
    upsampler = CARAFE(2, factor)
    randomise(upsampler)
    source = torch.tensor([1.5, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 5)
    with torch.no_grad():
        out = upsampler.upsample(source, IMAGE)
    torch.testing.assert_close(out, source[..., :1, :1].expand_as(out))


def test_published_borders_fade():
    upsampler = CARAFE(1, 2, border="zeros", start="published")
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.zero_()  # the mean of 25 cells
        out = upsampler.upsample(torch.ones(1, 1, 6, 7), IMAGE)[0, 0]
    assert out[0, 0].item() == pytest.approx(9 / 25)  # 3 x 3 of them exist in the corner
    assert out[0, 6].item() == pytest.approx(15 / 25)
    assert out[5, 7].item() == pytest.approx(1)


@pytest.mark.parametrize(("factor", "kernel_size"), [(2, 3), (2, 5), (3, 5), (5, 3)])
def test_the_default_start_is_close_to_the_bilinear_map_and_the_published_one_is_a_blur(factor, kernel_size):
    features = torch.randn(1, 8, 5, 6)
    bilinear = F.interpolate(features, scale_factor=factor, mode="bilinear", align_corners=False)
    errors = {
        start: (
            (CARAFE(8, factor, kernel_size=kernel_size, start=start).upsample(features, IMAGE) - bilinear)
            .square()
            .mean()
            / bilinear.var()
        )
        for start in ("bilinear", "published")
    }
    assert errors["bilinear"] < 0.005
    assert errors["published"] > 0.3


def test_number_of_parameters():
    # Compressor 16 -> 64, encoder 64 -> 2 x 2 x 5 x 5 over 3 x 3 cells.
    assert sum(p.numel() for p in CARAFE(16, 2).parameters()) == (16 * 64 + 64) + (64 * 9 * 100 + 100)
    # FeatUp's: four levels, windows of 3 x 3.
    published = CARAFE(384, 16, kernel_size=3, border="zeros", start="published")
    assert sum(p.numel() for p in published.parameters()) == 4 * ((384 * 64 + 64) + (64 * 9 * 36 + 36))


def test_the_image_is_not_used():
    upsampler, features = CARAFE(4, 2), torch.randn(1, 4, 3, 5)
    assert torch.equal(upsampler.upsample(features, IMAGE), upsampler.upsample(features, torch.randn(1, 3, 5, 9)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd and at least 3; got 4, use 3 or 5"),
        ({"kernel_size": 1}, "kernel_size must be odd and at least 3; got 1, use 3"),
        ({"encoder_kernel": 2}, "encoder_kernel must be odd and at least 1; got 2, use 1 or 3"),
        ({"compressed": 0}, "compressed must be a whole number of at least 1; got 0"),
        ({"border": "mirror"}, "unknown border 'mirror'; use 'replicate' or 'zeros'"),
        ({"start": "sharp"}, "unknown start 'sharp'; use 'bilinear' or 'published'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        CARAFE(4, 2, **options)


def test_factors_are_whole_and_sizes_follow_from_them():
    with pytest.raises(ConfigError, match=r"got 2\.5, use 2 or 3"):
        CARAFE(4, 2.5)
    with pytest.raises(InputError, match="6x10 of a 3x5 grid"):
        CARAFE(4, 2).upsample(torch.randn(1, 4, 3, 5), IMAGE, (7, 10))
