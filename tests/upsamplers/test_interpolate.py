"""The baselines that learn nothing."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.errors import ConfigError
from featsharp.upsamplers.interpolate import Bilinear, Identity


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 6])
def test_bilinear_is_exactly_that_of_torch(factor):
    features = torch.randn(2, 5, 3, 7)
    out = Bilinear(5, factor).upsample(features, torch.zeros(2, 3, 10, 10))
    expected = F.interpolate(features, scale_factor=factor, mode="bilinear", align_corners=False)
    assert torch.equal(out, expected)


def test_identity_returns_the_low_resolution_map():
    features = torch.randn(1, 4, 3, 5)
    image = torch.randn(1, 3, 6, 10)
    out = Identity(4)(image, lambda x: (features, None), (6, 10))
    assert out.low_res is features
    assert out.high_res is features


def test_identity_has_one_factor():
    with pytest.raises(ConfigError, match=r"Identity has factor 1; got 2\. Use 'bilinear'"):
        Identity(4, 2)


def test_guided_upsamplers_see_the_image_at_the_low_resolution_size_once():
    calls = []

    def encode(images):
        calls.append(images.shape)
        return torch.zeros(len(images), 4, 3, 2), torch.ones(len(images), 6)

    out = Bilinear(4, 2)(torch.randn(2, 3, 50, 31), encode, (24, 16))
    assert calls == [(2, 3, 24, 16)]
    assert torch.equal(out.summary, torch.ones(2, 6))
