"""The closed-form fit of FeatSharp's linear mix: against scikit-learn, against gradients, against several processes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from featsharp.builder import create_encoder
from featsharp.data.loader import Batch
from featsharp.data.views import ViewConfig, Views, sample_views
from featsharp.errors import ConfigError, DataError
from featsharp.ops.warp import warp
from featsharp.training.distributed import World
from featsharp.training.least_squares import LinearFit, fit_linear
from featsharp.training.objectives.multi_view import (
    MultiViewConfig,
    MultiViewObjective,
    base_view,
    encode_views,
    tokens_to_compare,
)
from featsharp.upsamplers.featsharp import FeatSharp

MULTI_VIEW = MultiViewObjective(32, 2, MultiViewConfig())
ALONE = World(0, 1, torch.device("cpu"))
SIZE = (64, 96)  # of the low-resolution pass
VIEWS = ViewConfig(num_views=3, jitter_zoom=[0.9, 1.6], rotation=8.0, shift=0.15)
LINEAR = {"inputs": ("bilinear", "details"), "attention": False, "ffn": False}


def batch(seed: int, count: int = 2) -> Views:
    """Views of noise with structure at several scales, (128, 192) pixels."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((240, 180))
        fine = rng.integers(-40, 41, (180, 240, 3))
        pixels = (np.asarray(coarse, dtype=np.int64) + fine).clip(0, 255).astype(np.uint8)
        samples.append(sample_views(Image.fromarray(pixels), (2 * SIZE[0], 2 * SIZE[1]), VIEWS, rng))
    return Views(*(torch.stack(parts) for parts in zip(*samples, strict=True)))


def encoder_with(**options):
    torch.manual_seed(0)
    return create_encoder("toy-vit", "featsharp", 2, upsampler_options=options).eval()


def test_the_weight_is_that_of_ridge_regression_around_the_start():
    from sklearn.linear_model import Ridge

    generator = torch.Generator().manual_seed(1)
    upsampler = FeatSharp(8, 2, **LINEAR)
    torch.nn.init.normal_(upsampler.block.weight, generator=generator)
    fit = LinearFit(upsampler, ridge=0.3)
    x = torch.randn(2, 16, 5, 7, generator=generator)
    y = torch.randn(2, 8, 5, 7, generator=generator)
    valid = (torch.rand(2, 1, 5, 7, generator=generator) < 0.6).float()
    fit.add(x, y, valid)
    fit.add(2 * x[:1], y[1:], valid[1:])
    rows = torch.cat([x.permute(0, 2, 3, 1)[valid[:, 0] > 0], 2 * x[:1].permute(0, 2, 3, 1)[valid[1:, 0] > 0]]).double()
    aims = torch.cat([y.permute(0, 2, 3, 1)[valid[:, 0] > 0], y[1:].permute(0, 2, 3, 1)[valid[1:, 0] > 0]]).double()
    start = upsampler.block.weight.detach().double()
    alpha = 0.3 * rows.square().sum().item() / rows.shape[1]
    found = Ridge(alpha=alpha, fit_intercept=False).fit(rows.numpy(), (aims - rows @ start.T).numpy())
    expected = start + torch.from_numpy(found.coef_)
    torch.testing.assert_close(fit.solve(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [LINEAR, {"inputs": ("jbu", "rgb", "tiles")}])
def test_no_gradient_is_left_at_the_solution(options):
    """By the upsampler's own forward pass and autograd; the ridge pulls against the errors."""
    encoder = encoder_with(**options)
    upsampler = encoder.upsampler
    if upsampler.mix is not None:
        for layer in (upsampler.block.attention.proj, upsampler.block.mlp.down):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    start = upsampler.linear_weight.detach().clone()
    views = batch(0)

    def gradient() -> torch.Tensor:
        base, mask = base_view(views)
        targets, token_masks = encode_views(encoder, views, SIZE)
        sharp = upsampler(encoder.input_conditioner(base), encoder.encode, SIZE).high_res
        to_base = views.homographies.flatten(0, 1)
        warped = warp(sharp.repeat_interleave(3, 0), to_base, sharp.shape[-2:])
        valid = tokens_to_compare(mask, token_masks, views.jitters, sharp.shape[-2:])
        assert 0.2 < valid.mean() < 1
        error = (valid * (F.avg_pool2d(warped, 2) - targets).square()).sum()
        return torch.autograd.grad(error, upsampler.linear_weight)[0]

    before = gradient()
    fit = LinearFit(upsampler, ridge=1e-3)
    for rows in MULTI_VIEW.linear_samples(encoder, views, SIZE):
        fit.add(*rows)
    strength = 1e-3 * fit.inputs.diagonal().mean().float()
    fit_linear(encoder, MULTI_VIEW, [Batch(views, [])], 1e-3, SIZE, ALONE)
    pull = 2 * strength * (upsampler.linear_weight.detach() - start)
    assert (gradient() + pull).norm() < 2e-3 * before.norm()
    assert (upsampler.linear_weight - start).norm() > 0.05 * start.norm()


def test_a_strong_ridge_keeps_the_start():
    encoder = encoder_with(**LINEAR)
    start = encoder.upsampler.linear_weight.detach().clone()
    skipped = fit_linear(encoder, MULTI_VIEW, [Batch(batch(1), [("a.jpg", "truncated")])], 1e9, SIZE, ALONE)
    torch.testing.assert_close(encoder.upsampler.linear_weight.detach(), start, atol=1e-6, rtol=0)
    assert skipped == [("a.jpg", "truncated")]


def test_what_cannot_be_fitted_says_so():
    with pytest.raises(ConfigError, match=r"linear_fit.ridge must be above 0; got 0"):
        LinearFit(FeatSharp(8, 2, **LINEAR), 0)
    with pytest.raises(ConfigError, match=r"featsharp with start='mix'"):
        LinearFit(FeatSharp(8, 2, start="published"), 0.1)
    with pytest.raises(DataError, match=r"no view shows enough of its image"):
        LinearFit(FeatSharp(8, 2, **LINEAR), 0.1).solve()
    with pytest.raises(ConfigError, match=r"linear_fit is for upsamplers with a linear_weight.*FeatUp has none"):
        fit_linear(create_encoder("toy-vit", "featup", 2), MULTI_VIEW, [], 0.1, SIZE, ALONE)
