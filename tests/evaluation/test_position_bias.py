"""Position bias: patterns of known strength come out as such, content does not count as one."""

import numpy as np
import pytest
import torch
from torch import Tensor

from featsharp.backbones import Backbone, BackboneOutput, create_backbone
from featsharp.errors import ConfigError, InputError
from featsharp.evaluation.position_bias import explained_by_position, position_bias, random_images

DIM, PATCH = 16, 8


class Patterned(Backbone):
    """Mixed pixels of each patch, plus a fixed map of a given variance at every position."""

    def __init__(self, variance: float, content: float = 1.0) -> None:
        super().__init__("patterned", patch_size=PATCH, embed_dim=DIM, input_size=(96, 128))
        generator = torch.Generator().manual_seed(7)
        filters = torch.randn(DIM, 3, PATCH, PATCH, generator=generator)
        pattern = torch.randn(1, DIM, 12, 16, generator=generator)
        pattern = (pattern - pattern.mean((2, 3), keepdim=True)) / pattern.std((2, 3), correction=0, keepdim=True)
        self.register_buffer("filters", filters * content)
        self.register_buffer("pattern", pattern * variance**0.5)
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        return BackboneOutput(torch.conv2d(images, self.filters, stride=PATCH) + self.pattern, None)


def mean_channel_variance(backbone: Backbone) -> float:
    """Of the content: features of many other images, over images and positions, mean over channels."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
    features = backbone((random_images(64, backbone.input_size, seed=99) - mean) / std).features
    return features.var((0, 2, 3)).mean().item()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_pattern_of_known_variance(share):
    content = mean_channel_variance(Patterned(0))
    variance = content * share / (1 - share)
    assert position_bias(Patterned(variance), num_images=32) == pytest.approx(share, abs=0.03)


def test_no_pattern_and_nothing_but_a_pattern():
    assert position_bias(Patterned(0), num_images=32) < 0.02
    assert position_bias(Patterned(1, content=0)) == pytest.approx(1)
    assert position_bias(Patterned(0, content=0)) == 0


def test_against_the_formula_by_loops():
    x = np.random.default_rng(0).normal(size=(5, 3, 2, 4)) + np.random.default_rng(1).normal(size=(1, 3, 2, 4))
    n, channels, rows, cols = x.shape
    pattern = residual = total = 0.0
    for c in range(channels):
        whole = x[:, c].mean()
        for y in range(rows):
            for z in range(cols):
                pattern += (x[:, c, y, z].mean() - whole) ** 2
                for i in range(n):
                    residual += (x[i, c, y, z] - x[i, c].mean() - x[:, c, y, z].mean() + whole) ** 2
                    total += (x[i, c, y, z] - whole) ** 2
    positions = rows * cols
    noise = residual / ((n - 1) * (positions - 1))
    expected = (pattern / positions - noise / n) / (total / (n * positions))
    assert 0.2 < expected < 0.8
    assert explained_by_position(torch.from_numpy(x)) == pytest.approx(expected)


def test_the_estimate_is_not_biased_by_few_images():
    """Noise without a pattern: the mean over n images still has 1 / n of its variance, which is no pattern."""
    generator = torch.Generator().manual_seed(0)
    rows = [explained_by_position(torch.randn(3, 64, 16, 16, generator=generator)) for _ in range(10)]
    assert max(rows) < 0.02


def test_offsets_of_whole_images_are_no_pattern():
    offsets = 10 * torch.randn(8, 4, 1, 1)
    pattern = torch.randn(1, 4, 16, 16)
    assert explained_by_position(offsets + pattern) == pytest.approx(
        (pattern.var((2, 3)).sum() / (offsets + pattern).var((0, 2, 3)).sum()).item(), rel=0.01
    )


def test_images_are_alike_everywhere_and_the_same_every_time():
    images = random_images(64, (32, 48))
    assert images.shape == (64, 3, 32, 48)
    assert 0 <= images.min() < images.max() <= 1
    rows = images.mean((0, 1, 3))
    assert (rows - 0.5).abs().max() < 0.03
    assert images.std((0, 1)).min() > 0.15
    assert torch.equal(images, random_images(64, (32, 48)))
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images, random_images(64, (32, 48), seed=1))


def test_a_backbone_is_measured_at_any_size_and_precision():
    """Padding is a position bias too: a larger map has less of it."""
    backbone = create_backbone("toy-cnn")
    before = torch.get_rng_state()
    small, large = (position_bias(backbone, size=(side, side)) for side in (64, 192))
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 < large < small < 0.5
    assert position_bias(backbone.bfloat16()) == pytest.approx(small, abs=0.01)


def test_too_little_to_tell():
    with pytest.raises(ConfigError, match="got num_images=1, take 16"):
        position_bias(create_backbone("toy-vit"), num_images=1)
    for shape in [(1, 4, 8, 8), (8, 4, 1, 1)]:
        with pytest.raises(InputError, match="at least two images and two positions"):
            explained_by_position(torch.zeros(shape))
