"""Multi-view fidelity: 1 for the mean, large for the truth, the same views for every encoder."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_colour import PatchColour
from PIL import Image
from torch import Tensor

from featsharp.backbones import from_callable
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError
from featsharp.evaluation.fidelity import SEED, VIEWS, FidelityMeter, default_eval_size, draw_views
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics
from featsharp.training.downsamplers import create_downsampler
from featsharp.upsamplers.base import GuidedUpsampler


class Truth(GuidedUpsampler):
    """What PatchColour would say with patches of a half and a quarter of the size."""

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        return F.conv2d(F.adaptive_avg_pool2d(image, size), PatchColour(offset=3).mix) + 3


class Constant(GuidedUpsampler):
    """One vector everywhere."""

    value: Tensor

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        return self.value[None, :, None, None].expand(len(features), -1, *size)


def smooth_pictures(count: int = 4, size: tuple[int, int] = (150, 200)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
        pictures.append(coarse.resize(size[::-1], Image.Resampling.BICUBIC))
    return pictures


def measure(encoder: SharpEncoder, **settings: object) -> FidelityMeter:
    meter = FidelityMeter(encoder, **settings)  # type: ignore[arg-type]
    for picture in smooth_pictures():
        meter.add(picture)
    return meter


def test_the_best_constant_scores_one():
    backbone = PatchColour(offset=3)
    upsampler = Constant(4, 2)
    upsampler.value = torch.zeros(4)
    first = measure(create_encoder(backbone, upsampler))
    # The mean over all valid targets, as the meter collects them.
    tokens = sum(row["_count"] for row in first._rows) / 4
    mean = torch.tensor([row["_sum"] for row in first._rows]).sum(0) / tokens
    upsampler.value = mean
    assert measure(create_encoder(backbone, upsampler)).result()["area"].value == pytest.approx(1, abs=1e-4)
    upsampler.value = mean + 0.5
    assert measure(create_encoder(backbone, upsampler)).result()["area"].value < 0.9


def test_a_perfect_predictor_is_far_above_bilinear():
    backbone = PatchColour(offset=3)
    truth = measure(create_encoder(backbone, Truth(4, 4))).result()
    bilinear = measure(create_encoder(backbone, "bilinear", 4)).result()
    assert truth["area"].value > 3 * bilinear["area"].value > 3
    assert truth["area"].value > 100
    assert truth["cosine"].value > bilinear["cosine"].value > 0.9
    for estimate in (truth["area"], bilinear["area"], bilinear["cosine"]):
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.low < estimate.high


def test_views_depend_on_the_seed_and_not_on_the_encoder():
    def views_seen(upsampler: str, factor: int, seed: int) -> list[Tensor]:
        backbone = PatchColour(offset=3)
        encoder = create_encoder(backbone, upsampler, factor)
        meter = FidelityMeter(encoder, size=(64, 96), seed=SEED + seed)
        for picture in smooth_pictures(2):
            meter.add(picture)
        return [images for images in backbone.seen if len(images) == VIEWS]

    first, other, reseeded = views_seen("bilinear", 2, 0), views_seen("identity", 1, 0), views_seen("bilinear", 2, 1)
    assert len(first) == len(other) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], reseeded[0])
    assert not torch.equal(first[0], first[1])


def test_the_outermost_tokens_are_left_out():
    meter = measure(create_encoder(PatchColour(offset=3), "bilinear", 2), views=3)
    # 4 x 6 tokens without the outermost ring: 2 x 4, of 4 channels and three views.
    assert all(row["_count"] == 3 * 2 * 4 * 4 for row in meter._rows)
    assert all(row["_tokens"] == 3 * 2 * 4 for row in meter._rows)


def test_views_lie_inside_the_picture_up_to_a_rest_and_keep_right_angles():
    size = (64, 96)
    views = draw_views(torch.rand(500, 4, generator=torch.Generator().manual_seed(0)), size).to_base
    pixels = torch.diag(torch.tensor([size[1], size[0], 1.0]))
    linear = (pixels @ views @ torch.linalg.inv(pixels))[:, :2, :2]
    zooms = 1 / torch.linalg.det(linear).sqrt()
    assert zooms.min() >= 1
    assert 1.58 < zooms.max() <= 1.6
    torch.testing.assert_close(
        linear @ linear.mT * zooms[:, None, None] ** 2, torch.eye(2).expand(500, 2, 2), atol=1e-5, rtol=0
    )
    turns = torch.atan2(linear[:, 1, 0], linear[:, 0, 0])
    assert 0.138 < turns.abs().max() <= 0.14
    corners = views @ torch.tensor([[-1.0, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    assert corners[:, :2].abs().max() < 1.21


@pytest.mark.parametrize(("upsampler", "factor"), [("identity", 1), ("bilinear", 2), ("tile", 2), ("bilinear", 4)])
def test_fidelity_is_what_the_rule_says(upsampler, factor):
    """Against the definition, with torch's own grids, a view at a time; square, as they know no other."""
    backbone = PatchColour((40, 40), offset=3)
    encoder = create_encoder(backbone, upsampler, factor)
    side = 40 * max(2, factor)
    pictures = smooth_pictures(3, (150, 200))
    meter = FidelityMeter(encoder)
    generator = torch.Generator().manual_seed(77)
    errors, targets = [], []
    with torch.inference_mode():
        for picture in pictures:
            meter.add(picture)
            width = round(200 * side / 150)
            left = (width - side) // 2
            crop = picture.resize((width, side), Image.Resampling.BICUBIC).crop((left, 0, left + side, side))
            x = encoder.input_conditioner(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None].float() / 255)
            sharp = encoder(x, low_res_size=(40, 40)).high_res
            thetas = []
            for _ in range(4):
                u, turn, tx, ty = torch.rand(4, generator=generator).tolist()
                scale, angle = 1 / (1 + 0.6 * u), 0.14 * (2 * turn - 1)
                room = max(0, 1 - 1.15 * scale)
                cos, sin = scale * np.cos(angle), scale * np.sin(angle)
                thetas.append([[cos, -sin, room * (2 * tx - 1)], [sin, cos, room * (2 * ty - 1)]])
            torch.rand(4, generator=generator)
            for theta in torch.tensor(thetas, dtype=torch.float32):
                grid = F.affine_grid(theta[None], [1, 3, side, side], align_corners=False)
                view = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
                small = F.interpolate(view, (40, 40), mode="bilinear", antialias=True)
                points = F.affine_grid(theta[None], [1, 3, 20, 20], align_corners=False)
                read = F.grid_sample(sharp, points, padding_mode="reflection", align_corners=False)
                target = backbone(small).features[0, :, 1:-1, 1:-1]
                errors.append((F.avg_pool2d(read, 4)[0, :, 1:-1, 1:-1] - target).square().mean().item())
                targets.append(target.flatten(1))
    variance = torch.cat(targets, 1).var(1, correction=0).mean().item()
    assert meter.result()["area"].value == pytest.approx(variance / np.mean(errors), rel=1e-3)


