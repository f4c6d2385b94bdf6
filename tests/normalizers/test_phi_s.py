"""PHI-S and its variants: the guarantees of the transform, its precision and its storage."""

import io

import pytest
import torch
from torch import nn

from featsharp.errors import ConfigError, InputError
from featsharp.normalizers import FeatureStatistics, create_normalizer

WIDTHS = (4, 12, 32, 36, 384)
INVERTIBLE = ("phi-s", "phi-s-noalpha", "phi-s-onlyalpha")


def gaussian_maps(channels, shape=(3, 17, 29), seed=0, offset=3.0, spread=0.3):
    """[B, C, H, W] float64 with a random covariance whose channels differ widely, and a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    mixing = torch.randn(channels, channels, **options) * torch.logspace(-2, 1, channels, dtype=torch.float64)
    rows = torch.randn(*shape, channels, **options) @ mixing * spread + offset * torch.randn(channels, **options)
    return rows.movedim(-1, 1).contiguous()


def statistics_of(maps):
    statistics = FeatureStatistics(maps.shape[1])
    statistics.update(maps)
    return statistics


def fitted(name, maps):
    normalizer = create_normalizer(name, maps.shape[1])
    normalizer.fit(statistics_of(maps))
    return normalizer


def rows_of(maps):
    return maps.movedim(1, -1).reshape(-1, maps.shape[1])


@pytest.mark.parametrize("channels", WIDTHS)
def test_every_channel_gets_mean_zero_and_variance_one(channels):
    maps = gaussian_maps(channels)
    rows = rows_of(fitted("phi-s", maps)(maps))
    torch.testing.assert_close(rows.mean(0), torch.zeros_like(rows[0]), rtol=0, atol=2e-6)
    torch.testing.assert_close(rows.var(0), torch.ones_like(rows[0]), rtol=0, atol=2e-5)


def test_vectors_not_seen_in_the_fit_get_about_unit_spread():
    maps = gaussian_maps(32, (8, 20, 30))
    stds = rows_of(fitted("phi-s", maps[:4])(maps[4:])).std(0)
    assert stds.min() > 0.9
    assert stds.max() < 1.1


@pytest.mark.parametrize("channels", WIDTHS)
def test_distances_are_scaled_by_alpha(channels):
    maps = gaussian_maps(channels)
    rows, shuffled = rows_of(maps)[:200], rows_of(maps)[200:400]
    distances = (rows - shuffled).norm(dim=1)
    alpha = float(torch.cov(rows_of(maps).T).diagonal().mean() ** -0.5)
    for name, scale in zip(INVERTIBLE, (alpha, 1.0, alpha), strict=True):
        mapped = rows_of(fitted(name, maps)(maps))
        torch.testing.assert_close((mapped[:200] - mapped[200:400]).norm(dim=1), scale * distances, rtol=1e-5, atol=0)


@pytest.mark.parametrize("channels", WIDTHS)
def test_rotation_is_orthogonal_and_equalises_the_covariance(channels):
    maps = gaussian_maps(channels)
    normalizer = fitted("phi-s", maps)
    rotation = normalizer.rotation.double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(channels).double(), rtol=0, atol=2e-6)
    turned = rotation @ statistics_of(maps).covariance @ rotation.T
    scale = torch.full((channels,), normalizer.variance_scale, dtype=torch.float64)
    torch.testing.assert_close(turned.diagonal(), scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 9), (1, 16, 3)])
@pytest.mark.parametrize("name", INVERTIBLE)
def test_denormalize_inverts(name, shape):
    normalizer = fitted(name, gaussian_maps(36))
    maps = gaussian_maps(36, shape, seed=1).float()
    phi = normalizer.variance_scale**0.5
    restored = normalizer.denormalize(normalizer(maps))
    assert restored.shape == maps.shape
    # Rounding of x itself where the mean is large, and of the rotation everywhere.
    torch.testing.assert_close(restored, maps, rtol=1e-6, atol=1e-5 * phi)
    other_way = normalizer(normalizer.denormalize(maps))
    torch.testing.assert_close(other_way, maps, rtol=1e-5, atol=2e-5)


def test_the_formula_entry_by_entry():
    maps = gaussian_maps(12, (1, 2, 3))
    normalizer = fitted("phi-s", gaussian_maps(12))
    mapped = normalizer(maps)
    for y in range(2):
        for x in range(3):
            centred = maps[0, :, y, x] - normalizer.mean.double()
            expected = normalizer.alpha.double() * (normalizer.rotation.double() @ centred)
            torch.testing.assert_close(mapped[0, :, y, x], expected, rtol=1e-6, atol=1e-6)


def test_noalpha_gives_equal_variances_and_onlyalpha_mean_variance_one():
    maps = gaussian_maps(36)
    variances = rows_of(fitted("phi-s-noalpha", maps)(maps)).var(0)
    torch.testing.assert_close(variances, torch.full_like(variances, variances.mean()), rtol=1e-4, atol=0)
    only = rows_of(fitted("phi-s-onlyalpha", maps)(maps)).var(0)
    torch.testing.assert_close(only.mean().item(), 1.0, rtol=1e-5, atol=0)
    assert only.max() / only.min() > 10


@pytest.mark.parametrize("name", INVERTIBLE)
def test_variance_scale_is_the_mean_channel_variance(name):
    maps = gaussian_maps(12)
    expected = float(rows_of(maps).var(0).mean())
    assert fitted(name, maps).variance_scale == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("width", [7, 50, 52])
def test_widths_without_hadamard_matrix_are_refused_before_any_fit(width):
    for name in ("phi-s", "phi-s-noalpha"):
        with pytest.raises(ConfigError, match=f"order {width} .*phi-s-onlyalpha"):
            create_normalizer(name, width)
    normalizer = fitted("phi-s-onlyalpha", gaussian_maps(width))
    maps = gaussian_maps(width, (1, 3, 4))
    torch.testing.assert_close(normalizer.denormalize(normalizer(maps)), maps, rtol=1e-6, atol=1e-5)


def test_near_singular_covariances_work():
    """Fewer vectors than channels: most eigenvalues are 0 up to rounding, some below."""
    maps = gaussian_maps(36, (1, 2, 5))
    rows = rows_of(fitted("phi-s", maps)(maps))
    torch.testing.assert_close(rows.var(0), torch.ones_like(rows[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5])
def test_features_that_do_not_vary_are_refused(value):
    statistics = FeatureStatistics(4)
    for size in (3, 7, 500):
        statistics.update(torch.full((size, 4), value))
    normalizer = create_normalizer("phi-s", 4)
    with pytest.raises(InputError, match="all 510 vectors are the same"):
        normalizer.fit(statistics)
    assert not normalizer.fitted


def test_fits_that_cannot_work_are_refused():
    normalizer = create_normalizer("phi-s", 4)
    with pytest.raises(InputError, match="4 channels cannot be fitted to statistics of 12"):
        normalizer.fit(FeatureStatistics(12))
    with pytest.raises(InputError, match="at least"):
        normalizer.fit(FeatureStatistics(4))


@pytest.mark.parametrize("name", INVERTIBLE)
def test_use_before_fit_is_refused(name):
    normalizer = create_normalizer(name, 4)
    for use in (normalizer, normalizer.denormalize):
        with pytest.raises(ConfigError, match=f"'{name}' was not fitted; call fit"):
            use(torch.zeros(1, 4, 2, 3))
    with pytest.raises(ConfigError, match="was not fitted"):
        _ = normalizer.variance_scale


@pytest.mark.parametrize("features", [torch.zeros(1, 5, 2, 2), torch.zeros(4, 2, 2), torch.ones(1, 4, 2, 2).long()])
def test_other_inputs_are_refused(features):
    normalizer = fitted("phi-s", gaussian_maps(4))
    with pytest.raises(InputError, match=r"floating features \[B, 4, H, W\]"):
        normalizer(features)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_gradients_pass_both_ways(name):
    normalizer = fitted(name, gaussian_maps(4))
    maps = gaussian_maps(4, (2, 2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(normalizer, (maps,))
    assert torch.autograd.gradcheck(normalizer.denormalize, (maps,))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casting_a_model_around_it_leaves_the_buffers_alone(cast):
    maps = gaussian_maps(12)
    model = nn.Sequential(fitted("phi-s", maps), nn.Conv2d(12, 12, 1))
    before = {key: value.clone() for key, value in model[0].state_dict().items()}
    getattr(model, cast)()
    assert model[1].weight.dtype != torch.float32
    for key, value in model[0].state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key])
    model.to(torch.bfloat16).to("cpu", torch.float16)
    assert torch.equal(model[0].rotation, before["rotation"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computed_in_float32_at_least_and_returned_in_the_dtype_given(dtype):
    """Large means, small spreads: 16-bit arithmetic would lose everything that the features say."""
    maps = gaussian_maps(12, offset=100.0, spread=0.05)
    normalizer = fitted("phi-s", maps)
    given = maps[:1, :, :3, :5].to(dtype)
    mapped = normalizer.to(torch.bfloat16)(given)
    assert mapped.dtype == dtype
    exact = normalizer(given.double())
    assert (mapped.double() - exact).abs().max() <= exact.abs().max() * 2 * max(torch.finfo(dtype).eps, 2e-5)


def test_autocast_around_it_changes_nothing():
    maps = gaussian_maps(32).float()
    normalizer = fitted("phi-s", maps)
    with torch.autocast("cpu", torch.bfloat16):
        mapped, restored = normalizer(maps), normalizer.denormalize(maps)
    assert torch.equal(mapped, normalizer(maps))
    assert torch.equal(restored, normalizer.denormalize(maps))


@pytest.mark.parametrize("name", INVERTIBLE)
def test_state_dict_carries_the_fit(name):
    maps = gaussian_maps(12)
    source = fitted(name, maps)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = create_normalizer(name, 12)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert bool(target.fitted)
    assert torch.equal(target(maps), source(maps))
    assert target.variance_scale == source.variance_scale


def test_state_dict_of_an_unfitted_one_is_unfitted():
    normalizer = fitted("phi-s", gaussian_maps(12))
    normalizer(torch.zeros(1, 12, 2, 2))
    normalizer.load_state_dict(create_normalizer("phi-s", 12).state_dict())
    with pytest.raises(ConfigError, match="was not fitted"):
        normalizer(torch.zeros(1, 12, 2, 2))


def test_the_rotation_is_stored_once():
    keys = {name: set(create_normalizer(name, 12).state_dict()) for name in INVERTIBLE}
    assert keys["phi-s"] == keys["phi-s-noalpha"] == {"mean", "alpha", "rotation", "fitted"}
    assert keys["phi-s-onlyalpha"] == {"mean", "alpha", "fitted"}


def test_fitting_in_inference_mode_leaves_a_trainable_path():
    maps = gaussian_maps(4)
    normalizer = create_normalizer("phi-s", 4)
    with torch.inference_mode():
        normalizer.fit(statistics_of(maps))
    leaf = maps.clone().requires_grad_()
    normalizer(leaf).square().sum().backward()
    assert leaf.grad.isfinite().all()


def test_a_linear_layer_trained_on_top_folds_back():
    """W = phi U H^T W' = phi R^T W', b = phi R^T b' + mu: the map from PHI-S space as one linear layer."""
    maps = gaussian_maps(12)
    normalizer = fitted("phi-s", maps)
    layer = nn.Conv2d(5, 12, 1).double()
    inputs = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    phi, rotation = normalizer.variance_scale**0.5, normalizer.rotation.double()
    weight = phi * rotation.T @ layer.weight.flatten(1)
    bias = phi * rotation.T @ layer.bias + normalizer.mean.double()
    folded = nn.functional.conv2d(inputs, weight[:, :, None, None], bias)
    torch.testing.assert_close(normalizer.denormalize(layer(inputs)), folded, rtol=1e-5, atol=1e-6)
