"""Validation looks at the same pictures every time, and changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.builder import create_encoder
from featsharp.errors import DataError
from featsharp.model import SharpEncoder
from featsharp.training.objectives.multi_view import MultiViewConfig, MultiViewObjective
from featsharp.validation import CELL, ValidationSamples, encode_sample, feature_panel


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(5):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
        coarse.resize((140, 100), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    return tmp_path


def parts_of(bias: float = 0.0) -> tuple[SharpEncoder, MultiViewObjective]:
    encoder = create_encoder("toy-vit", "bilinear", 2, bias_buffer=True)
    assert encoder.bias_buffer is not None
    encoder.bias_buffer.buffer.data.normal_(std=bias)
    objective = MultiViewObjective(encoder.embed_dim, 2, MultiViewConfig(downsampler="simple", kernel_size=3))
    return encoder, objective.eval()


def test_two_runs_draw_and_score_the_same_pictures(photos):
    """U10."""
    encoder, objective = parts_of(bias=0.1)
    first = ValidationSamples(str(photos), 2)
    found = first(encoder, objective)
    # Another run draws other training numbers; a later image does not matter either.
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    (photos / "4.png").unlink()
    for samples in (first, ValidationSamples(str(photos), 2)):
        again = samples(encoder, objective)
        assert again.scalars == found.scalars
        assert again.score == found.score
        assert all(torch.equal(again.images[name], image) for name, image in found.images.items())
        assert again.samples == found.samples
    (photos / "0.png").write_bytes((photos / "2.png").read_bytes())
    assert ValidationSamples(str(photos), 2).tag != found.samples
    assert list(found.scalars) == ["val/fidelity_area", "val/fidelity_own", "val/cosine"]
    assert list(found.images) == ["val/features_0", "val/kernel", "val/features_1", "val/bias"]
    assert found.score == found.scalars["val/fidelity_area"]


def test_pictures_show_image_low_resolution_bilinear_and_sharp(photos):
    encoder, objective = parts_of()
    found = ValidationSamples(str(photos), 1)(encoder, objective)
    assert list(found.images) == ["val/features_0", "val/kernel"]  # a bias of zero has nothing to show
    picture = found.images["val/features_0"]
    assert picture.shape == (3, CELL, 4 * CELL)
    assert picture.min() >= 0
    assert picture.max() <= 1
    columns = picture.split(CELL, dim=-1)
    # The encoder is the bilinear one, so its two columns agree, and the coarse one has cells of a whole token.
    assert torch.allclose(columns[2], columns[3], atol=1e-4)
    assert torch.equal(columns[1][:, ::28, ::28].repeat_interleave(28, 1).repeat_interleave(28, 2), columns[1])
    assert torch.equal(feature_panel(encode_sample(encoder, Image.open(photos / "0.png"))), picture)


def test_what_the_objective_learned_is_drawn(photos):
    """Every token's own kernel, their mean, and the uncertainty of each image on one scale; at a fraction too."""
    encoder = create_encoder("toy-vit", "bilinear", 1.5)
    config = MultiViewConfig(downsampler="attention", kernel_size=3, uncertainty=True)
    objective = MultiViewObjective(encoder.embed_dim, 1.5, config).eval()
    objective.uncertainty.out.weight.data.normal_()  # type: ignore[union-attr]
    found = ValidationSamples(str(photos), 2)(encoder, objective)
    assert list(found.images) == [
        "val/features_0", "val/kernel", "val/kernels", "val/features_1", "val/log_variance"
    ]  # fmt: skip
    assert found.images["val/kernel"].shape == (3, 225, 225)  # 3 x 3 squares of 75 pixels
    assert found.images["val/kernels"].shape == (3, 899, 899)  # 8 x 8 tokens with lines of a square between them
    assert found.images["val/log_variance"].shape == (3, 2 * CELL, 2 * CELL)
    assert found.scalars["val/log_variance_low"] < found.scalars["val/log_variance_high"]
    for picture in found.images.values():
        assert picture.min() >= 0
        assert picture.max() <= 1
        assert picture.device.type == "cpu"
    # Another sample, other kernels.
    high_res = encode_sample(encoder, Image.open(photos / "1.png")).high_res
    kernels = objective.downsampler.kernels(torch.nn.functional.interpolate(high_res, (16, 16)))  # type: ignore[union-attr]
    assert kernels is not None
    assert kernels.shape == (1, 8, 8, 3, 3)
    assert torch.allclose(kernels.sum((-1, -2)), torch.ones(1, 8, 8), atol=1e-5)


def test_empty_folder_is_found_before_training(tmp_path):
    with pytest.raises(DataError):
        ValidationSamples(str(tmp_path), 2)
