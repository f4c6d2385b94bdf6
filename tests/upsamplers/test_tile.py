"""Tiles: what they equal, how often they call the backbone, and the seams that an overlap hides."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.backbones import create_backbone
from featsharp.errors import ConfigError, InputError
from featsharp.ops.resize import resize
from featsharp.upsamplers.base import scale_length
from featsharp.upsamplers.tile import Tile

PATCH = 4


def mean_colour(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A backbone that is a function of each patch alone."""
    features = F.avg_pool2d(images, PATCH)
    return features, features.amax((2, 3))


class Counting:
    """``encode`` that remembers the batches it got."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def __call__(self, images):
        self.batches.append(images)
        return mean_colour(images)


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("factor", [1, 2, 3, 1.5, 2.4])
def test_a_patch_function_gives_the_map_of_the_large_image(factor, overlap):
    image = torch.randn(2, 3, 53, 41)
    out = Tile(3, factor, overlap=overlap)(image, mean_colour, (12, 20))
    large = resize(image, (PATCH * scale_length(3, factor), PATCH * scale_length(5, factor)))
    torch.testing.assert_close(out.high_res, mean_colour(large)[0], atol=1e-6, rtol=1e-6)
    low_res, summary = mean_colour(resize(image, (12, 20)))
    assert torch.equal(out.low_res, low_res)
    assert torch.equal(out.summary, summary)


def test_one_call_with_the_images_first():
    encode, image = Counting(), torch.randn(2, 3, 24, 40)
    Tile(3, 2)(image, encode, (12, 20))
    (batch,) = encode.batches
    assert batch.shape == (2 * (1 + 4), 3, 12, 20)
    assert torch.equal(batch[:2], resize(image, (12, 20)))
    # Then the tiles of the first image, row by row, then those of the second.
    for i, (b, y, x) in enumerate((b, y, x) for b in range(2) for y in range(2) for x in range(2)):
        assert torch.equal(batch[2 + i], image[b, :, 12 * y : 12 * y + 12, 20 * x : 20 * x + 20])


@pytest.mark.parametrize(("overlap", "sizes"), [(0, [3, 3, 3, 1]), (1, [2, 3, 3, 3, 3, 3, 3])])
def test_batches_can_be_bounded(overlap, sizes):
    image = torch.randn(2, 3, 24, 40)
    encode = Counting()
    bounded = Tile(3, 2, overlap=overlap, max_tile_batch=3)(image, encode, (12, 20))
    assert [len(batch) for batch in encode.batches] == sizes
    free = Tile(3, 2, overlap=overlap)(image, mean_colour, (12, 20))
    for one, other in zip(bounded, free, strict=True):
        torch.testing.assert_close(one, other)


def test_no_summary_stays_none_in_batches():
    out = Tile(3, 2, max_tile_batch=2)(torch.randn(1, 3, 8, 8), lambda x: (mean_colour(x)[0], None), (8, 8))
    assert out.summary is None


def with_ramp(images):
    """Mean colour plus an artefact that grows from the left to the right edge of whatever is encoded."""
    features, summary = mean_colour(images)
    return features + torch.linspace(-1, 1, features.shape[-1]), summary


def test_an_overlap_hides_the_seams():
    flat = torch.zeros(1, 3, 64, 64)
    steps = {
        overlap: Tile(3, 2, overlap=overlap)(flat, with_ramp, (32, 32)).high_res.diff(dim=-1).abs().max().item()
        for overlap in (0, 4)
    }
    assert steps[0] == pytest.approx(2)  # from the end of one ramp to the start of the next
    assert steps[4] < 0.5


def test_an_overlap_hides_the_seams_of_a_real_backbone():
    backbone = create_backbone("toy-vit")
    image = F.interpolate(torch.randn(1, 3, 4, 4), (128, 128), mode="bicubic")

    def seam(overlap):
        """Mean step across the middle, where two tiles meet, in units of the mean step elsewhere."""
        steps = Tile(32, 2, overlap=overlap)(image, backbone, (64, 64)).high_res.diff(dim=-1).norm(dim=1).mean((0, 1))
        return steps[7] / torch.cat([steps[:7], steps[8:]]).mean()

    with torch.no_grad():
        assert seam(0) > 1.5
        assert seam(4) < 0.7 * seam(0)


def test_any_size_and_the_tiles_that_it_takes():
    """The fewest tiles, spread evenly; what is left over is shared by neighbours."""
    encode, image = Counting(), torch.randn(1, 3, 50, 90)
    out = Tile(3, 2)(image, encode, (12, 20), (7, 11))
    torch.testing.assert_close(out.high_res, F.avg_pool2d(resize(image, (28, 44)), PATCH), atol=1e-6, rtol=1e-6)
    first, tiles = encode.batches
    assert first.shape == (1, 3, 12, 20)
    assert tiles.shape == (9, 3, 12, 20)
    large = resize(image, (28, 44))[0]
    starts = [(y, x) for y in (0, 2, 4) for x in (0, 3, 6)]
    for tile, (y, x) in zip(tiles, starts, strict=True):
        assert torch.equal(tile, large[:, 4 * y : 4 * y + 12, 4 * x : 4 * x + 20])


def test_a_factor_of_one_needs_one_pass():
    encode = Counting()
    out = Tile(3, 1)(torch.randn(2, 3, 12, 20), encode, (12, 20))
    assert [len(batch) for batch in encode.batches] == [2]
    assert torch.equal(out.high_res, out.low_res)


def test_sizes_below_the_grid():
    with pytest.raises(InputError, match=r"less than the 3x5 grid .* output_size=2x11, the nearest is 3x11"):
        Tile(3, 2)(torch.randn(1, 3, 50, 90), mean_colour, (12, 20), (2, 11))


def test_impossible_overlaps():
    with pytest.raises(InputError, match="overlap of tiles must be from 0 to 2"):
        Tile(3, 2, overlap=3)(torch.randn(1, 3, 24, 24), mean_colour, (12, 20))
    with pytest.raises(ConfigError, match="overlap must be a whole number of at least 0; got -1"):
        Tile(3, 2, overlap=-1)


@pytest.mark.parametrize("limit", [0, -4])
def test_impossible_batches(limit):
    with pytest.raises(ConfigError, match=f"max_tile_batch must be a whole number of at least 1; got {limit}"):
        Tile(3, 2, max_tile_batch=limit)