def test_bias_is_taken_off_and_the_normalizer_does_not_matter():
    plain = measure(create_encoder(PatchColour(offset=3), "bilinear", 2)).result()["area"].value
    encoder = create_encoder(PatchColour(offset=3), "bilinear", 2, normalizer="phi-s", bias_buffer=True)
    statistics = FeatureStatistics(4)
    statistics.update(encoder.backbone(torch.randn(8, 3, 32, 48)).features)
    encoder.normalizer.fit(statistics)
    assert measure(encoder).result()["area"].value == pytest.approx(plain, rel=1e-3)
    assert encoder.bias_buffer is not None
    encoder.bias_buffer.buffer.data += torch.randn(1, 4, 1, 1)
    assert measure(encoder).result()["area"].value == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("normalizer", ["none", "layernorm"])
def test_own_downsampler_is_measured_beside_area(normalizer):
    encoder = create_encoder(PatchColour(offset=3), "bilinear", 2, normalizer=normalizer)
    own = create_downsampler("simple", 4, 2, kernel_size=2).eval()
    result = measure(encoder, downsamplers={"own": own}).result()
    # A box of the size of a cell is area pooling.
    assert set(result) == {"area", "own", "cosine"}
    assert result["own"].value == pytest.approx(result["area"].value, rel=0.1)


def test_default_size_has_detail_to_find():
    assert default_eval_size(create_encoder(PatchColour(offset=3), "bilinear", 4)) == (128, 192)
    assert default_eval_size(create_encoder(PatchColour(offset=3), "identity", 1)) == (64, 96)


def test_no_image_is_an_error():
    with pytest.raises(ConfigError, match="no image"):
        FidelityMeter(create_encoder(PatchColour(offset=3), "identity", 1)).result()


def test_grids_of_a_few_tokens_are_measured_too():
    backbone = from_callable(torch.nn.AvgPool2d(16), input_size=(32, 32))
    meter = FidelityMeter(create_encoder(backbone, "bilinear", 2))
    for picture in smooth_pictures(2):
        meter.add(picture)
    assert meter.result()["area"].value > 1
