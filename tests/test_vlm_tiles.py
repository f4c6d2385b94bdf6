"""F16: tiles and a thumbnail become as many tokens as their layout says, each where it belongs."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from featsharp import create_backbone
from featsharp.model import InputConditioner

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def vlm(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import vlm_tiles

    yield vlm_tiles
    sys.modules.pop("vlm_tiles", None)


@pytest.mark.parametrize(
    ("size", "max_tiles", "layout"),
    [
        ((64, 64), 9, (1, 1)),  # nothing is enlarged
        ((30, 500), 1, (1, 1)),
        ((1000, 1000), 9, (3, 3)),
        ((1000, 1000), 6, (2, 2)),
        ((128, 256), 9, (2, 4)),
        ((900, 300), 3, (3, 1)),
        ((600, 400), 6, (3, 2)),
    ],
)
def test_layouts(vlm, size, max_tiles, layout):
    assert vlm.choose_layout(size, (64, 64), max_tiles) == layout


def test_the_layout_shows_most_of_the_image(vlm):
    """Against all layouts, one by one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        height, width = torch.randint(20, 900, (2,), generator=generator).tolist()
        best = None
        for rows, cols in itertools.product(range(1, 9), repeat=2):
            if rows * cols <= 8:
                scale = min(1, rows * 64 / height, cols * 48 / width)
                rank = (scale * height * scale * width, -rows * cols)
                best = max(best or (rank, (rows, cols)), (rank, (rows, cols)))
        assert vlm.choose_layout((height, width), (64, 48), 8) == best[1]


def test_no_tiles_are_an_error(vlm):
    with pytest.raises(ValueError, match="max_tiles must be at least 1; got 0"):
        vlm.choose_layout((64, 64), (64, 64), 0)


@pytest.mark.parametrize("name", ["toy-vit", "toy-vit-fixed", "toy-cnn"])
def test_token_counts_and_order(vlm, name):
    backbone = create_backbone(name)
    pixels = torch.rand(3, 128, 192)
    found = vlm.vision_tokens(pixels, backbone, max_tiles=6)
    assert (found.thumbnail, found.tiles, found.tile_map) == ((8, 8), (2, 3), (16, 24))
    assert found.tokens.shape == (8 * 8 + 2 * 3 * 8 * 8, 32)
    # At 2 x 3 tiles of 64 nothing is resized: the token of a place is that of its own tile.
    images = InputConditioner(backbone.mean, backbone.std)(pixels)
    for row, column in ((0, 0), (9, 3), (15, 23), (7, 8)):
        y, x = row // 8, column // 8
        tile = backbone(images[None, :, 64 * y : 64 * y + 64, 64 * x : 64 * x + 64]).features
        token = found.tokens[64 + 24 * row + column]
        torch.testing.assert_close(token, tile[0, :, row % 8, column % 8], atol=1e-5, rtol=1e-4)


def test_the_thumbnail_comes_first(vlm):
    backbone = create_backbone("toy-vit")
    pixels = torch.rand(3, 64, 64)
    found = vlm.vision_tokens(pixels, backbone, max_tiles=1)
    features = backbone(InputConditioner(backbone.mean, backbone.std)(pixels)[None]).features[0]
    torch.testing.assert_close(found.tokens[:64], features.flatten(1).T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.tokens[64:], found.tokens[:64], atol=1e-5, rtol=1e-4)


def test_the_command(vlm, tmp_path, capsys):
    Image.new("RGB", (192, 128), (200, 30, 60)).save(tmp_path / "a.png")
    vlm.main([str(tmp_path / "a.png"), "--max-tiles", "6"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "thumbnail 8x8 = 64 tokens"
    assert lines[1] == "2x3 tiles, together 16x24 = 384 tokens"
    assert lines[2] == "in all 448 tokens of 32 channels, 7 images encoded"
    assert lines[3].startswith("a 2x sharp map: ")
