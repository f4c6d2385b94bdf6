"""S2 against a plain loop over scales and crops."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.backbones import create_backbone
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError
from featsharp.normalizers.statistics import FeatureStatistics
from featsharp.ops.resize import resize
from featsharp.upsamplers import create_upsampler
from featsharp.upsamplers.s2 import S2, S2Pooled

PATCH = 4


def mean_colour(images):
    """A backbone that is a function of each patch alone."""
    features = F.avg_pool2d(images, PATCH)
    return features, features.amax((2, 3))


def crops_at(image, scale, size, encode):
    """Features of scale x scale crops of the enlarged image, put where they were."""
    large = F.interpolate(image, (scale * size[0], scale * size[1]), mode="bilinear", antialias=True)
    rows = []
    for y in range(scale):
        crops = [
            large[..., y * size[0] : (y + 1) * size[0], x * size[1] : (x + 1) * size[1]].clone() for x in range(scale)
        ]
        rows.append(torch.cat([encode(crop)[0] for crop in crops], 3))
    return torch.cat(rows, 2)


@pytest.mark.parametrize("scales", [[1, 2], [1, 2, 3], [3, 1], [2]])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (24, 40)])
def test_pooled_equals_a_loop(size, scales):
    backbone, image = create_backbone("toy-vit"), torch.randn(2, 3, 75, 130)
    with torch.no_grad():
        out = S2Pooled(32, scales=scales)(image, backbone, size)
        maps = [F.avg_pool2d(crops_at(image, scale, size, backbone), scale) for scale in scales]
    assert out.high_res.shape == (2, 32 * len(scales), size[0] // 8, size[1] // 8)
    torch.testing.assert_close(out.high_res, torch.cat(maps, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.summary, backbone(resize(image, size)).summary)


@pytest.mark.parametrize("factor", [2, 3])
def test_dense_is_the_bilinear_map_on_top_of_the_tile_map(factor):
    backbone, image, size = create_backbone("toy-vit"), torch.randn(2, 3, 75, 130), (32, 48)
    with torch.no_grad():
        out = S2(32, factor)(image, backbone, size)
        low_res = backbone(F.interpolate(image, size, mode="bilinear", antialias=True)).features
        bilinear = F.interpolate(low_res, scale_factor=factor, mode="bilinear")
        tiles = crops_at(image, factor, size, backbone)
    torch.testing.assert_close(out.low_res, low_res)
    torch.testing.assert_close(out.high_res, torch.cat([bilinear, tiles], 1), atol=1e-4, rtol=1e-4)


def test_every_scale_comes_to_the_output_grid():
    backbone, image, size = create_backbone("toy-vit"), torch.randn(1, 3, 75, 130), (32, 48)
    with torch.no_grad():
        out = S2(32, 3, scales=[2, 1, 4])(image, backbone, size, (9, 20))
        maps = [crops_at(image, scale, size, backbone) for scale in (2, 1, 4)]
        # Of 8 x 12, 4 x 6 and 16 x 24 cells; only the last one shrinks.
        maps = [F.interpolate(m, (9, 20), mode="bilinear", antialias=len(m[0, 0]) > 9) for m in maps]
    assert out.high_res.shape == (1, 96, 9, 20)
    torch.testing.assert_close(out.high_res, torch.cat(maps, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("factor", [1.5, 2, 2.4])
def test_fractional_scales_have_no_gaps(factor, overlap):
    """For a patch function the tile map is that of the enlarged image."""
    image = torch.randn(2, 3, 70, 61)
    out = S2(3, factor, overlap=overlap)(image, mean_colour, (20, 12))
    height, width = (int(cells * factor + 0.5) for cells in (5, 3))
    large = resize(image, (height * PATCH, width * PATCH))
    assert out.high_res.shape == (2, 6, height, width)
    torch.testing.assert_close(out.high_res[:, 3:], mean_colour(large)[0], atol=1e-5, rtol=1e-5)


def test_fractional_pooling_is_by_area():
    """1.5 x 1.5 tiles on a grid of 2 x 2: cells of three, of which the middle one belongs to both."""
    image = torch.randn(1, 3, 12, 12)
    out = S2Pooled(3, scales=[1.5])(image, mean_colour, (8, 8))
    fine = mean_colour(image)[0]
    expected = torch.stack([fine[..., y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 1) for x in (0, 1)], 2)
    torch.testing.assert_close(out.high_res.flatten(2), expected)


def test_factor_one_is_the_low_resolution_map():
    out = S2(3, 1)(torch.randn(1, 3, 20, 20), mean_colour, (12, 8))
    assert torch.equal(out.high_res, out.low_res)


def test_batches_can_be_bounded():
    sizes = []

    def encode(images):
        sizes.append(len(images))
        return mean_colour(images)

    image = torch.randn(2, 3, 24, 40)
    bounded = S2(3, 2, max_tile_batch=3)(image, encode, (12, 20))
    assert sizes == [2, 3, 3, 2]
    torch.testing.assert_close(bounded.high_res, S2(3, 2)(image, mean_colour, (12, 20)).high_res)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [lambda: S2(3, 1.5), lambda: S2Pooled(3, scales=[1, 2.5])])
def test_half_precision(build, dtype):
    image = F.interpolate(torch.randn(1, 3, 5, 6), (24, 32), mode="bicubic")
    exact = build()(image, mean_colour, (12, 16)).high_res
    half = build()(image.to(dtype), mean_colour, (12, 16)).high_res
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)


def test_facts():
    dense, pooled = S2(3, 2, scales=[1, 2, 4]), S2Pooled(3)
    assert (dense.num_maps, dense.input_upsample_factor, dense.factor) == (3, 4, 2)
    assert (pooled.num_maps, pooled.input_upsample_factor, pooled.factor) == (2, 2, 1)
    assert S2(3, 2.5).scales == (1, 2.5)


def test_an_encoder_denormalises_every_scale():
    """Back in the backbone's own space, each group of channels is what an encoder that never left it gives."""
    image, plain = torch.randn(1, 3, 128, 128), create_encoder("toy-vit", "s2", 2, normalizer="none")
    encoder = create_encoder("toy-vit", "s2", 2, normalizer="phi-s")
    statistics = FeatureStatistics(32)
    statistics.update(3 * torch.randn(500, 32) + 1)
    encoder.normalizer.fit(statistics)
    with torch.no_grad():
        expected = plain(image).high_res
        assert not torch.allclose(encoder(image).high_res, expected, atol=0.1)
        torch.testing.assert_close(encoder(image, denormalize=True).high_res, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scales", [[], [1, 1], [0.5, 1], 2, "12", [1, "2"], [1, float("nan")], [1, True]])
def test_impossible_scales(scales):
    with pytest.raises(ConfigError, match=r"distinct numbers of at least 1, such as \[1, 2\]; got"):
        S2(3, 2, scales=scales)


def test_other_impossible_options():
    with pytest.raises(ConfigError, match="S2Pooled has factor 1; got 2"):
        S2Pooled(3, 2)
    with pytest.raises(ConfigError, match="overlap must be a whole number of at least 0; got -1"):
        S2(3, 2, overlap=-1)
    with pytest.raises(ConfigError, match="max_tile_batch"):
        S2(3, 2, max_tile_batch=0)


def test_names():
    backbone = create_backbone("toy-vit")
    assert isinstance(create_upsampler("s2", backbone, 2), S2)
    assert isinstance(create_upsampler("s2-pooled", backbone, 1, options={"scales": [1, 3]}), S2Pooled)
