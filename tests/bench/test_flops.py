"""Floating-point operations against formulas."""

import json
import logging

import pytest
import torch
from torch import nn

from featsharp.backbones import create_backbone
from featsharp.backbones.from_callable import from_callable
from featsharp.bench.counting import count_operations, counting
from featsharp.bench.flops import FlopsTask
from featsharp.bench.workloads import build_encoder
from featsharp.builder import content_key, create_encoder, load_from_file, save_checkpoint
from featsharp.errors import ConfigError
from featsharp.layers.local_block import LocalBlock
from featsharp.ops.backends import use_backend
from featsharp.ops.local_attention import local_attention
from featsharp.upsamplers.base import GuidedUpsampler

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


def test_an_operator_of_another_library_is_named_whatever_it_is_called():
    with torch.library._scoped_library("featsharp_test", "DEF") as library:
        library.define("mystery(Tensor x) -> Tensor")
        library.impl("mystery", lambda x: x + 1, "CPU")
        with counting() as counter:
            torch.ops.featsharp_test.mystery(torch.ones(3))
    assert counter.uncounted == {"featsharp_test::mystery"}


def test_what_multiplies_no_matrices_counts_nothing():
    maps = torch.randn(1, 3, 5, 5)
    with counting() as counter:
        nn.functional.interpolate(maps, scale_factor=2, mode="bilinear")
        nn.functional.grid_sample(maps, maps[:, 0, :, :2, None].expand(1, 5, 2, 2), align_corners=False)
        nn.functional.layer_norm(maps, (5,)).lgamma().cummax(-1)
    assert not counter.uncounted
    assert counter.flops.get_total_flops() == 0


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


def test_a_backbone_that_looks_at_values_is_run(caplog):
    vit = create_backbone("toy-vit")
    seen = []

    def looks(images):
        seen.append(images.sum().item())
        return vit(images).features

    backbone = from_callable(looks, patch_size=8, embed_dim=WIDTH, layout="BCHW", input_size=(64, 64))
    seen.clear()
    assert count_operations(backbone, (1, 3, 64, 64), CPU).total == toy_vit_operations(64)
    assert len(seen) == 1  # once for real
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "counting on real tensors" in record.message


def no_memory(image, features, size):
    float(features.sum())  # shapes alone do not do
    return torch.empty(2**50)


def test_a_function_of_the_users_that_fails_is_skipped_with_its_reason():
    names = ("json:dumps", f"{__name__}:no_memory")
    task = FlopsTask("toy-vit", names, (2,))
    result = task.run(CPU, None, progress=False)
    assert [row["curve"] for row in result["rows"]] == ["direct", "passes"]
    reasons = {entry["curve"]: entry["reason"] for entry in result["skipped"]}
    assert reasons["json:dumps"].startswith("TypeError: dumps() takes 1 positional argument")
    assert reasons[names[1]] == "out of memory"
    assert any(line.startswith("not measured: json:dumps 2x: TypeError") for line in task.table(result))


class Broken(GuidedUpsampler):
    def upsample_to(self, features, image, size):
        raise TypeError("a defect")


def test_a_defect_of_ours_is_no_reason():
    with pytest.raises(TypeError, match="a defect"):
        count_operations(create_encoder("toy-vit", Broken(WIDTH, 2)), (1, 3, 64, 64), CPU)


@pytest.fixture(scope="module")
def result():
    return FlopsTask("toy-vit", ("tile", "featsharp", "bilinear", "sapa"), (1, 1.5, 2, 3)).run(CPU, None, False)


def row_of(result, curve, factor):
    (row,) = (row for row in result["rows"] if (row["curve"], row["factor"]) == (curve, factor))
    return row


@pytest.mark.slow
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


def test_no_upsampler_of_ours_needs_values(caplog, tmp_path):
    normalised = build_encoder(create_backbone("toy-vit"), "featsharp", 2)
    save_checkpoint(normalised, tmp_path / "last.pth")
    names = ("featsharp", "featup", "tile")
    result = FlopsTask("toy-vit", names, (2,), [str(tmp_path / "last.pth")]).run(CPU, None, progress=False)
    assert row_of(result, "last", 2)["total"] == row_of(result, "featsharp", 2)["total"]
    assert caplog.records == []


def test_what_is_trained_pays_for_its_normalizer(result):
    """PHI-S rotates the features of every pass: one product of C x C per token."""
    row = row_of(result, "featsharp", 2)
    bare = build_encoder(create_backbone("toy-vit"), "featsharp", 2, "none")
    alone = count_operations(bare, (1, 3, 128, 128), CPU).total
    assert row["total"] - alone == 5 * 64 * 2 * WIDTH**2
    assert row["normalizer"] == "phi-s"
    assert {curve: row_of(result, curve, 2)["normalizer"] for curve in ("tile", "direct")} == {
        "tile": "none",
        "direct": None,
    }


def test_rows_name_the_options_that_were_measured(result):
    assert row_of(result, "featsharp", 2)["options"] == {}
    assert row_of(result, "direct", 2)["options"] is None
    assert json.loads(json.dumps(result)) == result


def test_refused_upsamplers():
    with pytest.raises(ConfigError, match="did you mean 'tile'"):
        FlopsTask("toy-vit", ("tlie",)).run(CPU, None, progress=False)


def test_the_table_states_the_convention_and_what_is_missing(result):
    task = FlopsTask("toy-vit")
    lines = task.table(result)
    assert lines[0] == "toy-vit, native size 64x64, one pass 0.003998 GFLOP"
    assert "a multiply-add is 2 operations" in lines[1]
    assert any(line.startswith("tile 3x") and line.endswith("10.000") for line in lines)
    assert any(line.startswith("not measured: sapa 1.5x: SAPA") for line in lines)
    assert not any("no formula" in line for line in lines)
    result["rows"][0]["uncounted"].append("mine::mv")
    assert "more than that: no formula for mine::mv" in task.table(result)


def test_a_checkpoint_is_counted_with_the_options_and_weights_it_has(tmp_path):
    """Two encoders of one upsampler and factor: a linear map, and the block."""
    for name, options in (("linear", {"attention": False, "ffn": False}), ("block", {})):
        encoder = create_encoder("toy-vit", "featsharp", 2, upsampler_options=options)
        save_checkpoint(encoder, tmp_path / f"{name}.pth")
    files = [str(tmp_path / "linear.pth"), f"mine={tmp_path / 'block.pth'}"]
    result = FlopsTask("toy-vit", ("bilinear", "featsharp"), (2,), files).run(CPU, None, progress=False)
    linear, block = row_of(result, "linear", 2), row_of(result, "mine", 2)
    assert linear["total"] < block["total"] < row_of(result, "featsharp", 2)["total"]  # which has a normalizer
    assert linear["options"]["ffn"] is False
    assert linear["key"] == content_key(load_from_file(tmp_path / "linear.pth")) != block["key"]
    # What has no weights of its own has a key, too; what is measured with random ones has none.
    assert row_of(result, "bilinear", 2)["key"] == content_key(create_encoder("toy-vit", "bilinear", 2))
    assert row_of(result, "featsharp", 2)["key"] is row_of(result, "direct", 2)["key"] is None
    with pytest.raises(ConfigError, match="two curves are called 'bilinear'"):
        FlopsTask("toy-vit", ("bilinear",), (2,), [f"bilinear={files[0]}"]).run(CPU, None, progress=False)
