"""FeatSharp: what it equals at the start, which maps it fuses in which order, and how large it is."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.backbones import create_backbone
from featsharp.errors import ConfigError
from featsharp.ops.resize import resize
from featsharp.upsamplers.featsharp import FeatSharp
from featsharp.upsamplers.tile import encode_tiles

CHANNELS, SIZE = 32, (32, 48)


@pytest.fixture(scope="module")
def backbone():
    return create_backbone("toy-vit")


@pytest.fixture(scope="module")
def image():
    return F.interpolate(torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(5)), (64, 96), mode="bicubic")


def silence(upsampler: FeatSharp) -> FeatSharp:
    """Zero both projections of the block, so that only the residual path is left."""
    for layer in (upsampler.block.attention.proj, upsampler.block.mlp.down):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return upsampler


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_the_published_start_is_the_jbu_map(backbone, image, factor):
    upsampler = FeatSharp(CHANNELS, factor, start="published")
    with torch.no_grad():
        out = upsampler(image, backbone, SIZE)
        expected = upsampler.branches["jbu"].upsample(out.low_res, image)
    torch.testing.assert_close(out.high_res, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(out.high_res, expected)  # the gates are nearly closed, not shut


@pytest.mark.parametrize(
    "inputs",
    [
        ("jbu", "tiles"),
        ("bilinear", "tiles"),
        ("tiles", "jbu"),
        ("jbu", "bilinear"),
        ("bilinear", "jbu", "tiles"),
        ("jafar", "tiles"),
    ],
)
def test_silent_projections_leave_the_first_input_bit_for_bit(backbone, image, inputs):
    upsampler = silence(FeatSharp(CHANNELS, 2, inputs=inputs, start="published"))
    with torch.no_grad():
        if upsampler.tile_position is not None:
            upsampler.tile_position.normal_()
        out = upsampler(image, backbone, SIZE)
        low_res, tiles, _ = encode_tiles(image, backbone, SIZE, 2)
        if inputs[0] == "tiles":
            positions = upsampler.tile_position.repeat_interleave(4, 2).repeat_interleave(6, 3)
            expected = tiles + positions
        else:
            expected = upsampler.branches[inputs[0]].upsample(out.low_res, image)
    assert torch.equal(out.high_res, expected)
    torch.testing.assert_close(out.low_res, low_res, atol=1e-5, rtol=1e-5)


def test_the_block_sees_the_maps_in_the_order_of_the_option(backbone, image):
    inputs = ("tiles", "bilinear", "jbu")
    upsampler = FeatSharp(CHANNELS, 2, inputs=inputs, start="published")
    seen = []
    upsampler.block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        out = upsampler(image, backbone, SIZE)
        maps = [
            encode_tiles(image, backbone, SIZE, 2).high_res,
            *(upsampler.branches[name].upsample(out.low_res, image) for name in inputs[1:]),
        ]
    assert seen[0].shape == (2, 8, 12, 3 * CHANNELS)
    torch.testing.assert_close(seen[0].permute(0, 3, 1, 2), torch.cat(maps, 1), atol=1e-5, rtol=1e-5)


def test_without_tiles_the_backbone_runs_once_per_image(backbone, image):
    batches = []

    def encode(images):
        batches.append(images)
        return backbone(images)

    upsampler = FeatSharp(CHANNELS, 2, inputs=("bilinear",))
    upsampler(image, encode, SIZE)
    assert upsampler.input_upsample_factor == 1
    assert len(batches) == 1
    assert torch.equal(batches[0], resize(image, SIZE))
    assert FeatSharp(CHANNELS, 2).input_upsample_factor == 2


def test_tile_batches_can_be_bounded(backbone, image):
    sizes = []

    def encode(images):
        sizes.append(len(images))
        return backbone(images)

    upsampler = FeatSharp(CHANNELS, 2)
    with torch.no_grad():
        free = upsampler(image, encode, SIZE)
        upsampler.max_tile_batch = 4
        bounded = upsampler(image, encode, SIZE)
    assert sizes == [10, 4, 4, 2]
    torch.testing.assert_close(bounded.high_res, free.high_res, atol=1e-5, rtol=1e-5)


# Of the published table, f = 2; it counts two scalars per JBU level that never get a gradient and are left out here.
INERT_SCALARS = 2
PUBLISHED = {384: 6_893_476, 768: 27_548_324, 1024: 44_783_444, 1152: 69_043_620, 1280: 81_773_572, 1536: 110_145_700}
LEAN = {384: 4_335_524, 768: 17_320_612, 1024: 30_810_628, 1152: 38_956_452, 1280: 48_107_860, 1536: 69_243_044}


@pytest.mark.parametrize(("widths", "table"), [("lean", LEAN), ("published", PUBLISHED)])
@pytest.mark.parametrize("factor", [2, 6])
def test_parameter_counts(widths, table, factor):
    for channels, expected in table.items():
        with torch.device("meta"):
            upsampler = FeatSharp(channels, factor, widths=widths, start="published")
        extra_level = 0 if factor == 2 else 1188 - INERT_SCALARS
        extra_tiles = channels * (factor**2 - 4)
        count = sum(p.numel() for p in upsampler.parameters())
        assert count == expected - INERT_SCALARS + extra_level + extra_tiles


@pytest.mark.parametrize(
    ("inputs", "shares"),
    [
        (("jbu", "tiles"), (0.7, 0.3)),
        (("bilinear", "jbu", "tiles"), (0.7, 0, 0.3)),
        (("tiles", "jbu"), (1, 0)),
        (("jbu", "bilinear"), (1, 0)),
    ],
)
def test_the_default_start_mixes_tiles_into_the_first_input(backbone, image, inputs, shares):
    upsampler = silence(FeatSharp(CHANNELS, 2, inputs=inputs))
    with torch.no_grad():
        out = upsampler(image, backbone, SIZE)
        expected = 0
        for name, share in zip(inputs, shares, strict=True):
            tiles = name == "tiles"
            branch = None if tiles else upsampler.branches[name].upsample(out.low_res, image)
            expected += share * (encode_tiles(image, backbone, SIZE, 2).high_res if tiles else branch)
    torch.testing.assert_close(out.high_res, expected, atol=1e-5, rtol=1e-5)


def test_the_mix_is_the_only_addition_to_the_published_parameters():
    default, published = (
        dict(FeatSharp(CHANNELS, 2, start=start).named_parameters()) for start in ("mix", "published")
    )
    assert default.keys() - published.keys() == {"mix"}
    assert published.keys() <= default.keys()
    assert default["mix"].shape == (CHANNELS, 2 * CHANNELS)


@pytest.mark.parametrize("start", ["mix", "published"])
def test_the_gates_start_open_or_nearly_closed(start):
    gate = FeatSharp(CHANNELS, 2, start=start).block.scale1
    assert (gate > 0.01).all() if start == "mix" else (gate < 1e-5).all()


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        (32, {"inputs": ("jbu", "tile")}, "unknown FeatSharp input 'tile'; did you mean 'tiles'"),
        (32, {"inputs": ()}, "one or more different maps"),
        (32, {"inputs": ("jbu", "jbu")}, "one or more different maps"),
        (32, {"widths": "wide"}, "unknown widths 'wide'; use 'lean' or 'published'"),
        (32, {"start": "cold"}, "unknown start 'cold'; use 'published' or 'mix'"),
        (32, {"window": 6}, "must be odd"),
        (20, {}, "multiple of 8 channels; this backbone has 20"),
    ],
)
def test_options_that_cannot_work(channels, options, message):
    with pytest.raises(ConfigError, match=message):
        FeatSharp(channels, 2, **options)
