"""The comparison with a real run of the backbone: perfect where the sharp map is that run, and by hand."""

import numpy as np
import pytest
import torch
from patch_colour import PatchColour
from PIL import Image

from featsharp.builder import create_encoder
from featsharp.errors import ConfigError
from featsharp.evaluation.reference import ReferenceTask, compare, reference_size
from featsharp.evaluation.runner import Subject, evaluate


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (70, 100, 3), np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


def measure(folder, backbone, upsampler, factor):
    subject = Subject("x", lambda: create_encoder(backbone, upsampler, factor))
    return evaluate(ReferenceTask(data=folder), [subject], progress=False)["x"]["result"]


@pytest.mark.parametrize(
    ("backbone", "upsampler", "factor"),
    [("toy-vit", "native-highres", 2), ("toy-vit", "native-highres", 1.5), ("toy-vit", "identity", 1)],
)
def test_a_real_run_is_perfect(folder, backbone, upsampler, factor):
    outcome = measure(folder, backbone, upsampler, factor)
    assert outcome["cosine"]["value"] == pytest.approx(1, abs=1e-5)
    assert outcome["error"]["value"] == pytest.approx(0, abs=1e-6)
    assert outcome["cka"]["value"] == pytest.approx(1, abs=1e-5)


def test_tiles_of_a_patch_function_are_perfect_and_bilinear_is_not(folder):
    tiles, bilinear = (measure(folder, PatchColour(), name, 2) for name in ("tile", "bilinear"))
    assert tiles["cosine"]["value"] == pytest.approx(1, abs=1e-5)
    assert tiles["error"]["value"] < 1e-8
    assert bilinear["error"]["value"] > 0.2
    assert bilinear["cka"]["value"] < 0.9


def test_scores_by_hand():
    real, sharp = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    row = compare(torch.from_numpy(sharp), torch.from_numpy(real))
    x, y = sharp.reshape(3, 20).T, real.reshape(3, 20).T
    cosines = [a @ b / np.sqrt(a @ a * (b @ b)) for a, b in zip(x, y, strict=True)]
    assert row["cosine"] == pytest.approx(np.mean(cosines))
    assert row["error"] == pytest.approx(((x - y) ** 2).sum() / (20 * y.var(0).sum()))
    x, y = x - x.mean(0), y - y.mean(0)
    assert row["cka"] == pytest.approx(np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))


def test_the_mean_of_an_image_has_error_1_and_pooling_is_a_ratio_of_sums():
    real = torch.randn(3, 4, 5)
    mean = real.mean((1, 2), keepdim=True)
    row = compare(mean + 1e-4 * torch.randn(3, 4, 5), real)  # CKA needs something that varies
    assert row["error"] == pytest.approx(1, abs=1e-3)
    rows = [
        {"cosine": 1.0, "cka": 1.0, "_square": 1.0, "_variance": 10.0},
        {"cosine": 0.0, "cka": 0.5, "_square": 5.0, "_variance": 10.0},
    ]
    outcome = ReferenceTask().score(rows, None)
    assert (outcome["cosine"].value, outcome["error"].value, outcome["cka"].value) == (0.5, 0.3, 0.75)


def test_size_of_the_real_run():
    assert reference_size(create_encoder(PatchColour(), "bilinear", 3)) == (96, 144)
    assert reference_size(create_encoder(PatchColour(), "bilinear", 1.5)) == (48, 72)


def test_a_backbone_of_one_size_has_no_real_run(folder):
    with pytest.raises(ConfigError, match=r"'toy-vit-fixed' takes \(64, 64\) only"):
        measure(folder, "toy-vit-fixed", "bilinear", 2)


def test_nan_features_are_no_score(folder):
    with pytest.raises(ValueError, match=r"0\.png: the encoder returned NaN"):
        measure(folder, PatchColour(broken=True), "bilinear", 2)
