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
from featsharp.validation import CELL, ValidationSamples, feature_panel


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
    assert list(found.scalars) == ["val/fidelity_area", "val/fidelity_own", "val/cosine"]
    assert list(found.images) == ["val/features_0", "val/features_1", "val/bias"]
    assert found.score == found.scalars["val/fidelity_area"]


def test_pictures_show_image_low_resolution_bilinear_and_sharp(photos):
    encoder, objective = parts_of()
    found = ValidationSamples(str(photos), 1)(encoder, objective)
    assert list(found.images) == ["val/features_0"]  # a bias of zero has nothing to show
    picture = found.images["val/features_0"]
    assert picture.shape == (3, CELL, 4 * CELL)
    assert picture.min() >= 0
    assert picture.max() <= 1
    columns = picture.split(CELL, dim=-1)
    # The encoder is the bilinear one, so its two columns agree, and the coarse one has cells of a whole token.
    assert torch.allclose(columns[2], columns[3], atol=1e-4)
    assert torch.equal(columns[1][:, ::28, ::28].repeat_interleave(28, 1).repeat_interleave(28, 2), columns[1])
    assert torch.equal(feature_panel(encoder, Image.open(photos / "0.png")), picture)


def test_empty_folder_is_found_before_training(tmp_path):
    with pytest.raises(DataError):
        ValidationSamples(str(tmp_path), 2)
