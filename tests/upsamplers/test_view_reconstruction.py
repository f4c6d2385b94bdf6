"""What a reconstruction from views promises, on backbones whose exact sharp map is known."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from featsharp.backbones import create_backbone, from_callable
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError
from featsharp.ops.resize import resize
from featsharp.upsamplers.views import SETS, cut_view

PASSES = sorted(SETS)


def pooling(patch, size, **options):
    """A backbone whose features are the means of each patch."""
    return from_callable(torch.nn.AvgPool2d(patch), patch_size=patch, input_size=size, **options)


def encoder_of(backbone, factor=2, **options):
    return create_encoder(backbone, "views", factor, upsampler_options=options).eval()


def texture(size, cell, seed=0):
    """A picture with structure down to ``cell`` pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(4, 3, size[0] // cell, size[1] // cell, generator=generator)
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False)


@pytest.mark.parametrize(("patch", "grid"), [(8, (12, 9)), (32, (7, 10))])
def test_structure_below_a_patch_is_recovered(patch, grid):
    """The map of 16 passes has at most a third of bilinear's squared error, that of 4 at most .55."""
    size = grid[0] * patch, grid[1] * patch
    picture = texture((2 * size[0], 2 * size[1]), patch)
    exact = F.avg_pool2d(picture, patch)
    backbone = pooling(patch, size)
    with torch.no_grad():
        bilinear = create_encoder(backbone, "bilinear", 2)(resize(picture, size)).high_res
        worst = (bilinear - exact).square().mean()
        for passes, part in ((4, 0.55), (16, 1 / 3)):
            found = encoder_of(backbone, passes=passes)(picture).high_res
            assert (found - exact).square().mean() < part * worst


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("place", [(70, 41), (33, 150), (100, 100)])
def test_a_dot_stays_where_it_is(passes, place):
    """Its centroid in the map of a picture that is not square lies within a tenth of a token of its place.

    Without shifts, those of 5 passes, within an eighth.
    """
    patch, size = 8, (72, 104)
    picture = torch.zeros(1, 3, 144, 208)
    picture[..., place[0] - 4 : place[0] + 4, place[1] - 4 : place[1] + 4] = 1
    with torch.no_grad():
        found = encoder_of(pooling(patch, size), passes=passes)(picture).high_res[0, 0]
    for axis in (0, 1):
        centres = (torch.arange(found.shape[axis]) + 0.5) * patch
        centroid = (found.sum(1 - axis) * centres).sum() / found.sum()
        allowed = 0.125 if passes == 5 else 0.1
        assert abs(centroid - place[axis]) < allowed * 2 * patch  # a token covers two patches of the larger picture


def test_no_seam_where_windows_end():
    """Steps of the map across the edges of windows are those beside them, within 5 %."""
    encoder = encoder_of(pooling(8, (96, 128)))
    picture = torch.cat([texture((192, 256), 32, seed) for seed in range(24)])
    with torch.no_grad():
        found = encoder(picture).high_res
    steps, exact = (x.diff(dim=3).abs().mean((0, 1, 2)) for x in (found, F.avg_pool2d(picture, 8)))
    ratio = steps / exact  # that of every second step is alike: they lie within tokens, or between them
    for zoom in (1.3, 1.7):
        for end in (1 / zoom, 1 - 1 / zoom):
            step = round(end * found.shape[3]) - 1
            assert abs(ratio[step] / ratio[[step - 2, step + 2]].mean() - 1) < 0.05


def test_a_pattern_of_the_frame():
    """A smooth pattern that the backbone adds by the place in its input is no larger in the map of 16 passes."""
    generator = torch.Generator().manual_seed(1)
    pattern = resize(torch.randn(1, 3, 6, 4, generator=generator), (12, 9))

    def encode(images):
        features = F.avg_pool2d(images, 8)
        return features + resize(pattern, features.shape[2:]), None

    upsampler = encoder_of(pooling(8, (96, 72))).upsampler
    with torch.no_grad():
        left = upsampler(torch.zeros(1, 3, 192, 144), encode, (96, 72)).high_res.square().mean()
    assert left < 0.95 * resize(pattern, (24, 18)).square().mean()


