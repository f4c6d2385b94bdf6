"""Held-out images in order, features in one comparable space, intervals over images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.builder import create_encoder
from featsharp.data.pack import pack_images
from featsharp.errors import DataError, InputError
from featsharp.evaluation.estimates import bootstrap, bootstrap_sums, estimate_mean, estimate_ratio
from featsharp.evaluation.features import encode_raw, predict_raw
from featsharp.evaluation.images import ImageSet
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


def fitted_encoder(normalizer: str) -> SharpEncoder:
    encoder = create_encoder("toy-vit", "bilinear", 2, normalizer=normalizer, bias_buffer=True)
    statistics = FeatureStatistics(encoder.embed_dim)
    statistics.update(encoder.backbone(torch.randn(8, 3, 64, 64)).features)
    encoder.normalizer.fit(statistics)
    assert encoder.bias_buffer is not None
    encoder.bias_buffer.buffer.data.normal_()
    return encoder


def test_images_come_by_name_and_again_when_asked_again(photos):
    images = ImageSet(photos)
    assert [name for name, _ in images] == ["0.png", "1.png", "2.png", "3.png"]
    assert [image.size for _, image in images] == [(30, 20)] * 4
    assert [name for name, _ in ImageSet(photos, limit=2)] == ["0.png", "1.png"]


def test_unreadable_images_are_passed_over_and_reported(photos):
    (photos / "1.png").write_bytes(b"")
    images = ImageSet(photos, limit=3)
    assert [name for name, _ in images] == ["0.png", "2.png", "3.png"]
    ((name, reason),) = images.skipped
    assert name == "1.png"
    assert reason == "the file is empty (0 bytes)"


def test_shards_serve_as_well(photos, tmp_path):
    out = tmp_path / "shards"
    pack_images(photos, out)
    assert [image.size for _, image in ImageSet(out)] == [(30, 20)] * 4


def test_folder_without_a_readable_image_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no readable image"):
        list(ImageSet(tmp_path))


def test_predictions_are_in_the_space_of_the_backbone_without_the_bias():
    encoder = fitted_encoder("phi-s")
    images = torch.randn(2, 3, 64, 64)
    raw = encode_raw(encoder, images)
    assert torch.equal(raw, encoder.backbone(images).features)
    expected = torch.nn.functional.interpolate(raw, scale_factor=2, mode="bilinear", align_corners=False)
    with torch.no_grad():
        outcome = predict_raw(encoder, images, (64, 64))
    # The bias was added at 8 x 8 and comes off at 16 x 16, both times as bilinear enlargement would have it.
    assert (outcome - expected).abs().max() < 1e-3


def test_without_inverse_both_are_in_normalised_space():
    encoder = fitted_encoder("layernorm")
    images = torch.randn(1, 3, 64, 64)
    raw = encode_raw(encoder, images)
    assert raw.mean(1).abs().max() < 1e-5
    with torch.no_grad():
        predicted = predict_raw(encoder, images, (64, 64))
    assert torch.nn.functional.cosine_similarity(torch.nn.functional.avg_pool2d(predicted, 2), raw).mean() > 0.9


def test_features_that_are_not_finite_are_refused():
    encoder = fitted_encoder("phi-s")
    encoder.bias_buffer.buffer.data[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(InputError, match="NaN or infinite features"), torch.no_grad():
        predict_raw(encoder, torch.randn(1, 3, 64, 64), (64, 64))


def test_bootstrap_interval_brackets_value_and_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        rows = rng.normal(3.0, 1.0, (60, 1))
        estimate = bootstrap(rows.tolist(), lambda r: float(r[:, 0].mean()), resamples=200)
        assert estimate.value == pytest.approx(rows.mean())
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.high - estimate.low == pytest.approx(4 / 60**0.5, rel=0.5)
        hits += estimate.low <= 3.0 <= estimate.high
    assert hits >= 34


def test_bootstrap_of_one_image_is_a_point_and_repeats_itself():
    rows = [[2.0, 3.0]]
    assert bootstrap(rows, lambda r: float(r.sum())) == (5.0, 5.0, 5.0)
    many = np.random.default_rng(1).normal(size=(9, 2)).tolist()
    assert bootstrap(many, lambda r: float(r.sum())) == bootstrap(many, lambda r: float(r.sum()))


def test_sums_are_resampled_as_rows_are():
    rows = np.random.default_rng(0).random((12, 5))
    slow = bootstrap(rows, lambda r: float(r[:, 0].sum() / r[:, 1].sum()))
    fast = bootstrap_sums(rows, lambda total: float(total[0] / total[1]))
    assert fast == pytest.approx(slow, rel=1e-12)


def test_resamples_without_a_value_are_left_out_of_the_interval():
    rows = np.array([[1.0, 1.0]] + [[0.0, 0.0]] * 9)
    outcome = bootstrap(rows, lambda r: float(r[:, 0].sum() / r[:, 1].sum()) if r[:, 1].any() else float("nan"))
    assert outcome == (1.0, 1.0, 1.0)


def test_features_of_the_backbone_that_are_not_finite_are_no_target():
    encoder = create_encoder("toy-vit", "bilinear", 2)
    with pytest.raises(InputError, match="'toy-vit' returned NaN or infinite features"):
        encode_raw(encoder, torch.full((1, 3, 64, 64), float("nan")))


def test_means_and_ratios_are_those_of_resampled_images():
    rows = np.random.default_rng(0).random((12, 3))
    assert estimate_mean(rows) == bootstrap(rows, lambda r: float(r.mean()))
    ratio = bootstrap(rows, lambda r: float(r[:, 0].sum() / r[:, 1].sum()))
    assert estimate_ratio(rows[:, 0], rows[:, 1]) == pytest.approx(ratio)
    # Resamples without anything to divide by are left out.
    sparse = estimate_ratio([1, 0, 0], [2, 0, 0])
    assert sparse == (0.5, 0.5, 0.5)
