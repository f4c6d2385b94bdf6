"""Columns of a comparison: every encoder, at its own resolution, in the basis of the low-resolution map."""

import numpy as np
import pytest
from PIL import Image

from featsharp.builder import create_encoder
from featsharp.errors import ConfigError
from featsharp.visualization.compare import compare_encoders


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_columns_have_the_aspect_ratio_of_the_image_and_one_basis():
    encoders = {name: create_encoder("toy-vit", name, 2) for name in ("bilinear", "tile")}
    columns = compare_encoders(photo(160, 80), encoders, real=True)
    assert list(columns) == ["image", "low resolution", "real 2x", "bilinear", "tile"]
    # 64 x 64 pixels of area at an aspect ratio of 2 is 48 x 88 with whole patches of 8.
    assert columns["low resolution"].shape == (3, 6, 11)
    assert columns["image"].shape == (3, 96, 176)
    assert all(columns[name].shape == (3, 12, 22) for name in ("real 2x", "bilinear", "tile"))
    assert all(column.min() >= 0 and column.max() <= 1 for column in columns.values())


def test_real_features_are_left_out_where_the_backbone_takes_one_size():
    columns = compare_encoders(photo(64, 64), {"tile": create_encoder("toy-vit-fixed", "tile", 2)}, real=True)
    assert list(columns) == ["image", "low resolution", "tile"]


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ConfigError, match="at least one encoder"):
        compare_encoders(photo(64, 64), {})
