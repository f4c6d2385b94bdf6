"""JAFAR against a plain loop over places and heads, and what its structure promises."""

import math

import pytest
import torch
import torch.nn.functional as F

from featsharp.errors import ConfigError
from featsharp.layers.cross_attention import DIM, NUM_HEADS, AxialRope, attend_in_chunks
from featsharp.ops.boxes import Box
from featsharp.upsamplers.jafar import JAFAR


def looped_attention(query, key, value):
    """softmax per head, weights averaged over heads, applied to raw values; one place at a time."""
    out = torch.zeros(query.shape[0], query.shape[1], value.shape[2], dtype=value.dtype)
    head_dim = query.shape[-1] // NUM_HEADS
    for b in range(query.shape[0]):
        for i in range(query.shape[1]):
            weights = torch.zeros(key.shape[1], dtype=value.dtype)
            for head in range(NUM_HEADS):
                part = slice(head * head_dim, (head + 1) * head_dim)
                scores = key[b, :, part] @ query[b, i, part] / math.sqrt(head_dim)
                weights += scores.softmax(0) / NUM_HEADS
            out[b, i] = weights @ value[b]
    return out


@pytest.mark.parametrize("max_scores", [2**24, 40])
def test_attention_equals_the_loop(max_scores):
    query, key, value = torch.randn(2, 15, DIM), torch.randn(2, 6, DIM), torch.randn(2, 6, 5)
    out = attend_in_chunks(query, key, value, max_scores=max_scores)
    torch.testing.assert_close(out, looped_attention(query, key, value))


def test_chunks_have_the_same_gradient():
    query, key = (torch.randn(1, count, DIM, requires_grad=True) for count in (60, 15))
    value = torch.randn(1, 15, 16)

    def gradients(max_scores):
        return torch.autograd.grad(
            attend_in_chunks(query, key, value, max_scores=max_scores).square().sum(), [query, key]
        )

    torch.testing.assert_close(gradients(1), gradients(2**24))


def test_output_stays_in_the_hull_of_the_features():
    features = torch.randn(2, 16, 5, 3)
    out = JAFAR(16, 3).upsample(features, torch.randn(2, 3, 70, 50))
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    assert out.shape == (2, 16, 15, 9)
    assert (out >= low - 1e-5).all()
    assert (out <= high + 1e-5).all()


def test_constant_features_stay_constant():
    features = torch.randn(1, 16, 1, 1).expand(-1, -1, 4, 6)
    out = JAFAR(16, 2).upsample(features, torch.randn(1, 3, 64, 96))
    torch.testing.assert_close(out, features[..., :1, :1].expand_as(out))


@pytest.mark.parametrize(("channels", "published"), [(384, 631_552), (768, 730_240), (1024, 796_032), (1152, 828_928)])
def test_parameter_count(channels, published):
    # Left out, for it never reaches the output: projections of values (128 C + 128) and output (128^2 + 128), norm (C).
    dead = 128 * channels + 128 + 128**2 + 128 + channels
    assert sum(p.numel() for p in JAFAR(channels, 2).parameters()) == published - dead


def test_rope_by_hand():
    rope = AxialRope()
    x = torch.randn(1, DIM, 3, 4)
    out = rope(x)
    frequencies = 2 * math.pi * 100 ** torch.linspace(0, -1, DIM // 4)
    for row, col, channel in [(0, 0, 5), (1, 2, 7), (2, 3, 40), (2, 1, 64 + 3), (1, 3, 127)]:
        at = row / 2 if channel < 64 else col / 3
        angle = at * frequencies[channel % 32]
        partner = -x[0, channel + 64, row, col] if channel < 64 else x[0, channel - 64, row, col]
        expected = x[0, channel, row, col] * angle.cos() + partner * angle.sin()
        assert out[0, channel, row, col].item() == pytest.approx(expected.item(), abs=1e-5)


def test_guidance_matters():
    module, features = JAFAR(16, 2), torch.randn(1, 16, 4, 4)
    first, second = (F.interpolate(torch.randn(1, 3, 8, 8), (64, 64)) for _ in range(2))
    assert not torch.allclose(module.upsample(features, first), module.upsample(features, second), atol=1e-4)


@pytest.mark.parametrize(("factor", "size"), [(1.5, (5, 8)), (2, (9, 31)), (1, (3, 5)), (14, (4, 60))])
def test_any_size_is_made(factor, size):
    module, features, image = JAFAR(16, factor), torch.randn(2, 16, 3, 5), torch.randn(2, 3, 21, 33)
    query, key = module.project(features, image, size)
    value = features.flatten(2).transpose(1, 2)
    expected = looped_attention(query.flatten(1, 2), key, value).transpose(1, 2).unflatten(2, size)
    out = module.upsample(features, image, size)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    box = Box(1, 3, 2, 5)
    chunk = module.prepare_chunks(features, image, size)(box)
    torch.testing.assert_close(chunk, box.cut(out), atol=1e-5, rtol=1e-4)


def test_guidance_is_scaled_to_the_output_grid_or_not_at_all():
    features, image = torch.randn(1, 16, 3, 4), torch.randn(1, 3, 36, 48)
    ours, own = JAFAR(16, 2), JAFAR(16, 2, guidance_scale=None)
    own.load_state_dict(ours.state_dict())
    small = F.interpolate(image, (12, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(ours.upsample(features, image), own.upsample(features, small))
    assert not torch.allclose(ours.upsample(features, image), own.upsample(features, image), atol=1e-4)
    # A small image is not enlarged.
    torch.testing.assert_close(ours.upsample(features, image[..., :7, :9]), own.upsample(features, image[..., :7, :9]))


def test_queries_are_padded_as_asked():
    features, image = torch.randn(1, 16, 3, 4), torch.randn(1, 3, 36, 48)
    mirrored, zeros = JAFAR(16, 2, query_padding="reflect"), JAFAR(16, 2)
    zeros.load_state_dict(mirrored.state_dict())
    first, second = mirrored.upsample(features, image), zeros.upsample(features, image)
    torch.testing.assert_close(first[..., 1:-1, 1:-1], second[..., 1:-1, 1:-1])
    assert not torch.allclose(first[..., 0, :], second[..., 0, :])


def test_the_image_kernel_of_the_paper():
    assert JAFAR(16, 2, image_kernel=1).image_encoder[0].weight.shape == (128, 3, 1, 1)
    assert JAFAR(16, 2).image_encoder[0].weight.shape == (128, 3, 3, 3)
    with pytest.raises(ConfigError, match="image_kernel must be odd; got 2, use 1"):
        JAFAR(16, 2, image_kernel=2)
    with pytest.raises(ConfigError, match="unknown query_padding 'same'; use 'reflect' or 'zeros'"):
        JAFAR(16, 2, query_padding="same")
