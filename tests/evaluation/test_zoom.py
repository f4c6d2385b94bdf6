"""Zoom cosine is 1 where the sharp features are what a closer look would have given."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_colour import PatchColour
from PIL import Image

from featsharp.backbones.base import Backbone
from featsharp.builder import create_encoder
from featsharp.evaluation.zoom import CROPS, ZoomMeter


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


def test_the_cosine_is_what_the_rule_says():
    """Against loops over the tokens of every crop."""
    backbone = PatchColour()  # 4 x 6 tokens of 8 pixels
    encoder = create_encoder(backbone, "bilinear", 3)
    meter = ZoomMeter(encoder)
    generator = torch.Generator().manual_seed(78)
    cosines = []
    with torch.inference_mode():
        for picture in noise_pictures():
            meter.add(picture)
            # 70 x 100 pixels cover 64 x 96 best at 67 x 96.
            crop = picture.resize((96, 67), Image.Resampling.BICUBIC).crop((0, 1, 96, 65))
            x = encoder.input_conditioner(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None].float() / 255)
            sharp = encoder(x, low_res_size=(32, 48)).high_res[0]  # [4, 12, 18]
            for _ in range(2):
                top = int(torch.randint(1, 4, (1,), generator=generator))
                left = int(torch.randint(1, 6, (1,), generator=generator))
                closer = backbone(x[..., 8 * top : 8 * top + 32, 8 * left : 8 * left + 48]).features[0]
                for i in range(4):
                    for j in range(6):
                        y, z = ((n + 0.5) * 12 / 8 - 0.5 for n in (top + i, left + j))  # 12 cells on 8 tokens
                        a, b, s, t = int(y), int(z), y % 1, z % 1
                        read = (1 - s) * ((1 - t) * sharp[:, a, b] + t * sharp[:, a, b + 1])
                        read = read + s * ((1 - t) * sharp[:, a + 1, b] + t * sharp[:, a + 1, b + 1])
                        cosines.append(F.cosine_similarity(read, closer[:, i, j], dim=0).item())
    assert meter.result().value == pytest.approx(np.mean(cosines), abs=1e-5)


@pytest.mark.parametrize(("upsampler", "factor"), [("identity", 1), ("bilinear", 3), ("bilinear", 4), ("tile", 3)])
def test_every_factor_is_measured_on_the_same_grid(upsampler, factor):
    assert -1 <= zoom_cosine(upsampler, factor) <= 1


def test_crops_are_the_same_for_every_encoder():
    seen = []
    for upsampler, factor in (("bilinear", 2), ("identity", 1)):
        backbone = PatchColour()
        zoom_cosine(upsampler, factor, backbone)
        seen.append([images for images in backbone.seen if len(images) == CROPS])
    assert len(seen[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
