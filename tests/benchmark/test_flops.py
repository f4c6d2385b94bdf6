"""Floating-point operations against formulas."""

import pytest
import torch
from torch import nn

from featsharp.backbones import create_backbone
from featsharp.backbones.from_callable import from_callable
from featsharp.benchmark.cost import counting
from featsharp.benchmark.flops import FlopsTask, count_operations
from featsharp.builder import create_encoder
from featsharp.layers.local_block import LocalBlock
from featsharp.ops.backends import use_backend
from featsharp.ops.local_attention import local_attention

CPU = torch.device("cpu")
WIDTH = 32  # channels of the toy backbones


def count(module, *inputs):
    with counting() as counter:
        module(*inputs)
    assert not counter.uncounted
    return counter.flops.get_total_flops()


def toy_vit_operations(tokens):
    """Patch embedding of 8 x 8 x 3 numbers; per layer qkv, projection, MLP of twice the width, and attention."""
    seen = tokens + 1  # the class token
    linear = 2 * seen * WIDTH * (3 * WIDTH + WIDTH + 2 * WIDTH + 2 * WIDTH)
    attention = 2 * 2 * seen**2 * WIDTH
    return 2 * tokens * (3 * 8 * 8) * WIDTH + 2 * (linear + attention)


def test_a_multiply_add_is_two_operations():
    assert count(nn.Linear(5, 7), torch.randn(3, 5)) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (128, 128)])
def test_a_vision_transformer(size):
    tokens = (size[0] // 8) * (size[1] // 8)
    found = count_operations(create_backbone("toy-vit"), (1, 3, *size), CPU)
    assert found.total == toy_vit_operations(tokens)
    assert found.passes == [(1, 3, *size)]
    assert found.uncounted == []


def test_a_convolutional_backbone():
    """Kernels of 4 x 4 at strides of 2, 4 and 8 pixels."""
    cells, widths = (32 * 32, 16 * 16, 8 * 8), (3, 16, 32, 32)
    expected = sum(2 * n * 16 * a * b for n, a, b in zip(cells, widths, widths[1:], strict=False))
    assert count_operations(create_backbone("toy-cnn"), (1, 3, 64, 64), CPU).total == expected


def test_the_fused_attention_of_pytorch_is_not_missed():
    """nn.MultiheadAttention in eval mode runs one operator that shows none of its products."""
    attention, x = nn.MultiheadAttention(WIDTH, 4, batch_first=True).eval(), torch.randn(1, 10, WIDTH)
    assert count(attention, x, x, x) == 2 * 10 * WIDTH * 4 * WIDTH + 4 * 10**2 * WIDTH
    assert torch.backends.mha.get_fastpath_enabled()


def test_local_attention_counts_what_its_readable_form_multiplies():
    query, key, value = torch.randn(1, 8, 10, 2, 5), torch.randn(1, 4, 5, 2, 5), torch.randn(1, 4, 5, 2, 3)

    def run():
        local_attention(query, key, value, window=3)

    with use_backend("reference"):
        readable = count(run)
    assert count(run) == readable == 2 * (8 * 10) * 2 * 9 * (5 + 3)


def test_the_featsharp_block():
    """qkv, 16 heads over 49 keys, projection; SwiGLU of two thirds of 4 C, to a multiple of 8."""
    wide, hidden, cells = 2 * WIDTH, 88, 6 * 9
    block = LocalBlock(wide, WIDTH).eval()
    attention = 2 * cells * (wide * 3 * wide + wide * wide) + 2 * cells * 49 * 2 * wide
    mlp = 2 * cells * (wide * 2 * hidden + hidden * WIDTH)
    assert count(block, torch.randn(1, 6, 9, wide)) == attention + mlp


def test_an_operator_without_a_formula_is_named():
    with counting() as counter:
        torch.mv(torch.randn(3, 4), torch.randn(4))
    assert counter.uncounted == {"aten::mv"}


@pytest.mark.parametrize("upsampler", ["featsharp", "stride", "s2", "jafar"])
def test_shapes_alone_give_the_count_of_a_real_run(upsampler):
    encoder = create_encoder("toy-vit", upsampler, 2)
    images = torch.randn(1, 3, *encoder.input_size)
    with torch.no_grad():
        before = encoder(images).high_res
    found = count_operations(encoder, tuple(images.shape), CPU)
    assert found.total == count(encoder, images)
    # The encoder is as it was.
    with torch.no_grad():
        assert torch.equal(encoder(images).high_res, before)


def test_a_backbone_that_looks_at_values_is_run():
    vit = create_backbone("toy-vit")
    seen = []

    def looks(images):
        seen.append(images.sum().item())
        return vit(images).features

    backbone = from_callable(looks, patch_size=8, embed_dim=WIDTH, layout="BCHW", input_size=(64, 64))
    seen.clear()
    assert count_operations(backbone, (1, 3, 64, 64), CPU).total == toy_vit_operations(64)
    assert len(seen) == 1  # once for real


@pytest.fixture(scope="module")
def result():
    return FlopsTask("toy-vit", ("tile", "featsharp", "bilinear", "sapa"), (1, 1.5, 2, 3)).run(CPU, None, False)


def row_of(result, curve, factor):
    (row,) = (row for row in result["rows"] if (row["curve"], row["factor"]) == (curve, factor))
    return row


@pytest.mark.parametrize(("factor", "passes"), [(1, 1), (1.5, 5), (2, 5), (3, 10)])
def test_tiles_are_exactly_their_backbone_passes(result, factor, passes):
    tile = row_of(result, "tile", factor)
    assert tile["passes"] == passes
    assert tile["total"] == tile["backbone"] == passes * toy_vit_operations(64)
    assert tile["upsampler"] == 0
    assert tile["relative"] == passes
    assert row_of(result, "passes", factor)["total"] == tile["total"]


def test_a_larger_image_follows_the_square_of_its_tokens(result):
    for factor in (1, 1.5, 2, 3):
        row = row_of(result, "direct", factor)
        assert row["total"] == toy_vit_operations(row["cells"])
        assert (row["cells"], row["passes"]) == (64 * factor**2, 1)


def test_the_upsampler_is_what_is_not_the_backbone(result):
    row = row_of(result, "featsharp", 2)
    assert row["backbone"] == 5 * toy_vit_operations(64)
    assert row["upsampler"] > 0
    assert row["total"] == row["backbone"] + row["upsampler"]
    assert row_of(result, "bilinear", 2)["upsampler"] == 0


def test_the_table_states_the_convention_and_what_is_missing(result):
    task = FlopsTask("toy-vit")
    lines = task.table(result)
    assert lines[0] == "toy-vit, native size 64x64, one pass 0.003998 GFLOP"
    assert "a multiply-add is 2 operations" in lines[1]
    assert any(line.startswith("tile 3x") and line.endswith("10.000") for line in lines)
    assert any(line.startswith("not measured: sapa 1.5x: SAPA") for line in lines)
    assert not any("no formula" in line for line in lines)
    result["rows"][0]["uncounted"].append("aten::mv")
    assert "more than that: no formula for aten::mv" in task.table(result)
