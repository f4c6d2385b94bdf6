"""LoftUp: its Fourier features and attention by loops and formulas, its independence of batches and whitening."""

import math

import pytest
import torch
import torch.nn.functional as F

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box, whole
from featsharp.upsamplers.loftup import FourierFeatures, LoftUp


def test_fourier_features_are_those_of_the_formula():
    layer = FourierFeatures(3, 4)
    x = torch.rand(3, 2, 5)
    out, phases = layer(x), layer.biases.flatten(1).tolist()
    assert out.shape == (24, 2, 5)
    for channel in range(12):
        rate, value = math.exp(-2 + 12 * (channel // 3) / 3), x[channel % 3, 1, 4].item()
        # The highest rate makes of the last bit of a value a thousandth.
        assert out[channel, 1, 4].item() == pytest.approx(math.sin(rate * value + phases[0][channel]), abs=5e-3)
        assert out[12 + channel, 1, 4].item() == pytest.approx(math.cos(rate * value + phases[1][channel]), abs=5e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 224, 1001])
def test_positions_are_rounded_once(count):
    exact = torch.tensor([2 * i / (count - 1) - 1 if count > 1 else -1 for i in range(count)], dtype=torch.float64)
    out = LoftUp(4, 2).positions(Box(0, count, 0, 1), (count, 1), torch.device("cpu"))
    assert torch.equal(out[0, :, 0], exact.float())
    part = LoftUp(4, 2).positions(Box(count // 2, count, 0, 1), (count, 1), torch.device("cpu"))
    assert torch.equal(part, out[:, count // 2 :])


@torch.no_grad()
def test_layers_equal_multi_head_attention_of_torch():
    upsampler = LoftUp(12, 2).double().eval()
    query, tokens = torch.randn(2, 7, 32, dtype=torch.float64), torch.randn(2, 6, 32, dtype=torch.float64)
    x = query
    for layer in upsampler.layers:
        attention = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
        attention.in_proj_weight.copy_(layer.in_proj.weight)
        attention.in_proj_bias.copy_(layer.in_proj.bias)
        attention.out_proj.load_state_dict(layer.out_proj.state_dict())
        normed = layer.token_norm(tokens)
        x = x + attention(layer.query_norm(x), normed, normed)[0]
        norm, up, _, down = layer.mlp
        hidden = F.gelu(F.linear(F.layer_norm(x, (32,), norm.weight, norm.bias), up.weight, up.bias))
        x = x + F.linear(hidden, down.weight, down.bias)
    x = F.linear(upsampler.query_norm(x), upsampler.project.weight, upsampler.project.bias)
    expected = (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(upsampler.gather(query, tokens), expected, atol=1e-10, rtol=0)


def test_pieces_have_the_same_result_and_gradient():
    upsampler = LoftUp(8, 2).double().eval()
    query, tokens = torch.randn(2, 9, 28, dtype=torch.float64), torch.randn(2, 6, 28, dtype=torch.float64)

    def run(max_numbers):
        out = upsampler.gather(query, tokens, max_numbers=max_numbers)
        return out, *torch.autograd.grad(out.square().sum() + out.sum(), upsampler.layers[0].parameters())

    torch.testing.assert_close(run(1000), run(2**24), atol=1e-10, rtol=1e-8)


@torch.no_grad()
def test_images_of_a_batch_matter_to_each_other_only_as_published():
    ours, published = LoftUp(8, 2).eval(), LoftUp(8, 2, published=True).eval()
    published.load_state_dict(ours.state_dict())
    features, image = torch.randn(2, 8, 3, 4), torch.randn(2, 3, 6, 8)
    image[1] *= 2
    for upsampler, same in ((ours, True), (published, False)):
        alone, together = upsampler.upsample(features[:1], image[:1]), upsampler.upsample(features, image)[:1]
        assert ((alone - together).abs().max() < 1e-4) == same
    # Of one image, both are the same up to the rounding of positions.
    torch.testing.assert_close(published.upsample(features[:1], image[:1]), alone)
    torch.testing.assert_close(ours.upsample(features[:1], image[:1]), alone, atol=1e-2, rtol=0)


@torch.no_grad()
def test_whitening_does_not_matter():
    upsampler = LoftUp(8, 2).eval()
    features, image = torch.randn(1, 8, 3, 4), torch.randint(-8, 9, (1, 3, 6, 8)).float()
    scale, shift = torch.tensor([0.5, 2, 4])[:, None, None], torch.tensor([1.0, -3, 2])[:, None, None]
    # Powers of two and whole numbers, since the frequencies would show any rounding.
    out = [upsampler.upsample(features, x) for x in (image, scale * image + shift)]
    torch.testing.assert_close(*out, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_colour_that_is_everywhere_the_same():
    assert torch.equal(LoftUp(8, 2).stretch(torch.full((1, 3, 4, 5), 0.3)), torch.full((1, 3, 4, 5), -0.5))


@pytest.mark.parametrize(("channels", "count"), [(384, 4_303_894), (512, 7_165_462), (768, 15_051_286)])
def test_parameters_are_those_of_the_published_models(channels, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in LoftUp(channels, 2).parameters()) == count


def test_widths_that_heads_cannot_share():
    with pytest.raises(ConfigError, match="needs a multiple of 4 channels; got 30, use 28 or 32"):
        LoftUp(30, 2)
    with pytest.raises(ConfigError, match="got 3, use 4"):
        LoftUp(3, 2)


@torch.no_grad()
def test_cells_of_a_chunk_are_those_of_the_whole():
    upsampler = LoftUp(8, 2).eval()
    features, image = torch.randn(1, 8, 5, 4), torch.randn(1, 3, 30, 40)
    compute = upsampler.prepare_chunks(features, image, (11, 9))
    expected = compute(whole((11, 9)))
    for box in (Box(0, 1, 0, 1), Box(3, 8, 2, 9), Box(10, 11, 0, 9)):
        torch.testing.assert_close(compute(box), box.cut(expected), atol=1e-5, rtol=0)
