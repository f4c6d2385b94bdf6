"""NAF against plain loops over cells, tokens and heads, and what its structure promises."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from featsharp.backbones import from_callable
from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box, whole
from featsharp.upsamplers import create_upsampler
from featsharp.upsamplers.naf import NAF, attend_nearby


def looped(query, key, value):
    """The 9 x 9 tokens around the token of each cell, moved back onto the map, one cell and head at a time."""
    (batch, height, width, heads, dim), grid = query.shape, key.shape[1:3]
    out = torch.zeros(batch, height, width, heads, value.shape[4], dtype=value.dtype)
    for y, x in itertools.product(range(height), range(width)):
        slices = []
        for at, count, tokens in ((y, height, grid[0]), (x, width, grid[1])):
            token = (2 * at + 1) * tokens // (2 * count)
            start = max(0, min(token - 4, tokens - 9))
            slices.append(slice(start, min(start + 9, tokens)))
        keys, values = (part[:, slices[0], slices[1]].flatten(1, 2) for part in (key, value))
        scores = torch.einsum("bnd,bknd->bnk", query[:, y, x], keys) / dim**0.5
        out[:, y, x] = torch.einsum("bnk,bkne->bne", scores.softmax(-1), values)
    return out


def inputs(grid, size, dtype=torch.float64):
    return (
        torch.randn(2, *size, 4, 64, dtype=dtype),
        torch.randn(2, *grid, 4, 64, dtype=dtype),
        torch.randn(2, *grid, 4, 3, dtype=dtype),
    )


@pytest.mark.parametrize(
    ("grid", "size"),
    [
        ((11, 12), (22, 24)),
        ((10, 13), (15, 20)),
        ((4, 3), (9, 12)),
        ((12, 9), (13, 27)),
        ((1, 2), (3, 2)),
        ((9, 9), (9, 9)),
    ],
)
def test_attention_equals_the_loop(grid, size):
    query, key, value = inputs(grid, size)
    expected = looped(query, key, value)
    out = attend_nearby(query, key, value, whole(size))
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    for box in (
        Box(0, 1, 0, 1),
        Box(size[0] // 2, size[0], size[1] // 3, size[1]),
        Box(0, size[0], size[1] - 1, size[1]),
    ):
        part = attend_nearby(query, key, value, box)
        torch.testing.assert_close(part, box.cut_channels_last(expected), atol=1e-10, rtol=0)


def test_gradients_of_sorted_queries():
    """Places that repeat a query must not count twice."""
    query, key, value = (x[:1].requires_grad_() for x in inputs((4, 3), (6, 7)))
    for function in (attend_nearby, lambda q, k, v, box: looped(q, k, v)):
        out = function(query, key, value, whole((6, 7)))
        gradients = torch.autograd.grad(out.square().sum(), (query, key, value))
        if function is attend_nearby:
            first = gradients
    torch.testing.assert_close(first, gradients, atol=1e-9, rtol=1e-9)


def test_parameters_are_those_of_the_paper_for_any_width():
    for channels in (5, 384):
        with torch.device("meta"):
            assert sum(p.numel() for p in NAF(channels, 2).parameters()) == 662_528


def test_the_weights_serve_any_number_of_channels():
    """Heads share the channels in order; the last one has fewer where four does not divide them."""
    wide, narrow = NAF(8, 2).eval(), NAF(6, 2).eval()
    narrow.load_state_dict(wide.state_dict())
    features, image = torch.randn(1, 8, 5, 6), torch.randn(1, 3, 20, 24)
    with torch.no_grad():
        expected, out = wide.upsample(features, image), narrow.upsample(features[:, :6], image)
    torch.testing.assert_close(out, expected[:, :6])


def test_a_cell_sees_nothing_beyond_nine_tokens():
    upsampler = NAF(4, 2).eval()
    features, image = torch.randn(1, 4, 20, 20), torch.randn(1, 3, 40, 40)
    changed = features.clone()
    changed[..., 10:, :] += 100
    with torch.no_grad():
        first, second = (upsampler.upsample(x, image) for x in (features, changed))
    # Row 11 lies in token 5, which sees tokens 1 to 9.
    assert torch.equal(first[..., :12, :], second[..., :12, :])
    assert not torch.equal(first[..., 12, :], second[..., 12, :])


def test_output_stays_in_the_hull_of_the_features():
    features = torch.randn(2, 8, 5, 3)
    out = NAF(8, 3).upsample(features, torch.randn(2, 3, 70, 50), (23, 50))
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    assert out.shape == (2, 8, 23, 50)
    assert (out >= low - 1e-5).all()
    assert (out <= high + 1e-5).all()


def test_a_large_image_is_shrunk_to_four_pixels_per_cell_and_not_to_a_square():
    upsampler = NAF(4, 2).eval()
    features, image = torch.randn(1, 4, 3, 7), torch.randn(1, 3, 90, 40)
    shrunk = F.interpolate(image, (24, 40), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(upsampler.upsample(features, image), upsampler.upsample(features, shrunk))
        published = NAF(4, 2, published=True).eval()
        published.load_state_dict(upsampler.state_dict())
        squared = F.interpolate(image, (24, 24), mode="bilinear")
        out = published.upsample(features, image)
        torch.testing.assert_close(out, published.upsample(features, squared))
    assert (out - upsampler.upsample(features, image)).abs().max() > 1e-3


def test_the_whitening_of_the_backbone_is_exchanged():
    torch.manual_seed(0)
    ours, theirs = NAF(4, 2).eval(), NAF(4, 2, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7)).eval()
    theirs.load_state_dict(ours.state_dict())
    features, pixels = torch.randn(1, 4, 3, 3), torch.rand(1, 3, 12, 12)

    def whiten(mean, std):
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    with torch.no_grad():
        expected = ours.upsample(features, whiten((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        out = theirs.upsample(features, whiten((0.5, 0.4, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="three numbers each, those of std above 0"):
        NAF(4, 2, std=(1, 0, 1))


def test_an_encoder_knows_the_whitening_of_its_backbone():
    pool = torch.nn.AvgPool2d(8)
    backbone = from_callable(pool, patch_size=8, input_size=(64, 64), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert (create_upsampler("naf", backbone).mean, create_upsampler("naf", backbone).std) == ((0.5,) * 3, (0.25,) * 3)


def test_whole_ratios_are_as_published():
    """Also where they differ between the axes, and where a map has fewer than nine tokens."""
    features, image = torch.randn(1, 4, 5, 10), torch.randn(1, 3, 20, 20)
    ours, published = NAF(4, 2).eval(), NAF(4, 2, published=True).eval()
    published.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for size in ((10, 20), (15, 20), (5, 10)):
            torch.testing.assert_close(published.upsample(features, image, size), ours.upsample(features, image, size))
