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
from featsharp.data.views import ViewConfig
from featsharp.errors import ConfigError
from featsharp.evaluation.fidelity import EVAL_VIEWS, FidelityMeter, default_eval_size
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
        meter = FidelityMeter(encoder, size=(64, 96), seed=seed)
        for picture in smooth_pictures(2):
            meter.add(picture)
        return [images for images in backbone.seen if len(images) == EVAL_VIEWS.num_views]

    first, other, reseeded = views_seen("bilinear", 2, 0), views_seen("identity", 1, 0), views_seen("bilinear", 2, 1)
    assert len(first) == len(other) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], reseeded[0])
    assert not torch.equal(first[0], first[1])


def test_masks_lose_one_ring_of_tokens():
    still = ViewConfig(
        num_views=1, zoom=(1, 1), jitter_zoom=(1, 1), perspective=(0, 0), rotation=0.0, shift=0.0, flip=0.0
    )
    meter = measure(create_encoder(PatchColour(offset=3), "bilinear", 2), views=still)
    # 4 x 6 tokens without the outermost ring: 2 x 4, of 4 channels.
    assert all(row["_count"] == 2 * 4 * 4 for row in meter._rows)
    assert all(row["_tokens"] == 2 * 4 for row in meter._rows)


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