@pytest.mark.parametrize("passes", PASSES)
def test_passes_are_what_they_are_called(passes):
    seen = []

    def encode(images):
        seen.append((len(images), images.shape[2:].numel()))
        return F.avg_pool2d(images, 8), None

    upsampler = encoder_of(pooling(8, (64, 48)), passes=passes).upsampler
    upsampler(torch.randn(1, 3, 128, 96), encode, (64, 48))
    # A larger picture has four times the tokens, and costs about five passes at 224 pixels.
    assert sum(count * (1 if area == 64 * 48 else 5) for count, area in seen) == (15 if passes == 16 else passes)


def test_each_set_has_the_views_of_the_smaller_ones():
    def boxes(views):
        return {(one.zoom, row, col) for one in views for row in one.rows for col in one.cols}

    for fewer, more in [*pairwise([2, 4, 8, 16]), (5, 8)]:
        assert boxes(SETS[fewer]) < boxes(SETS[more])


def test_a_backbone_of_one_size_gets_windows_in_place_of_the_larger_picture():
    encoder = encoder_of(pooling(8, (64, 48), flexible=False))
    assert not encoder.upsampler.larger  # the backbone refuses it
    picture = texture((128, 96), 16)
    with torch.no_grad():
        fixed = encoder(picture).high_res
        flexible = encoder_of(pooling(8, (64, 48)))(picture).high_res
    assert F.cosine_similarity(fixed, flexible).mean() > 0.98


def test_numbers_of_passes_that_do_not_exist():
    with pytest.raises(ConfigError, match="passes must be one of 2, 4, 5, 8, 16; got 6"):
        encoder_of(create_backbone("toy-vit"), passes=6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"views": [[1, [0], []]]}, "rows and cols lists of places"),
        ({"views": [[0.5, [0], [0]]]}, "zoom from 1"),
        ({"views": [[1, [0], [0], 0]]}, "precision above 0"),
        ({"views": [3]}, "views are .* got 3"),
        ({"prior": 0}, "precisions are above 0"),
        ({"larger": -1}, "that of the larger picture at least 0"),
    ],
)
def test_settings_that_cannot_be(options, said):
    with pytest.raises(ConfigError, match=said):
        encoder_of(create_backbone("toy-vit"), **options)


def test_views_of_ones_own_are_those_of_a_set():
    picture = texture((128, 96), 8)
    with torch.no_grad():
        named = encoder_of(create_backbone("toy-vit"), passes=4)(picture).high_res
        own = encoder_of(create_backbone("toy-vit"), views=[[1, [0, 0.5], [0, 0.5]]])(picture).high_res
    torch.testing.assert_close(named, own)


@pytest.mark.parametrize(("rows", "cols"), [((0, 5), (0, 7)), ((-2, 3), (4, 11)), ((3, 8), (-3, 4))])
def test_pictures_go_on_as_their_mirror_image(rows, cols):
    image = torch.randn(1, 2, 5, 7)
    mirrored = torch.cat([image.flip(2), image, image.flip(2)], 2)
    mirrored = torch.cat([mirrored.flip(3), mirrored, mirrored.flip(3)], 3)
    expected = mirrored[..., 5 + rows[0] : 5 + rows[1], 7 + cols[0] : 7 + cols[1]]
    assert torch.equal(cut_view(image, rows, cols), expected)


@pytest.mark.parametrize("factor", [1, 1.5, 3, 8])
def test_any_factor_reads_one_map(factor):
    """Beyond two cells per token the map of factor 2 is read at more places."""
    encoder, picture = encoder_of(create_backbone("toy-vit"), factor, passes=8), texture((128, 96), 8)[:1]
    with torch.no_grad():
        found = encoder(picture).high_res
        double = encoder_of(encoder.backbone, 2, passes=8)(picture).high_res
    assert found.shape[2:] == (round(8 * factor), round(6 * factor))
    if factor > 2:
        torch.testing.assert_close(found, resize(double, (8 * factor, 6 * factor)), atol=1e-4, rtol=1e-4)
    elif factor == 1.5:
        assert F.cosine_similarity(resize(double, (12, 9)), found).mean() > 0.95
