"""Zoom cosine is 1 where the sharp features are what a closer look would have given."""

import numpy as np
import pytest
import torch
from patch_colour import PatchColour
from PIL import Image

from featsharp.backbones.base import Backbone
from featsharp.builder import create_encoder
from featsharp.evaluation.zoom import ZoomMeter


def noise_pictures(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (70, 100, 3), np.uint8)) for _ in range(count)]


def zoom_cosine(upsampler: str, factor: int, backbone: Backbone | None = None) -> float:
    meter = ZoomMeter(create_encoder(backbone or PatchColour(), upsampler, factor))
    for picture in noise_pictures():
        meter.add(picture)
    estimate = meter.result()
    assert estimate.low <= estimate.value <= estimate.high
    return estimate.value


def test_tiles_of_a_patch_function_are_what_a_closer_look_gives():
    assert zoom_cosine("tile", 2) == pytest.approx(1, abs=1e-5)
    # Guided maps do not know what lies between the tokens of a noisy picture.
    assert zoom_cosine("bilinear", 2) < 0.99


@pytest.mark.parametrize(("upsampler", "factor"), [("identity", 1), ("bilinear", 3), ("bilinear", 4), ("tile", 3)])
def test_every_factor_is_measured_on_the_same_grid(upsampler, factor):
    assert -1 <= zoom_cosine(upsampler, factor) <= 1


def test_crops_are_the_same_for_every_encoder():
    seen = []
    for upsampler, factor in (("bilinear", 2), ("identity", 1)):
        backbone = PatchColour()
        zoom_cosine(upsampler, factor, backbone)
        seen.append([images for images in backbone.seen if len(images) == 4])
    assert len(seen[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
