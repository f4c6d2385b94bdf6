"""The table of normalizers, and those that need no statistics."""

import pytest
import torch
from torch import nn

from featsharp.errors import ConfigError, InputError
from featsharp.normalizers import FeatureStatistics, Normalizer, create_normalizer, list_normalizers

NAMES = ["layernorm", "none", "phi-s", "phi-s-noalpha", "phi-s-onlyalpha"]


def test_names_build_what_they_say():
    assert [entry.name for entry in list_normalizers()] == NAMES
    for entry in list_normalizers():
        normalizer = create_normalizer(entry.name, 12)
        assert isinstance(normalizer, Normalizer)
        assert (normalizer.name, normalizer.embed_dim) == (entry.name, 12)
        assert entry.description
        assert "\n" not in entry.description


def test_unknown_names_and_empty_widths_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'phi-s'"):
        create_normalizer("phis", 12)
    for name in ("none", "phi-s", "layernorm"):
        with pytest.raises(ConfigError, match="embed_dim=0"):
            create_normalizer(name, 0)


@pytest.mark.parametrize("channels", [5, 12])
def test_layernorm_equals_the_formula(channels):
    features = torch.randn(2, channels, 3, 5, dtype=torch.float64) * 4 + 2
    normalizer = create_normalizer("layernorm", channels)
    with torch.no_grad():
        normalizer.weight.copy_(torch.linspace(0.5, 2, channels))
        normalizer.bias.copy_(torch.linspace(-1, 1, channels))
    mean, variance = features.mean(1, keepdim=True), features.var(1, correction=0, keepdim=True)
    scaled = (features - mean) / (variance + 1e-5).sqrt()
    weight, bias = normalizer.weight.double()[:, None, None], normalizer.bias.double()[:, None, None]
    torch.testing.assert_close(normalizer(features), scaled * weight + bias)


def test_layernorm_trains_and_has_no_inverse():
    normalizer = create_normalizer("layernorm", 4)
    normalizer(torch.randn(1, 4, 2, 3)).square().mean().backward()
    assert normalizer.weight.grad is not None
    assert normalizer.bias.grad is not None
    assert not normalizer.invertible
    with pytest.raises(ConfigError, match=r"'layernorm' has no inverse.*denormalize=False"):
        normalizer.denormalize(torch.zeros(1, 4, 2, 3))


def test_layernorm_keeps_the_dtype_after_a_cast():
    model = nn.Sequential(create_normalizer("layernorm", 4)).to(torch.bfloat16)
    features = torch.randn(1, 4, 2, 3, dtype=torch.bfloat16)
    assert model(features).dtype == torch.bfloat16
    assert model(features.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_none_is_the_identity_both_ways(dtype):
    normalizer = create_normalizer("none", 7)
    features = torch.randn(2, 7, 3, 5, dtype=dtype)
    assert torch.equal(normalizer(features), features)
    assert torch.equal(normalizer.denormalize(features), features)
    with pytest.raises(InputError, match=r"\[B, 7, H, W\]"):
        normalizer(torch.zeros(1, 8, 3, 3))


@pytest.mark.parametrize("name", ["none", "layernorm"])
def test_those_without_fit_can_still_learn_the_variance_scale(name):
    normalizer = create_normalizer(name, 4)
    assert not normalizer.needs_fit
    with pytest.raises(ConfigError, match="was not fitted"):
        _ = normalizer.variance_scale
    rows = torch.randn(300, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 0.1])
    statistics = FeatureStatistics(4)
    statistics.update(rows)
    normalizer.fit(statistics)
    restored = create_normalizer(name, 4)
    restored.load_state_dict(normalizer.state_dict())
    assert restored.variance_scale == pytest.approx(float(rows.var(0).mean()), rel=1e-6)
