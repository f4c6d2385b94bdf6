"""The FeatSharp block against a reference in plain loops, and its sizes against the formulas of the paper."""

import math

import pytest
import torch

from featsharp.errors import ConfigError
from featsharp.layers.local_block import (
    LocalBlock,
    LocalSelfAttention,
    distance_bias,
    rotate,
    swiglu_width,
)
from featsharp.ops.boxes import Box


def linear(layer, x):
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(layer.weight.tolist(), bias, strict=True)
    ]


def layer_norm(layer, x):
    if isinstance(layer, torch.nn.Identity):
        return x
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    scaled = [(v - mean) / math.sqrt(variance + 1e-5) for v in x]
    return [s * w + b for s, w, b in zip(scaled, layer.weight.tolist(), layer.bias.tolist(), strict=True)]


def slope(head):
    return 2.0 ** -(head // 2 + 1)


def reference_attention(attention, x, radius):
    """x: rows of columns of channel lists."""
    height, width, heads = len(x), len(x[0]), 16
    padded, head_dim = attention.padded_dim, len(x[0][0]) // heads
    qkv = [[linear(attention.qkv, cell) for cell in row] for row in x]

    def part(i, j, which, head, length):
        start = (which * heads + head) * padded
        return qkv[i][j][start : start + length]

    out = []
    for i in range(height):
        out.append([])
        for j in range(width):
            cell = []
            for head in range(heads):
                query = part(i, j, 0, head, padded)
                weights, values = [], []
                for y in range(max(0, i - radius), min(height, i + radius + 1)):
                    for x_ in range(max(0, j - radius), min(width, j + radius + 1)):
                        dot = sum(a * b for a, b in zip(query, part(y, x_, 1, head, padded), strict=True))
                        distance = abs(x_ - j) if head % 2 else abs(y - i)
                        weights.append(math.exp(dot / math.sqrt(head_dim) - slope(head) * distance))
                        values.append(part(y, x_, 2, head, head_dim))
                total = sum(weights)
                cell += [sum(w * v[d] for w, v in zip(weights, values, strict=True)) / total for d in range(head_dim)]
            out[-1].append(linear(attention.proj, cell))
    return out


def reference_block(block, x, radius):
    normed = [[layer_norm(block.norm1, cell) for cell in row] for row in x]
    attended = reference_attention(block.attention, normed, radius)
    gamma1, gamma2 = block.scale1.tolist(), block.scale2.tolist()
    out = []
    for row, attended_row in zip(x, attended, strict=True):
        out.append([])
        for cell, update in zip(row, attended_row, strict=True):
            x1 = [c + g * u for c, g, u in zip(cell, gamma1, update, strict=True)]
            both = linear(block.mlp.gate_up, layer_norm(block.norm2, x1))
            half = len(both) // 2
            hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(both[:half], both[half:], strict=True)]
            down = linear(block.mlp.down, hidden)
            out[-1].append([c + g * d for c, g, d in zip(x1, gamma2, down, strict=False)])
    return out


