"""The projection against scikit-learn's PCA, and the way back."""

import numpy as np
import pytest
import torch

from featsharp.errors import InputError
from featsharp.implicit.projection import Projection


def correlated(*shape: int) -> torch.Tensor:
    mixing = torch.randn(shape[1], shape[1]) * torch.logspace(0, -2, shape[1])
    return torch.einsum("cd,bdhw->bchw", mixing.T, torch.randn(shape)) + 3


@pytest.mark.parametrize("dim", [1, 4, 10])
def test_it_keeps_what_a_pca_keeps(dim):
    from sklearn.decomposition import PCA

    features = correlated(3, 10, 5, 7)
    projection = Projection.fit(features, dim)
    rows = features.movedim(1, -1).reshape(-1, 10).double().numpy()
    pca = PCA(dim, svd_solver="full").fit(rows)
    expected = pca.inverse_transform(pca.transform(rows))
    found = projection.restore(projection.project(features)).movedim(1, -1).reshape(-1, 10)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    torch.testing.assert_close(projection.project(features).square().mean(), torch.tensor(1.0))


def test_with_all_components_nothing_is_lost():
    features = correlated(2, 6, 3, 3)
    projection = Projection.fit(features, 128)
    assert projection.basis.shape == (6, 6)
    torch.testing.assert_close(projection.restore(projection.project(features)), features, atol=1e-5, rtol=1e-5)


def test_fewer_tokens_than_channels():
    features = torch.randn(1, 12, 1, 2)
    projection = Projection.fit(features, 12)
    torch.testing.assert_close(projection.restore(projection.project(features)), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projection.basis @ projection.basis.T, torch.eye(12), atol=1e-5, rtol=0)


def test_features_that_never_change():
    features = torch.full((2, 4, 3, 3), 7.0)
    projection = Projection.fit(features, 3)
    assert projection.project(features).abs().max() < 1e-5
    torch.testing.assert_close(projection.restore(torch.zeros(2, 3, 3, 3)), features)


def test_features_that_are_not_finite():
    with pytest.raises(InputError, match="NaN or infinite"):
        Projection.fit(torch.full((1, 4, 3, 3), float("nan")), 3)
