"""SAPA against a loop over cells, its borders, and the sizes that the published kernels cannot take."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from featsharp.errors import ConfigError, InputError
from featsharp.upsamplers.sapa import SAPA


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))


def norm(x, layer):
    """Layer normalisation of one vector."""
    if isinstance(layer, torch.nn.Identity):
        return x
    out = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * layer.weight
    return out if layer.bias is None else out + layer.bias


def linear(x, layer):
    return layer.weight @ x if layer.bias is None else layer.weight @ x + layer.bias


def loop_level(level, x, image, border):
    """The formula, one new cell at a time."""
    height, width = x.shape[2:]
    gain = level.factor
    pixels = image.shape[2] // (gain * height)
    guidance = F.avg_pool2d(image, pixels)
    rows = []
    for b, row, col in itertools.product(range(len(x)), range(gain * height), range(gain * width)):
        query = linear(norm(guidance[b, :, row, col], level.query_norm), level.query_proj)
        logits, values = [], []
        for dy, dx in itertools.product(range(-2, 3), repeat=2):
            y, x_ = row // gain + dy, col // gain + dx
            if 0 <= y < height and 0 <= x_ < width:
                key = linear(norm(x[b, :, y, x_], level.key_norm), level.key_proj)
                logits.append(query @ key)
                values.append(x[b, :, y, x_])
            elif border == "zeros":
                logits.append(torch.zeros((), dtype=x.dtype))
                values.append(torch.zeros_like(x[b, :, 0, 0]))
        weights = torch.stack(logits).exp()
        rows.append((weights / weights.sum()) @ torch.stack(values))
    out = torch.stack(rows).reshape(len(x), gain * height, gain * width, -1)
    return out.permute(0, 3, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("border", ["clip", "zeros"])
@pytest.mark.parametrize(("factor", "norm_guidance"), [(2, True), (3, True), (2, False)])
def test_against_the_loop_with_gradients(factor, border, norm_guidance):
    upsampler = SAPA(4, factor, border=border, norm_guidance=norm_guidance).double()
    randomise(upsampler)
    features = torch.randn(1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    image = torch.randn(1, 3, 12 * factor, 20 * factor, dtype=torch.float64)
    out = upsampler.upsample(features, image)
    expected = loop_level(upsampler.levels[0], features, image, border)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    inputs = [features, *upsampler.parameters()]
    mine, looped = (torch.autograd.grad((result * weights).sum(), inputs) for result in (out, expected))
    torch.testing.assert_close(mine, looped)
    assert all(gradient.abs().max() > 1e-9 for gradient in mine)  # none of them is dead


def test_each_level_reads_the_one_before():
    upsampler = SAPA(4, 6).double()
    randomise(upsampler)
    features = torch.randn(1, 4, 1, 2, dtype=torch.float64)
    image = torch.randn(1, 3, 12, 24, dtype=torch.float64)
    assert [level.factor for level in upsampler.levels] == [2, 3]
    with torch.no_grad():
        half = loop_level(upsampler.levels[0], features, image, "clip")
        expected = loop_level(upsampler.levels[1], half, image, "clip")
        torch.testing.assert_close(upsampler.upsample(features, image), expected)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_constant_map_stays_constant_up_to_the_border(factor):
    upsampler = SAPA(2, factor)
    randomise(upsampler)
    source = torch.tensor([1.5, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 5)
    with torch.no_grad():
        out = upsampler.upsample(source, torch.randn(1, 3, 48, 80))
    torch.testing.assert_close(out, source[..., :1, :1].expand_as(out))


def test_published_borders_fade():
    upsampler = SAPA(2, 2, border="zeros")
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.zero_()  # every logit is 0: the mean of 25 cells
        out = upsampler.upsample(torch.ones(1, 2, 6, 7), torch.randn(1, 3, 24, 28))[0, 0]
    assert out[0, 0].item() == pytest.approx(9 / 25)  # 3 x 3 of them exist in the corner
    assert out[0, 6].item() == pytest.approx(15 / 25)
    assert out[5, 7].item() == pytest.approx(1)


def test_a_key_that_answers_the_query_gets_the_weight():
    """Red cells on the left, blue ones on the right, and queries and keys that tell them apart: the edge is kept."""
    upsampler = SAPA(2, 2, norm_guidance=False)
    level = upsampler.levels[0]
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.zero_()
        level.key_norm.weight.fill_(1)
        level.query_proj.weight[0, 0] = level.query_proj.weight[1, 2] = 5
        level.key_proj.weight[0, 0] = level.key_proj.weight[1, 1] = 5
        features = torch.zeros(1, 2, 4, 8)
        features[:, 0, :, :4] = features[:, 1, :, 4:] = 1
        image = torch.zeros(1, 3, 16, 32)
        image[:, 0, :, :18] = image[:, 2, :, 18:] = 1  # the edge lies one new cell further to the right
        out = upsampler.upsample(features, image)[0, 0, 3]
    torch.testing.assert_close(out, (torch.arange(16) < 9).float(), atol=1e-6, rtol=0)


def test_normalised_guidance_does_not_see_brightness():
    features, image = torch.randn(1, 8, 3, 5), torch.randn(1, 3, 12, 20)
    changed = 3 * image + torch.randn(1, 1, 12, 20)
    for norm_guidance in (True, False):
        upsampler = SAPA(8, 4, norm_guidance=norm_guidance)
        randomise(upsampler)
        with torch.no_grad():
            before, after = (upsampler.upsample(features, guide) for guide in (image, changed))
        assert torch.allclose(before, after, atol=1e-3) == norm_guidance


def test_the_size_that_the_published_kernels_cannot_take():
    """SigLIP2 at 512 pixels: the configuration error of FeatSharp's table of upsamplers."""
    upsampler = SAPA(1152, 2)
    features, image = torch.randn(1, 1152, 32, 32, requires_grad=True), torch.randn(1, 3, 512, 512)
    out = upsampler.upsample(features, image)
    out.sum().backward()
    assert out.shape == (1, 1152, 64, 64)
    assert out.isfinite().all()
    assert features.grad.isfinite().all()
    # Weights sum to one: all gradients together are as large as the map.
    assert features.grad.double().sum().item() == pytest.approx(1152 * 64 * 64, rel=1e-4)


def test_number_of_parameters():
    channels = 384
    query = 2 * 3 + 3 * 64 + 64
    published = query + 2 * channels + channels * 64 + 64
    assert sum(p.numel() for p in SAPA(channels, 16, border="zeros").parameters()) == 4 * published
    # A shift of all keys at once is not seen by the softmax, so clipped windows have none.
    assert sum(p.numel() for p in SAPA(channels, 2).parameters()) == published - channels - 64


def test_options_that_cannot_work():
    with pytest.raises(ConfigError, match="unknown border 'replicate'; use 'clip' or 'zeros'"):
        SAPA(4, 2, border="replicate")
    with pytest.raises(ConfigError, match=r"got 1\.5, use 1 or 2"):
        SAPA(4, 1.5)
    with pytest.raises(InputError, match="6x10 of a 3x5 grid"):
        SAPA(4, 2).upsample(torch.randn(1, 4, 3, 5), torch.randn(1, 3, 12, 20), (7, 10))
