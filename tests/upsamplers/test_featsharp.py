"""FeatSharp: what it equals at the start, which maps it fuses in which order, and how large it is."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.backbones import create_backbone
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError
from featsharp.layers.tiles import compute_details
from featsharp.ops.boxes import whole
from featsharp.ops.resize import resize
from featsharp.upsamplers.chunked import works_in_chunks
from featsharp.upsamplers.featsharp import FeatSharp, ProgressiveFeatSharp
from featsharp.upsamplers.tile import Tile

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
        low_res, tiles, _ = Tile(CHANNELS, 2).encode_tiles(image, backbone, SIZE)
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
            Tile(CHANNELS, 2).encode_tiles(image, backbone, SIZE).high_res,
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
            expected += share * (Tile(CHANNELS, 2).encode_tiles(image, backbone, SIZE).high_res if tiles else branch)
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
        (20, {}, "multiple of 8 channels; this backbone has 20, the nearest that works is 16"),
        (32, {"inputs": ("rgb", "tiles")}, "put 'rgb' behind it"),
        (32, {"inputs": "tiles"}, "the inputs of FeatSharp are a list; got 'tiles'"),
        (32, {"position": "sine"}, "unknown position 'sine'"),
        (32, {"max_tile_batch": 0}, "max_tile_batch must be a whole number of at least 1"),
    ],
)
def test_options_that_cannot_work(channels, options, message):
    with pytest.raises(ConfigError, match=message):
        FeatSharp(channels, 2, **options)


def test_a_linear_block_starts_as_the_mix(backbone, image):
    with torch.no_grad():
        out = FeatSharp(CHANNELS, 2, inputs=("bilinear", "rgb", "tiles"), attention=False, ffn=False)(
            image, backbone, SIZE
        )
        tiles = Tile(CHANNELS, 2).encode_tiles(image, backbone, SIZE).high_res
        expected = 0.7 * resize(out.low_res, (8, 12)) + 0.3 * tiles
    torch.testing.assert_close(out.high_res, expected, atol=1e-5, rtol=1e-5)


def test_the_colour_input_is_a_projection_of_the_shrunk_image(backbone, image):
    upsampler = FeatSharp(CHANNELS, 2, inputs=("bilinear", "rgb"), start="published")
    seen = []
    upsampler.block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        upsampler(image, backbone, SIZE)
        expected = upsampler.branches["rgb"].proj(resize(image, (8, 12)))
    assert seen[0].shape == (2, 8, 12, CHANNELS + 16)
    torch.testing.assert_close(seen[0][..., CHANNELS:].permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize(("factor", "size"), [(1.5, None), (3.5, None), (2, (9, 13)), (2, (8, 13))])
def test_fractions_and_explicit_sizes(backbone, image, factor, size):
    """Tiles cover the map evenly; a silent block leaves the mix of bilinear map and tiles."""
    upsampler = silence(FeatSharp(CHANNELS, factor, inputs=("bilinear", "tiles")))
    height, width = size or (int(4 * factor), int(6 * factor))
    with torch.no_grad():
        out = upsampler(image, backbone, SIZE, size)
        tiles = Tile(CHANNELS, factor)(image, backbone, SIZE, size).high_res
        expected = 0.7 * resize(out.low_res, (height, width)) + 0.3 * tiles
    assert out.high_res.shape == (2, CHANNELS, height, width)
    torch.testing.assert_close(out.high_res, expected, atol=1e-5, rtol=1e-5)


def test_tile_positions_of_a_fraction(backbone, image):
    """Two tiles cover 1.5 times the grid; each position vector stands on its half of the map."""
    upsampler = silence(FeatSharp(CHANNELS, 1.5, inputs=("tiles",), start="published"))
    with torch.no_grad():
        plain = upsampler(image, backbone, SIZE).high_res
        upsampler.tile_position.copy_(torch.randn(1, CHANNELS, 2, 2))
        added = upsampler(image, backbone, SIZE).high_res - plain
    expected = upsampler.tile_position.detach().repeat_interleave(3, 2)
    torch.testing.assert_close(added[:, :, :, :4], expected[..., :1].expand(2, -1, -1, 4), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(added[:, :, :, 5:], expected[..., 1:].expand(2, -1, -1, 4), atol=1e-5, rtol=1e-5)


def test_progressive_levels_see_tiles_of_their_own_scale(backbone, image):
    batches = []

    def encode(images):
        batches.append(images)
        return backbone(images)

    upsampler = ProgressiveFeatSharp(CHANNELS, 4)
    with torch.no_grad():
        out = upsampler(image, encode, SIZE)
        assert [len(batch) for batch in batches] == [2 * 1, 2 * 4, 2 * 16]
        features = out.low_res
        for level, gain in zip(upsampler.levels, (2, 4), strict=True):
            size = (4 * gain, 6 * gain)
            tiles = Tile(CHANNELS, gain)(image, backbone, SIZE).high_res
            features = level.fuse(features, image, tiles, size)
    torch.testing.assert_close(out.high_res, features, atol=1e-4, rtol=1e-4)
    assert [level.factor for level in ProgressiveFeatSharp(CHANNELS, 6).levels] == [2, 3]
    assert ProgressiveFeatSharp(CHANNELS, 4).levels[1].tile_position.shape == (1, CHANNELS, 2, 2)


def test_windows_that_see_more_than_the_map_are_refused_with_the_largest_that_helps(backbone):
    create_encoder(backbone, "featsharp", 2, upsampler_options={"window": 31})
    with pytest.raises(ConfigError, match=r"window of 33 is larger than the map: .*16x16, and a window of 31 sees all"):
        create_encoder(backbone, "featsharp", 2, upsampler_options={"window": 33})


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 3)])
def test_the_fine_part_is_what_blurring_takes_away(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    height, width = size
    # Means of 2 x 2 cells by a loop; where a side is odd, cells overlap as in adaptive pooling.
    small = torch.zeros(2, 3, -(-height // 2), -(-width // 2), dtype=torch.float64)
    for i in range(small.shape[2]):
        for j in range(small.shape[3]):
            rows = slice(i * height // small.shape[2], -(-(i + 1) * height // small.shape[2]))
            cols = slice(j * width // small.shape[3], -(-(j + 1) * width // small.shape[3]))
            small[..., i, j] = x[..., rows, cols].mean((2, 3))
    blur = F.interpolate(small, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(compute_details(x), x - blur)
    torch.testing.assert_close(compute_details(x + 3), compute_details(x))


@pytest.mark.parametrize("factor", [2, 1])
def test_details_are_computed_tile_by_tile(backbone, image, factor):
    """At a seam no tile looks at its neighbour: the details of the map are those of each tile alone."""
    upsampler = FeatSharp(CHANNELS, factor, inputs=("bilinear", "details"), attention=False, ffn=False)
    with torch.no_grad():
        out = upsampler(image, backbone, SIZE)
        tiles = Tile(CHANNELS, factor).encode_tiles(image, backbone, SIZE).high_res
        expected = resize(out.low_res, (4 * factor, 6 * factor)).clone()
        for i in range(factor):
            for j in range(factor):
                cell = (..., slice(4 * i, 4 * i + 4), slice(6 * j, 6 * j + 6))
                expected[cell] += 0.75 * compute_details(tiles[cell])
    torch.testing.assert_close(out.high_res, expected, atol=1e-5, rtol=1e-5)


def test_a_progressive_sharpens_with_details(backbone, image):
    upsampler = ProgressiveFeatSharp(CHANNELS, 4, inputs=("bilinear", "details"), attention=False, ffn=False)
    with torch.no_grad():
        out = upsampler(image, backbone, SIZE)
        level = upsampler.levels[0](image, backbone, SIZE).high_res
    assert out.high_res.shape == (2, CHANNELS, 16, 24)
    assert not torch.allclose(out.high_res, resize(level, (16, 24)), atol=1e-3)


def test_tiles_are_weighted_before_they_are_stitched(backbone, image):
    """Where tiles overlap, too, and with position vectors: the same as weighting every stitched map."""
    upsampler = FeatSharp(CHANNELS, 2.5, inputs=("tiles", "rgb", "details"), attention=False, ffn=False)
    for parameter in upsampler.parameters():
        torch.nn.init.normal_(parameter)
    height, width = 10, 15
    with torch.no_grad():
        windows = Tile(CHANNELS, 2.5)
        tiles = windows.encode_tiles(image, backbone, SIZE).high_res
        tiles = tiles + upsampler._tile_positions(whole((height, width)), (height, width))
        details = windows.encode_tiles(image, backbone, SIZE, process=compute_details).high_res
        colour = upsampler.branches["rgb"].proj(resize(image, (height, width)))
        stacked = torch.cat([tiles, colour, details], 1).permute(0, 2, 3, 1)
        expected = upsampler.block(stacked).permute(0, 3, 1, 2)
        out = upsampler(image, backbone, SIZE).high_res
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-4)


def test_a_block_gets_tiles_and_details_in_their_order(backbone, image):
    upsampler = FeatSharp(CHANNELS, 2, inputs=("bilinear", "details", "tiles"), start="published")
    torch.nn.init.normal_(upsampler.tile_position)
    seen = []
    upsampler.block.register_forward_pre_hook(lambda module, args: seen.append(args[0].permute(0, 3, 1, 2)))
    with torch.no_grad():
        low_res = upsampler(image, backbone, SIZE).low_res
        tiles = Tile(CHANNELS, 2).encode_tiles(image, backbone, SIZE).high_res
        details = Tile(CHANNELS, 2).encode_tiles(image, backbone, SIZE, process=compute_details).high_res
    positions = upsampler.tile_position.detach().repeat_interleave(4, 2).repeat_interleave(6, 3)
    expected = torch.cat([resize(low_res, (8, 12)), details, tiles + positions], 1)
    torch.testing.assert_close(seen[0], expected)
    assert not works_in_chunks(upsampler)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inputs": ("jbu", "rgb", "details")},
        {"attention": False, "ffn": False},
        {"inputs": ("bilinear", "tiles", "details"), "attention": False, "ffn": False},
    ],
)
def test_the_linear_weight_applies_to_the_linear_maps(backbone, image, options):
    upsampler = FeatSharp(CHANNELS, 2, **options)
    with torch.no_grad():
        if upsampler.mix is not None:
            silence(upsampler)
        torch.nn.init.normal_(upsampler.linear_weight)
        maps = upsampler.linear_maps(image, backbone, SIZE)
        expected = torch.einsum("cd,bdhw->bchw", upsampler.linear_weight, maps)
        torch.testing.assert_close(upsampler(image, backbone, SIZE).high_res, expected, atol=1e-4, rtol=1e-4)


def test_the_published_start_has_no_linear_weight():
    assert FeatSharp(CHANNELS, 2, start="published").linear_weight is None
