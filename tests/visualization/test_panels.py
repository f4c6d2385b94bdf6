"""Pictures reach the file with the shape and the pixels they had."""

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.data.images import image_to_tensor
from featsharp.errors import FeatSharpError
from featsharp.visualization.panels import GAP, panel, save_picture


def test_panel_joins_pictures_with_visible_cells():
    coarse, fine = torch.rand(3, 2, 3), torch.rand(3, 8, 12)
    joined = panel([coarse, fine], (8, 12))
    assert joined.shape == (3, 8, 24)
    assert torch.equal(joined[:, :4, :4], coarse[:, :1, :1].expand(3, 4, 4))
    assert torch.equal(joined[:, :, 12:], fine)


def test_picture_round_trip(tmp_path):
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 5, 7))).float() / 255
    save_picture(picture * 1.0, tmp_path / "deep" / "x.png")
    assert torch.allclose(image_to_tensor(Image.open(tmp_path / "deep" / "x.png")), picture)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.png"]


def test_unwritable_place_is_one_line_and_costs_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(FeatSharpError, match="cannot write") as caught:
        save_picture(torch.zeros(3, 2, 2), tmp_path / "file" / "x.png")
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_captions_stand_above_their_pictures_and_pictures_apart():
    black = torch.zeros(3, 4, 4)
    joined = panel([black, black], (60, 100), ["low resolution", ""])
    line = joined.shape[1] - 60
    assert joined.shape == (3, 60 + line, 200 + GAP)
    assert (joined[:, line:, :100] == 0).all()
    assert (joined[:, :, 100 : 100 + GAP] == 1).all()
    text = joined[:, :line, :100]
    assert text.min() < 0.3  # letters
    assert text.max() == 1
    columns = (text < 0.5).any(0).any(0).nonzero().flatten()
    assert 0 < columns.min() < 30  # as wide as the picture allows
    assert 70 < columns.max() < 99
    assert (joined[:, :line, 100:] == 1).all()


def test_a_caption_too_wide_for_its_picture_costs_no_size():
    assert panel([torch.zeros(3, 2, 2)], (30, 20), ["a very long caption indeed"]).shape[-1] == 20
