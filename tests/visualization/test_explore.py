"""What the demo draws, without its page."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans

from featsharp import create_encoder
from featsharp.errors import InputError
from featsharp.visualization.explore import (
    COLOURS,
    Exploration,
    cluster_pictures,
    explore,
    fit_kmeans,
    pca_pictures,
    show,
    similarity_pictures,
    vector_pictures,
)
from featsharp.visualization.pca import FeaturePCA
from featsharp.visualization.similarity import cosine_map


@pytest.fixture(scope="module")
def features() -> Exploration:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)
    return explore(create_encoder("toy-vit", "bilinear", 2), Image.fromarray(pixels))


def test_features_and_costs_are_those_of_the_encoder(features):
    out = create_encoder("toy-vit", "bilinear", 2).encode_image(features.image)
    torch.testing.assert_close(features.low_res, out.low_res)
    torch.testing.assert_close(features.high_res, out.high_res)
    assert features.low_res_cost.seconds > 0
    assert features.high_res_cost.seconds > 0
    assert features.high_res_cost.peak >= features.high_res.nbytes  # the result alone
    assert features.low_res_cost.peak > features.low_res.nbytes


def test_both_pictures_share_a_basis_and_a_scale(features):
    low_res, high_res = pca_pictures(features)
    basis = FeaturePCA(features.low_res)
    assert torch.equal(low_res, basis(features.low_res)[0])
    assert torch.equal(high_res, basis(features.high_res)[0])
    vector = features.low_res[0, :, 2, 3]
    (low_res, high_res), (least, most) = vector_pictures(features, vector)
    cosine = cosine_map(features.low_res, vector[None])[0, 0]
    assert (least, most) == (cosine.min().item(), cosine.max().item())
    assert most == pytest.approx(1, abs=1e-5)
    assert low_res[:, 2, 3].tolist() == pytest.approx([253 / 255, 231 / 255, 37 / 255], abs=1e-3)  # viridis at its end
    assert high_res.shape[1:] == features.high_res.shape[2:]


def test_similarity_is_brightest_at_the_point(features):
    for picture in similarity_pictures(features, (0.26, 0.74)):
        row, column = int(0.26 * picture.shape[1]), int(0.74 * picture.shape[2])
        assert picture[0, row, column] == pytest.approx(253 / 255, abs=1e-3)


def test_clusters_are_those_of_another_library():
    generator = torch.Generator().manual_seed(4)
    centres = torch.nn.functional.normalize(torch.randn(5, 12, generator=generator), dim=1)
    truth = torch.arange(200) % 5
    vectors = 3 * centres[truth] + 0.15 * torch.randn(200, 12, generator=generator)
    fitted = fit_kmeans(vectors, 5)
    labels = (torch.nn.functional.normalize(vectors, dim=1) @ fitted.T).argmax(1)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    other = KMeans(5, n_init=5, random_state=0).fit(unit.numpy()).labels_
    assert len({*zip(labels.tolist(), other.tolist(), strict=True)}) == 5  # the same parts
    assert torch.equal(fit_kmeans(vectors, 5), fitted)
    assert fit_kmeans(torch.ones(4, 3), 3).isfinite().all()  # all alike
    with pytest.raises(InputError, match="6 clusters need as many features; got 5"):
        fit_kmeans(vectors[:5], 6)


def test_a_cluster_has_one_colour_at_both_resolutions(features):
    low_res, high_res = cluster_pictures(features, 3)
    palette = {tuple(colour) for colour in COLOURS[:3]}
    for picture in (low_res, high_res):
        colours = (picture * 255).round().int().flatten(1).T.tolist()
        assert {tuple(colour) for colour in colours} <= palette
    with pytest.raises(InputError, match=r"from 2 to 16; got 1"):
        cluster_pictures(features, 1)
    assert show(low_res, features.image, 300).shape == (3, 180, 300)
