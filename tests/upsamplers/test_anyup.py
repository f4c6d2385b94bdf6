"""AnyUp against plain loops over places, cells and channels, and what its structure promises."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box
from featsharp.upsamplers.anyup import AnyUp, FeatureCode, Windows, attend_nearby


def window(place: int, places: int, cells: int) -> range:
    """The cells that a place sees, from its centre and a tenth of the image, in exact fractions."""
    centre, reach = Fraction(2 * place + 1, 2 * places), Fraction(1, 10)
    low, high = max(Fraction(0), centre - reach), min(Fraction(1), centre + reach)
    return range(math.floor(low * cells), math.ceil(high * cells))


def looped_attention(query, key, value):
    """One place and one head at a time: [B, H, W, d], [B, h, w, d], [B, C, h, w] to [B, C, H, W]."""
    (batch, height, width, dim), (h, w) = query.shape, key.shape[1:3]
    head_dim = dim // 4
    out = torch.zeros(batch, value.shape[1], height, width, dtype=value.dtype)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                cells = [(i, j) for i in window(y, height, h) for j in window(x, width, w)]
                keys = torch.stack([key[b, i, j] for i, j in cells])
                values = torch.stack([value[b, :, i, j] for i, j in cells])
                mean = torch.zeros(len(cells), dtype=value.dtype)
                for head in range(4):
                    part = slice(head * head_dim, (head + 1) * head_dim)
                    scores = keys[:, part] @ query[b, y, x, part] / math.sqrt(head_dim)
                    mean += scores.softmax(0) / 4
                out[b, :, y, x] = mean @ values
    return out


@pytest.mark.parametrize(("grid", "size"), [((3, 5), (7, 11)), ((1, 4), (3, 4)), ((13, 7), (26, 30))])
def test_attention_equals_the_loop(grid, size):
    query = torch.randn(2, *size, 128, dtype=torch.float64)
    key, value = torch.randn(2, *grid, 128, dtype=torch.float64), torch.randn(2, 6, *grid, dtype=torch.float64)
    box = Box(1, size[0], 0, size[1] - 2)
    expected = box.cut(looped_attention(query, key, value))
    for scores in (2**24, 4000):
        out = attend_nearby(query, key, value.permute(0, 2, 3, 1), box, max_scores=scores).permute(0, 3, 1, 2)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("places", "cells"), [(1, 1), (5, 5), (10, 3), (35, 5), (101, 20), (448, 32), (7, 64)])
def test_windows_are_exact(places, cells):
    windows = Windows(places, cells)
    for start, stop in [(0, places), (places // 2, places // 2 + 1), (places // 3, places)]:
        first, last = windows.seen(start, stop)
        rows = [[cell in window(place, places, cells) for cell in range(first, last)] for place in range(start, stop)]
        assert windows.mask(start, stop, torch.device("cpu")).tolist() == rows
        assert all(len(window(place, places, cells)) == sum(row) for place, row in enumerate(rows, start))


@pytest.mark.parametrize("numbers", [2**23, 1])
def test_feature_code_equals_the_loop(numbers):
    layer = FeatureCode(max_numbers=numbers).double()
    x = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    out = layer(x)
    for b, y, col in [(0, 0, 0), (1, 3, 6), (0, 2, 3), (1, 1, 5)]:
        mean = torch.zeros(128, dtype=torch.float64)
        for channel in range(3):
            answer, taps = torch.zeros(128, dtype=torch.float64), 0
            for i in range(5):
                for j in range(5):
                    at = y + i - 2, col + j - 2
                    if 0 <= at[0] < 4 and 0 <= at[1] < 7:
                        answer += layer.basis[:, 0, i, j].detach() * x[b, channel, at[0], at[1]]
                        taps += 1
            mean += (answer / taps).softmax(0) / 3
        torch.testing.assert_close(out[b, :, y, col], mean, atol=1e-9, rtol=0)


def test_blocks_of_attention_have_the_same_gradient():
    box, value = Box(0, 7, 0, 9), torch.randn(1, 4, 5, 6, dtype=torch.float64)
    query, key = (torch.randn(1, *size, 128, dtype=torch.float64, requires_grad=True) for size in ((7, 9), (4, 5)))

    def gradients(max_scores):
        out = attend_nearby(query, key, value, box, max_scores=max_scores)
        return torch.autograd.grad(out.square().sum(), [query, key])

    torch.testing.assert_close(gradients(1), gradients(2**24), atol=1e-6, rtol=1e-5)


def test_chunks_of_the_feature_code_have_the_same_gradient():
    one, many = FeatureCode(max_numbers=1).double(), FeatureCode().double()
    one.load_state_dict(many.state_dict())
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    gradients = [torch.autograd.grad(layer(x).square().sum(), layer.basis) for layer in (one, many)]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)


def test_parameters_are_those_of_the_paper_for_any_width():
    # Left out, for it never reaches the output: projections of values and of the output.
    dead = 2 * (128**2 + 128)
    for channels in (6, 384, 1000):
        assert sum(p.numel() for p in AnyUp(channels, 2).parameters()) == 878_080 - dead == 845_056


def test_the_weights_serve_any_number_of_channels():
    narrow, wide = AnyUp(5, 2), AnyUp(15, 2)
    wide.load_state_dict(narrow.state_dict())
    features, image = torch.randn(1, 5, 4, 6), torch.randn(1, 3, 30, 44)
    # The code is a mean over channels, of features of unit length.
    repeated = wide.upsample(features.repeat(1, 3, 1, 1), image)
    assert repeated.shape == (1, 15, 8, 12)
    torch.testing.assert_close(repeated[:, :5], repeated[:, 5:10])


def test_a_place_sees_nothing_beyond_its_window():
    module = AnyUp(4, 2)
    features = torch.randn(1, 4, 20, 20)
    query, key = module.project(features, torch.randn(1, 3, 40, 40), (40, 40))
    changed = features.clone()
    changed[..., 10:, :] += 100
    box = Box(0, 40, 0, 40)
    first, second = (
        attend_nearby(query, key, x.permute(0, 2, 3, 1), box).permute(0, 3, 1, 2) for x in (features, changed)
    )
    # Row 15 is centred at 15.5 / 40 = 0.3875, so its window ends with 0.4875 of the image, in cell 9.
    assert torch.equal(first[..., :16, :], second[..., :16, :])
    assert not torch.equal(first[..., 16, :], second[..., 16, :])


def test_output_stays_in_the_hull_of_the_features_and_any_size_is_made():
    features = torch.randn(2, 16, 5, 3)
    out = AnyUp(16, 3).upsample(features, torch.randn(2, 3, 70, 50), (23, 50))
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    assert out.shape == (2, 16, 23, 50)
    assert (out >= low - 1e-5).all()
    assert (out <= high + 1e-5).all()


def test_guidance_scale():
    torch.manual_seed(1)
    free = AnyUp(6, 2)
    limited = AnyUp(6, 2, guidance_scale=2)
    limited.load_state_dict(free.state_dict())
    features, image = torch.randn(1, 6, 4, 5), torch.randn(1, 3, 64, 80)
    small = F.interpolate(image, (16, 20), mode="bilinear", antialias=True)
    torch.testing.assert_close(limited.upsample(features, image), free.upsample(features, small))
    with pytest.raises(ConfigError, match=r"guidance_scale must be a positive number, or None .* got -1"):
        AnyUp(6, 2, guidance_scale=-1)