@pytest.mark.parametrize(("published", "norm"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("size", [(2, 3), (4, 1)])
def test_equals_plain_loops(size, published, norm):
    block = LocalBlock(48, 16, window=3, layer_norm=norm, published_widths=published).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    x = torch.randn(1, *size, 48, dtype=torch.float64)
    expected = torch.tensor(reference_block(block, x[0].tolist(), radius=1), dtype=torch.float64)
    out = block(x)
    assert out.shape == (1, *size, 16)
    torch.testing.assert_close(out[0], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("published", [False, True])
def test_silent_projections_return_the_first_channels_bit_for_bit(published):
    block = LocalBlock(64, 32, published_widths=published, layer_scale=1.0)
    for layer in (block.attention.proj, block.mlp.down):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x = torch.randn(2, 5, 9, 64)
    assert torch.equal(block(x), x[..., :32])


def test_a_window_of_one_is_the_value_projection():
    attention = LocalSelfAttention(32, window=1)
    x = torch.randn(2, 3, 5, 32)
    values = attention.qkv(x)[..., 64:]
    torch.testing.assert_close(attention(x), attention.proj(values))


@pytest.mark.parametrize("window", [1, 3, 7])
def test_distance_bias(window):
    bias = distance_bias(window)
    assert bias.shape == (16, window, window)
    for head in range(16):
        for dy in range(window):
            for dx in range(window):
                distance = abs((dx if head % 2 else dy) - window // 2)
                assert bias[head, dy, dx] == -slope(head) * distance
    assert [slope(0), slope(1), slope(2), slope(15)] == [1 / 2, 1 / 2, 1 / 4, 1 / 256]


def formula(channels: int, maps: int, published: bool) -> int:
    """Parameters of the block: norms, qkv, projection, layer scales, SwiGLU."""
    wide = channels * maps
    head = wide // 16
    padded = 2 ** math.ceil(math.log2(head)) if published else head
    hidden = 8 * math.ceil(int((4 * wide if published else 4 * channels) * 2 / 3) / 8)
    attention = 48 * wide * padded + wide**2 + wide
    swiglu = 2 * wide * hidden + 2 * hidden + hidden * channels + channels
    return 4 * wide + attention + wide + channels + swiglu


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("channels", [384, 768, 1024, 1152, 1280, 1536])
def test_parameter_counts(channels, published):
    with torch.device("meta"):
        block = LocalBlock(2 * channels, channels, published_widths=published)
    assert sum(p.numel() for p in block.parameters()) == formula(channels, 2, published)


@pytest.mark.parametrize(
    ("channels", "hidden", "attention", "swiglu"),
    [(384, 2048, 2_949_888, 3_936_640), (1024, 5464, 16_779_264, 27_987_632), (1280, 6832, 38_013_440, 43_739_744)],
)
def test_published_parts(channels, hidden, attention, swiglu):
    with torch.device("meta"):
        block = LocalBlock(2 * channels, channels, published_widths=True)
    assert block.mlp.down.in_features == hidden
    assert sum(p.numel() for p in block.attention.parameters()) == attention
    assert sum(p.numel() for p in block.mlp.parameters()) == swiglu


def test_swiglu_width():
    assert [swiglu_width(4 * c) for c in (384, 768, 1024, 1280)] == [1024, 2048, 2736, 3416]


def test_layer_scale_starts_where_told():
    block = LocalBlock(32, 16, layer_scale=0.3)
    assert (block.scale1 == 0.3).all()
    assert (block.scale2 == 0.3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    block = LocalBlock(64, 32)
    x = torch.randn(1, 6, 9, 64)
    exact = block(x)
    out = block.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.02)


def test_gradient_reaches_every_parameter():
    block = LocalBlock(32, 16, published_widths=True)
    block(torch.randn(1, 4, 5, 32)).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


def test_the_bias_is_no_part_of_the_state():
    assert "attention.bias" not in LocalBlock(32, 16).state_dict()


@pytest.mark.parametrize("dim", [40, 8])
def test_widths_that_do_not_fit_the_heads(dim):
    with pytest.raises(ConfigError, match="multiple of 16 channels"):
        LocalSelfAttention(dim)


def test_even_windows_are_refused_at_once():
    with pytest.raises(ConfigError, match="must be odd; got 4, use 3 or 5"):
        LocalSelfAttention(32, window=4)


@pytest.mark.slow
def test_chunks_equal_the_whole():
    """Without gradients a large map is processed in chunks of rows; any chunk can be asked for."""
    block = LocalBlock(32, 16, layer_scale=0.5).eval()
    x = torch.randn(2, 21, 13, 32)
    expected = block(x)
    for rows in (1, 4, 20, 30):
        with torch.no_grad():
            torch.testing.assert_close(block.compute_rows(x, rows), expected.detach(), atol=1e-5, rtol=1e-5)
    box = Box(5, 9, 2, 13)
    seen = box.grow(block.halo, (21, 13))
    chunk = block.compute_chunk(seen.cut_channels_last(x), box.relative_to(seen))
    torch.testing.assert_close(chunk, box.cut_channels_last(expected), atol=1e-5, rtol=1e-5)
    large = torch.randn(1, 160, 130, 32)  # more cells than are processed at a time
    with torch.no_grad():
        out = block(large)
    torch.testing.assert_close(out, block(large).detach(), atol=1e-5, rtol=1e-5)


def rotated(vector, row, col, decay):
    """One query or key of E channels, from the formulas of RoPE and xPos."""
    half, out = len(vector) // 2, []
    for place, part in ((row, vector[:half]), (col, vector[half:])):
        for pair in range(half // 2):
            angle = place * 50000.0 ** (-2 * pair / half)
            gain = ((2 * pair / half + 0.4) / 1.4) ** (decay * place / 512)
            a, b = part[2 * pair], part[2 * pair + 1]
            out.append(gain * (a * math.cos(angle) - b * math.sin(angle)))
            out.append(gain * (a * math.sin(angle) + b * math.cos(angle)))
    return out


@pytest.mark.parametrize("decay", [0, 1, -1])
def test_rotation_against_the_formula(decay):
    x = torch.randn(1, 3, 5, 16, 2)
    out = rotate(x, decay)
    assert out.shape == x.shape
    for row in range(3):
        for col in range(5):
            expected = rotated(x[0, row, col].flatten().tolist(), row - 1, col - 2, decay)
            torch.testing.assert_close(out[0, row, col].flatten(), torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decay", [0, 1])
def test_rotated_products_depend_on_the_distance_only(decay):
    query, key = torch.randn(2, 32)
    maps = [rotate(x.expand(1, 9, 11, 32).unflatten(3, (16, 2)), sign * decay) for x, sign in ((query, 1), (key, -1))]
    products = [(maps[0][0, y, x] * maps[1][0, y + 2, x - 1]).sum() for y, x in ((0, 1), (3, 5), (6, 10))]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), atol=1e-4, rtol=1e-4)
    assert (products[0] - (query * key).sum()).abs() > 1e-3


@pytest.mark.parametrize("position", ["rope", "xpos", "none"])
def test_attention_with_other_positions(position):
    """As plain attention with the turned queries and keys, and no bias."""
    attention = LocalSelfAttention(32, window=3, position=position)
    x = torch.randn(1, 2, 4, 32)
    query, key, value = attention.qkv(x).unflatten(-1, (3, 16, 2)).unbind(3)
    if position != "none":
        query, key = rotate(query, int(position == "xpos")), rotate(key, -int(position == "xpos"))
    out = torch.zeros(2, 4, 16, 2)
    for row in range(2):
        for col in range(4):
            cells = [(y, z) for y in range(2) for z in range(4) if abs(y - row) <= 1 and abs(z - col) <= 1]
            scores = torch.stack([(query[0, row, col] * key[0, y, z]).sum(-1) / 2**0.5 for y, z in cells])
            values = torch.stack([value[0, y, z] for y, z in cells])
            out[row, col] = (scores.softmax(0)[..., None] * values).sum(0)
    torch.testing.assert_close(attention(x)[0], attention.proj(out.flatten(2)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="unknown position 'sine'; use 'alibi' or 'rope'"):
        LocalSelfAttention(32, position="sine")


def test_attention_alone_and_swiglu_alone():
    x = torch.randn(1, 4, 5, 32)
    attention = LocalBlock(32, 16, mlp=False)
    expected = x[..., :16] + attention.scale1 * attention.attention(attention.norm1(x))
    torch.testing.assert_close(attention(x), expected)
    assert attention.halo == 3
    mlp = LocalBlock(32, 16, attention=False, layer_scale=None)
    torch.testing.assert_close(mlp(x), x[..., :16] + mlp.mlp(mlp.norm2(x)))
    assert mlp.halo == 0
    with pytest.raises(ConfigError, match="needs attention or SwiGLU"):
        LocalBlock(32, 16, attention=False, mlp=False)


def test_the_swiglu_of_published_widths_is_doubled_beside_attention_only():
    """The published code overrides its own width where both are there."""
    widths = [LocalBlock(64, 32, published_widths=True, attention=a).mlp.down.in_features for a in (True, False)]
    assert widths == [swiglu_width(256), swiglu_width(128)]
