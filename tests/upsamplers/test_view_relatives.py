"""Published methods as settings of views, each against a plain loop over its shifts that does what its paper says."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from featsharp.builder import create_encoder, load_from_file
from featsharp.errors import ConfigError
from featsharp.ops.resize import resize
from featsharp.upsamplers.views import RELATIVES

PATCH, SIZE = 8, (48, 64)


def encode_as(name, picture, low_res_size=SIZE):
    encoder = create_encoder("toy-vit", "views", 2, upsampler_options={"views": name})
    with torch.no_grad():
        return encoder(picture, low_res_size=low_res_size).high_res, encoder.backbone


def repeated(backbone, picture):
    """Features of a picture at each of its pixels, by repetition of tokens."""
    with torch.no_grad():
        tokens = backbone(picture).features
    return tokens.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def shifted(x, down, right):
    """[B, C, H, W] whose pixel (y, x) is the one at (y + down, x + right); 0 where there is none."""
    height, width = x.shape[2:]
    padded = F.pad(x, (width, width, height, height))
    return padded[..., height + down : 2 * height + down, width + right : 2 * width + right]


def test_stochastic_resonance():
    """Integer shifts, zeros beyond the edge, repetition, shift back, mean, pooling."""
    picture = torch.randn(2, 3, *SIZE)
    found, backbone = encode_as("stochastic-resonance", picture)
    sums = counts = torch.zeros(1)
    for down, right in product(range(-3, 4), repeat=2):
        features = repeated(backbone, shifted(picture, down, right))
        sums = sums + shifted(features, -down, -right)
        counts = counts + shifted(torch.ones_like(features), -down, -right)
    pooled = F.avg_pool2d(sums, PATCH // 2) / F.avg_pool2d(counts, PATCH // 2)
    torch.testing.assert_close(found, pooled, atol=1e-5, rtol=1e-5)


def test_hr_dv2():
    """Circular shifts in eight directions, repetition to pixels, mean."""
    picture = torch.randn(2, 3, *SIZE)
    found, backbone = encode_as("hr-dv2", picture)
    shifts = {(d * down, d * right) for d in (1, 2) for down, right in product((-1, 0, 1), repeat=2)}
    assert len(shifts) == 17
    total = sum(
        repeated(backbone, picture.roll((-down, -right), (2, 3))).roll((down, right), (2, 3)) for down, right in shifts
    )
    torch.testing.assert_close(found, F.avg_pool2d(total / 17, PATCH // 2), atol=1e-5, rtol=1e-5)


def mirrored(picture, down, right):
    """A picture shifted by pixels, with its mirror image beyond its edges."""
    tall = torch.cat([picture.flip(2), picture, picture.flip(2)], 2)
    all_around = torch.cat([tall.flip(3), tall, tall.flip(3)], 3)
    top, left = picture.shape[2] + down, picture.shape[3] + right
    return all_around[..., top : top + picture.shape[2], left : left + picture.shape[3]]


def test_shift_and_stitch():
    """Tokens of pictures shifted by half a token, interlaced: the cell of a token is where its centre is."""
    picture = torch.randn(2, 3, *SIZE)
    found, backbone = encode_as("shift-and-stitch", picture)
    expected = torch.full_like(found, torch.nan)
    for i, j in product((0, 1), repeat=2):
        view = mirrored(picture, (2 * i - 1) * PATCH // 4, (2 * j - 1) * PATCH // 4)
        with torch.no_grad():
            expected[:, :, i::2, j::2] = backbone(view).features
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_phase_averaging():
    """Four phases of the patch grid, aligned by repetition; a phase counts where it shows the picture."""
    picture = torch.randn(2, 3, *SIZE)
    found, backbone = encode_as("phase-averaging", picture)
    sums = counts = torch.zeros(1)
    for down, right in product((0, PATCH // 2), repeat=2):
        features = repeated(backbone, mirrored(picture, down, right))
        sums = sums + shifted(features, -down, -right)
        counts = counts + shifted(torch.ones_like(features), -down, -right)
    pooled = F.avg_pool2d(sums, PATCH // 2) / F.avg_pool2d(counts, PATCH // 2)
    torch.testing.assert_close(found, pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RELATIVES)
def test_limits_and_larger_maps(name):
    """Beyond two cells per token the map is read bilinearly; in chunks it is the same."""
    picture = torch.randn(1, 3, 96, 128)
    found, backbone = encode_as(name, picture)
    encoder = create_encoder(backbone, "views", 2, upsampler_options={"views": name}, max_memory="1GiB")
    torch.testing.assert_close(encoder(picture, low_res_size=SIZE).high_res, found, atol=1e-5, rtol=1e-5)
    large = encoder(picture, low_res_size=SIZE, output_size="pixels").high_res
    torch.testing.assert_close(large, resize(found, (96, 128)), atol=1e-5, rtol=1e-5)


def test_names():
    with pytest.raises(
        ConfigError, match="unknown method for views: 'stochastic'; did you mean 'stochastic-resonance'"
    ):
        encode_as("stochastic", torch.randn(1, 3, *SIZE))
    picture = torch.randn(1, 3, *SIZE)
    named = load_from_file("views-2x?views=hr-dv2", featurizer="toy-vit")
    assert named.recipe["options"] == {"views": "hr-dv2"}
    torch.testing.assert_close(named(picture, low_res_size=SIZE).high_res, encode_as("hr-dv2", picture)[0])
    four = load_from_file("views-2x?passes=4&prior=0.1", featurizer="toy-vit")
    assert four.recipe["options"] == {"passes": 4, "prior": 0.1}
    with pytest.raises(ConfigError, match="passes must be one of 2, 4, 5, 8, 16; got 6"):
        load_from_file("views-2x?passes=6", featurizer="toy-vit")
