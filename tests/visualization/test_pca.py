"""Colours of feature maps: one basis, one range, no nonsense drawn."""

import pytest
import torch

from featsharp.errors import InputError
from featsharp.visualization.pca import FeaturePCA


def test_maps_share_one_basis_and_range():
    features = torch.randn(1, 12, 6, 8)
    colours = FeaturePCA(features)
    drawn = colours(features)
    assert drawn.shape == (1, 3, 6, 8)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    # The same vector has the same colour, whatever else is on the map and however large that is.
    other = torch.randn(2, 12, 3, 5)
    other[1, :, 2, 4] = features[0, :, 1, 7]
    assert torch.allclose(colours(other)[1, :, 2, 4], drawn[0, :, 1, 7], atol=1e-6)


def test_components_are_those_of_the_covariance():
    torch.manual_seed(1)
    scales = torch.tensor([5.0, 3.0, 2.0, 0.5, 0.1])[None, :, None, None]
    colours = FeaturePCA(torch.randn(1, 5, 40, 50) * scales + 7)
    assert torch.allclose(colours.components.abs(), torch.eye(5)[:3], atol=0.05)
    assert (colours.components.gather(1, colours.components.abs().argmax(1, keepdim=True)) > 0).all()
    # Outliers beyond the 1st and 99th percentile are clipped, the rest spans the range.
    assert torch.allclose(colours.mean, torch.full((5,), 7.0), atol=0.3)


def test_fitting_twice_gives_the_same_colours():
    features = torch.randn(1, 8, 5, 5)
    assert torch.equal(FeaturePCA(features)(features), FeaturePCA(features.clone())(features))


@pytest.mark.parametrize("channels", [8, 384, 1024])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("components", [0, 1, 2, 3])
def test_rounding_is_not_drawn_as_colour(components, scale, channels):
    features = scale * torch.randn(1, channels, 1, 1).repeat(1, 1, 12, 9)
    for _ in range(components):
        features += scale * torch.randn(1, channels, 1, 1) * torch.rand(1, 1, 12, 9)
    drawn = FeaturePCA(features)(features)
    assert (drawn.std((0, 2, 3)) > 0.1).tolist() == [number < components for number in range(3)]
    assert (drawn[:, components:] == 0.5).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_refused(value):
    features = torch.randn(1, 4, 3, 3)
    features[0, 0, 0, 0] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        FeaturePCA(features)


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (1, 8, 1, 3), (8, 4, 4)])
def test_maps_too_small_for_three_components_are_refused(shape):
    with pytest.raises(InputError, match="C >= 3"):
        FeaturePCA(torch.randn(*shape))
