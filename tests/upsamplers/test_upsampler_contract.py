"""What every registered upsampler promises, whatever its name."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.backbones import create_backbone
from featsharp.errors import ConfigError
from featsharp.upsamplers import UPSAMPLERS, Upsampler, create_upsampler, list_upsamplers, register_upsampler
from featsharp.upsamplers.base import UpsampleFeatures

CHANNELS, PATCH = 16, 4
NAMES = list_upsamplers()
CASES = [(name, factor) for name in NAMES for factor in (1, 2, 3, 4, 6) if name != "identity" or factor == 1]
TRAINABLE = [name for name in NAMES if UPSAMPLERS[name].factory.trainable]


class Width:
    """All that ``create_upsampler`` asks of a backbone."""

    embed_dim = CHANNELS


def build(name: str, factor: int, **options) -> Upsampler:
    return create_upsampler(name, Width(), factor, options=options).eval()


def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour statistics of each patch in random directions, and their mean."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(CHANNELS, 3, PATCH, PATCH, generator=generator)
    features = F.conv2d(images, directions.to(images.dtype), stride=PATCH)
    return features, features.mean((2, 3))


@pytest.mark.parametrize(("name", "factor"), CASES)
def test_shapes_of_odd_non_square_images(name, factor):
    upsampler = build(name, factor)
    image = torch.randn(2, 3, 37, 61)
    with torch.no_grad():
        out = upsampler(image, encode, (3 * PATCH, 5 * PATCH))
    assert isinstance(out, UpsampleFeatures)
    assert out.low_res.shape == (2, CHANNELS, 3, 5)
    assert out.high_res.shape == (2, CHANNELS, 3 * factor, 5 * factor)
    assert out.summary.shape == (2, CHANNELS)
    assert out.high_res.isfinite().all()
    assert upsampler.factor == factor
    assert upsampler.input_upsample_factor in (1, factor)


@pytest.mark.parametrize(("name", "factor"), [case for case in CASES if case[1] < 4])
def test_images_of_a_batch_do_not_mix(name, factor):
    upsampler = build(name, factor)
    image = torch.randn(3, 3, 24, 40)
    with torch.no_grad():
        together, alone = (upsampler(part, encode, (12, 20)) for part in (image, image[1:2]))
    for all_of_it, one in zip(together, alone, strict=True):
        torch.testing.assert_close(all_of_it[1:2], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name, dtype):
    factor = 1 if name == "identity" else 2
    upsampler = build(name, factor)
    image = F.interpolate(torch.randn(1, 3, 5, 6), (24, 32), mode="bicubic").to(dtype)
    with torch.no_grad():
        exact = upsampler(image.float(), encode, (12, 16)).high_res
        out = upsampler.to(dtype)(image, encode, (12, 16)).high_res
    assert out.dtype == dtype
    assert F.cosine_similarity(out.float(), exact).min() > 0.99


@pytest.mark.parametrize("factor", [2, 6])
@pytest.mark.parametrize("name", TRAINABLE)
def test_gradient_reaches_every_parameter(name, factor):
    upsampler = build(name, factor).train()
    out = upsampler(torch.randn(1, 3, 48, 72), encode, (8, 12)).high_res
    (out - torch.randn_like(out)).square().mean().backward()
    dead = [key for key, p in upsampler.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []
    assert all(p.grad.isfinite().all() for p in upsampler.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_trainable_means_parameters(name):
    upsampler = build(name, 1 if name == "identity" else 2)
    assert upsampler.trainable == (sum(p.numel() for p in upsampler.parameters()) > 0)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_passes_to_the_low_resolution_features(name):
    """The bias buffer in ``encode`` learns through this."""
    bias = torch.zeros(1, CHANNELS, 1, 1, requires_grad=True)
    upsampler = build(name, 1 if name == "identity" else 2)
    out = upsampler(torch.randn(1, 3, 24, 24), lambda x: (encode(x)[0] + bias, None), (12, 12))
    assert out.summary is None
    out.high_res.square().sum().backward()
    assert (bias.grad.abs() > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    factor = 1 if name == "identity" else 6
    first, second = build(name, factor), build(name, factor)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    second.load_state_dict(first.state_dict())
    image = torch.randn(1, 3, 48, 36)
    with torch.no_grad():
        assert torch.equal(*(upsampler(image, encode, (8, 12)).high_res for upsampler in (first, second)))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "identity"])
def test_a_map_of_one_token(name):
    with torch.no_grad():
        out = build(name, 2)(torch.randn(1, 3, 9, 7), encode, (PATCH, PATCH))
    assert out.high_res.shape == (1, CHANNELS, 2, 2)
    assert out.high_res.isfinite().all()


@pytest.mark.parametrize("factor", [0, -2, 1.5, "2"])
@pytest.mark.parametrize("name", NAMES)
def test_factors_that_do_not_exist(name, factor):
    with pytest.raises(ConfigError, match=f"whole number of at least 1; got {factor!r}"):
        build(name, factor)


def test_every_upsampler_says_what_it_is():
    for entry in UPSAMPLERS.entries():
        assert entry.description
        assert entry.factory.needs


def test_unknown_names_and_options():
    with pytest.raises(ConfigError, match=r"unknown upsampler 'bilinaer'; did you mean 'bilinear'"):
        build("bilinaer", 2)
    with pytest.raises(ConfigError, match=r"upsampler 'tile': .*'overlapp'"):
        build("tile", 2, overlapp=1)


def test_create_from_a_backbone():
    backbone = create_backbone("toy-vit")
    assert create_upsampler("bilinear", backbone, 2).embed_dim == backbone.embed_dim


def test_registering_makes_a_name():
    @register_upsampler("test-only", "registered by a test")
    class Nearest(Upsampler):
        def forward(self, image, encode, low_res_size):
            low_res, summary = encode(F.interpolate(image, low_res_size))
            return UpsampleFeatures(low_res, low_res.repeat_interleave(2, 2).repeat_interleave(2, 3), summary)

    try:
        out = build("test-only", 2)(torch.randn(1, 3, 8, 8), encode, (8, 8))
        assert out.high_res.shape == (1, CHANNELS, 4, 4)
    finally:
        del UPSAMPLERS._entries["test-only"]
