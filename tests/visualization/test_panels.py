"""Pictures reach the file with the shape and the pixels they had."""

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.data.images import image_to_tensor
from featsharp.errors import FeatSharpError
from featsharp.visualization.panels import panel, save_picture


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
