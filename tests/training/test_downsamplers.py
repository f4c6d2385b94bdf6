"""Downsamplers against plain loops, and what they must keep: constants, convexity, borders, any shape."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import ConfigError
from featsharp.training.downsamplers import (
    DOWNSAMPLERS,
    AttentionDownsampler,
    SimpleDownsampler,
    create_downsampler,
    pad_cells,
)
from featsharp.training.objectives.multi_view import MultiViewConfig

SIZES = [(2, 5, (8, 12)), (3, 7, (9, 6)), (2, 4, (6, 10)), (1, 3, (5, 7)), (4, 3, (8, 12))]  # factor, kernel, (H, W)


def mirrored(index: int, length: int) -> int:
    """Border handling by definition: -1 -> 1, length -> length - 2."""
    if index < 0:
        return -index
    return 2 * (length - 1) - index if index >= length else index


def window_at(x: Tensor, row: int, col: int, kernel: int, factor: int) -> Tensor:
    """[B, C, K, K]: the window around cell (row, col), gathered pixel by pixel."""
    before = max(kernel - factor, 0) // 2
    rows = [mirrored(row * factor - before + i, x.shape[-2]) for i in range(kernel)]
    cols = [mirrored(col * factor - before + j, x.shape[-1]) for j in range(kernel)]
    return torch.stack([torch.stack([x[..., r, c] for c in cols], -1) for r in rows], -2)


@pytest.mark.parametrize("name", DOWNSAMPLERS.names())
@pytest.mark.parametrize(("factor", "kernel", "size"), SIZES)
def test_constants_stay_constant_up_to_the_borders(name, factor, kernel, size):
    module = create_downsampler(name, 3, factor, kernel).eval()
    constant = torch.tensor([2.0, -3.0, 0.5])[None, :, None, None].expand(2, 3, *size).contiguous()
    out = module(constant)
    assert out.shape == (2, 3, size[0] // factor, size[1] // factor)
    assert (out - constant[..., :1, :1]).abs().max() < 1e-5


def test_area_is_the_mean_of_each_cell():
    x = torch.randn(2, 3, 6, 9)
    out = create_downsampler("area", 3, 3)(x)
    assert torch.allclose(out[1, 2, 1, 2], x[1, 2, 3:6, 6:9].mean())


@pytest.mark.parametrize(("factor", "kernel", "size"), SIZES)
def test_simple_equals_loops(factor, kernel, size):
    module = SimpleDownsampler(3, factor, kernel)
    module.logits.data.normal_()
    weights = module.kernel()
    assert weights.min() >= 0
    assert torch.allclose(weights.sum(), torch.ones(()))
    x = torch.randn(2, 3, *size)
    out = module(x)
    for row in range(out.shape[-2]):
        for col in range(out.shape[-1]):
            expected = (window_at(x, row, col, kernel, factor) * weights).sum((-1, -2))
            assert torch.allclose(out[..., row, col], expected, atol=1e-5)


@pytest.mark.parametrize(("factor", "kernel", "size"), [(2, 5, (8, 6)), (3, 4, (6, 9))])
def test_attention_equals_loops(factor, kernel, size):
    module = AttentionDownsampler(3, factor, kernel).eval()
    module.saliency.weight.data.normal_(std=0.3)
    x = torch.randn(2, 3, *size)
    taps = torch.tensor([torch.exp(torch.tensor(-(t**2) / 0.5**0.5)) for t in range(-2, 3)])
    blur = taps[:, None] * taps / taps.sum() ** 2
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    blurred = sum(blur[i, j] * padded[..., i : i + size[0], j : j + size[1]] for i in range(5) for j in range(5))
    out = module(x)
    for row in range(out.shape[-2]):
        for col in range(out.shape[-1]):
            seen = window_at(x, row, col, kernel, factor)
            logits = torch.einsum("bcij,kcij->bk", seen, module.saliency.weight) + module.saliency.bias
            weights = (logits + module.logit_bias.flatten()).softmax(1).unflatten(1, (kernel, kernel))
            mixed = window_at(blurred, row, col, kernel, factor) * weights[:, None]
            assert torch.allclose(out[..., row, col], mixed.sum((-1, -2)), atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_attention_without_saliency_is_a_simple_blur(size):
    """X4: flat saliency leaves one kernel for all places, the softmax of the static logits."""
    attention = AttentionDownsampler(3, 2, 5).eval()
    torch.nn.init.zeros_(attention.saliency.weight)
    simple = SimpleDownsampler(3, 2, 5)
    weights = (attention.saliency.bias + attention.logit_bias.flatten()).softmax(0).reshape(5, 5)
    simple.logits.data = torch.log(torch.expm1(weights.detach()))  # the inverse of softplus
    x = torch.randn(2, 3, *size)
    flat = F.pad(x.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="replicate")
    blurred = F.conv2d(flat, attention.blur[None, None]).reshape_as(x)
    assert torch.allclose(attention(x), simple(blurred), atol=1e-5)


def test_simple_learns_a_planted_blur():
    """X3: from pairs of a map and its blurred, subsampled version to the kernel that made them."""
    planted = torch.zeros(5, 5)
    planted[1:4, 2], planted[2, 1:4] = 0.15, 0.15
    planted[2, 2] = 0.4
    module = SimpleDownsampler(2, 2, 5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.2)
    for _ in range(250):
        x = torch.randn(4, 2, 16, 16)
        flat = pad_cells(x, 5, 2).flatten(0, 1)[:, None]
        target = F.conv2d(flat, planted[None, None], stride=2).unflatten(0, (4, 2)).squeeze(2)
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kernel = module.kernel().detach()
    assert (kernel - planted).abs().max() < 0.01
    assert kernel.min() >= 0


def test_dropout_is_for_training_only():
    module = AttentionDownsampler(3, 2, 5, dropout=0.5)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(module.eval()(x), module(x))
    module.train()
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    # What is left of the taps still sums to one, even where all were dropped.
    module.dropout = 0.999
    assert torch.allclose(module(torch.full((1, 3, 8, 8), 2.0)), torch.full((1, 3, 4, 4), 2.0), atol=1e-5)


@pytest.mark.parametrize("name", ["simple", "attention"])
def test_gradients_reach_map_and_parameters(name):
    module = create_downsampler(name, 3, 2, 5)
    x = torch.randn(1, 3, 6, 8, requires_grad=True)
    module(x).square().sum().backward()
    for tensor in (x, *module.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


def test_map_smaller_than_the_mirror_is_taken():
    module = create_downsampler("simple", 2, 2, 9)
    assert torch.allclose(module(torch.ones(1, 2, 2, 4)), torch.ones(1, 2, 1, 2), atol=1e-6)


def test_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="'simple'"):
        create_downsampler("simpel", 3, 2)


@pytest.mark.parametrize("factor", [2, 3, 4, 6, 7, 8])
def test_default_kernel_keeps_a_ramp_in_place(factor):
    """A kernel smaller than the cell would look at its corner, and shift what is learned."""
    downsampler = create_downsampler("simple", 1, factor, MultiViewConfig().kernel_size)
    ramp = torch.arange(8.0 * factor).expand(1, 1, 8 * factor, 8 * factor)
    found = downsampler(ramp)[0, 0, 4, 2:-2]
    # Taps beyond the cell start at 2 % of those in it; they may pull by their centre's offset of at most half a pixel.
    torch.testing.assert_close(found, F.avg_pool2d(ramp, factor)[0, 0, 4, 2:-2], atol=0.1, rtol=0)
