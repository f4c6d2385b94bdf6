"""Views: crops by hand, order of images and views, and the way back."""

import pytest
import torch

from featsharp.errors import InputError
from featsharp.ops.views import View


def test_a_crop_shows_the_half_around_its_centre_mirrored():
    base = torch.arange(8.0).expand(1, 1, 4, 8)
    crop = View.crop(2, (0.5, 0))
    assert torch.equal(crop.warp(base, (2, 4))[0, 0, 0], torch.tensor([4.0, 5.0, 6.0, 7.0]))
    mirrored = View.crop(2, (0.5, 0), flip=True)
    assert torch.equal(mirrored.warp(base, (2, 4))[0, 0, 0], torch.tensor([7.0, 6.0, 5.0, 4.0]))
    outside = View.crop(2, (1.0, 0))
    assert torch.equal(outside.inside((1, 4))[0, 0, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_views_are_ordered_by_image():
    base = torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 4, 4)
    views = View(torch.cat([View.crop(zoom, (0, 0)).to_base for zoom in (1, 2, 3, 1, 2, 3)]))
    assert views.warp(base, (2, 2))[:, 0, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert [len(group) for group in views.split(4)] == [4, 2]
    assert torch.equal(views[torch.tensor([4])].to_base, View.crop(2, (0, 0)).to_base)
    with pytest.raises(InputError, match="6 views cannot be of 4 base images"):
        views.warp(torch.zeros(4, 1, 2, 2), (2, 2))


def test_the_inverse_brings_a_view_back():
    base = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    view = View(View.crop(0.5, (0.0, 0.0), flip=True).to_base.double())  # sees the base and as much around it
    large = view.warp(base, (16, 16))
    torch.testing.assert_close(view.inverse().warp(large, (8, 8)), base)
