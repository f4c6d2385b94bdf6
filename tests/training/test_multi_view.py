"""The multi-view objective against cases that can be worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.data.views import ViewConfig, sample_homography
from featsharp.errors import ConfigError
from featsharp.ops.warp import inside, warp
from featsharp.training.objectives.multi_view import (
    MultiViewConfig,
    MultiViewObjective,
    border_weights,
    total_variation,
)

PLAIN = {"downsampler": "area", "uncertainty": False, "border_weight": 1.0}


def objective_of(channels: int = 3, factor: int = 2, **settings: object) -> MultiViewObjective:
    return MultiViewObjective(channels, factor, MultiViewConfig(**{**PLAIN, **settings}))  # type: ignore[arg-type]


def identities(batch: int, views: int) -> Tensor:
    return torch.eye(3).expand(batch, views, 3, 3)


def masks_of(batch: int, views: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Full masks of the base images, at a size that is no multiple of the grid, and of the views."""
    return torch.ones(batch, 1, 5 * grid[0], 7 * grid[1]), torch.ones(batch * views, 1, *grid)


def jitters(batch: int, views: int, grid: tuple[int, int], **settings: object) -> Tensor:
    config = ViewConfig(**{"jitter_zoom": [0.9, 1.5], **settings})  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    matrices = [sample_homography(grid, config, rng) for _ in range(batch * views)]
    return torch.from_numpy(np.stack(matrices)).float().unflatten(0, (batch, views))


def test_analytic_case():
    """X1: identity views of a map that is off by d everywhere cost d^2 (mse) or |d| (l1), whatever the masks hide."""
    grid = (4, 6)
    high_res = torch.randn(2, 3, 8, 12)
    targets = F.avg_pool2d(high_res, 2).repeat_interleave(2, 0) + torch.tensor([0.3, -0.3, 0.3])[:, None, None]
    base_mask, view_masks = masks_of(2, 2, grid)
    view_masks[:, :, :, 3:] = 0
    for distance, expected in (("mse", 0.09), ("l1", 0.3), ("smooth_l1", 0.045)):
        losses = objective_of(distance=distance)(high_res, base_mask, targets, view_masks, identities(2, 2))
        assert losses.total.item() == pytest.approx(expected, rel=1e-5)
        assert losses.reconstruction.item() == pytest.approx(expected, rel=1e-5)
        assert losses.terms["regularizer"].item() == losses.terms["tv"].item() == 0


def test_perfect_prediction_scores_zero():
    """F1: where the backbone says what the warped and pooled map says, nothing is left."""
    grid, homographies = (4, 6), jitters(2, 3, (4, 6))
    high_res = torch.randn(2, 3, 8, 12)
    warped = warp(high_res.repeat_interleave(3, 0), homographies.flatten(0, 1), (8, 12))
    base_mask, view_masks = masks_of(2, 3, grid)
    for name in ("area", "simple"):
        objective = objective_of(downsampler=name, border_weight=2.0)
        losses = objective(high_res, base_mask, objective.downsampler(warped), view_masks, homographies)
        assert losses.total.abs() < 1e-10
        off = objective(high_res + 1, base_mask, objective.downsampler(warped), view_masks, homographies)
        assert off.total > 0.5


def test_masked_places_have_no_influence_at_all():
    grid, homographies = (6, 8), jitters(1, 4, (6, 8), rotation=20.0)
    high_res, targets = torch.randn(1, 3, 12, 16), torch.randn(4, 3, 6, 8)
    base_mask, view_masks = masks_of(1, 4, grid)
    base_mask[..., :20] = 0
    view_masks[1:, :, :2] = 0
    objective = objective_of(border_weight=2.0)
    loss = objective(high_res, base_mask, targets, view_masks, homographies).total
    seen = warp(F.interpolate(base_mask, (12, 16), mode="area").expand(4, -1, -1, -1), homographies[0], grid)
    hidden = (seen < 0.4) | (view_masks == 0) | (inside(homographies[0], grid) == 0)
    assert 0.2 < hidden.float().mean() < 0.9
    changed = torch.where(hidden, 1e3 * torch.randn_like(targets), targets)
    assert torch.equal(objective(high_res, base_mask, changed, view_masks, homographies).total, loss)


def test_views_that_show_little_count_little():
    """The denominator is at least half of all places: a view with one valid token cannot outweigh a full one."""
    grid = (4, 4)
    base_mask, view_masks = masks_of(1, 1, grid)
    high_res, targets = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 4, 4)
    objective = objective_of()
    view_masks[:] = 0
    view_masks[..., 1, 2] = 1
    assert objective(high_res, base_mask, targets, view_masks, identities(1, 1)).total.item() == pytest.approx(1 / 8)
    view_masks[..., :3, :] = 1
    assert objective(high_res, base_mask, targets, view_masks, identities(1, 1)).total.item() == pytest.approx(1)


@pytest.mark.parametrize(("size", "factor"), [((8, 12), 2), ((9, 15), 3), ((6, 6), 1), ((16, 8), 4)])
def test_border_weights_lie_beside_tile_borders(size, factor):
    weights = border_weights(size, factor, 3.0)
    assert weights.shape == (1, 1, *size)
    assert weights.mean().item() == pytest.approx(1)
    rows, cols = (
        {b + side for b in range(n // factor, n, n // factor) for side in (-1, 0)}
        for n in size  # two on either side
    )
    base = weights.min().item()
    for y in range(size[0]):
        for x in range(size[1]):
            beside = factor > 1 and (y in rows or x in cols)
            assert weights[0, 0, y, x].item() == pytest.approx(3 * base if beside else base)
    assert torch.equal(border_weights(size, factor, 1.0), torch.ones(1, 1, *size))


def test_border_weights_scale_the_loss():
    base_mask, view_masks = masks_of(1, 1, (4, 4))
    high_res = torch.zeros(1, 3, 8, 8)
    targets = torch.zeros(1, 3, 4, 4)
    targets[..., 2, :] = 1  # covers rows 4 and 5; row 4 is beside the border of a 2x map
    flat = objective_of()(high_res, base_mask, targets, view_masks, identities(1, 1)).total
    heavy = objective_of(border_weight=4.0)(high_res, base_mask, targets, view_masks, identities(1, 1)).total
    assert heavy > 1.2 * flat


# Uncertainty


def uncertain_case(error: float) -> tuple[MultiViewObjective, list[Tensor]]:
    objective = objective_of(uncertainty=True)
    base_mask, view_masks = masks_of(1, 2, (4, 4))
    targets = torch.full((2, 3, 4, 4), math.sqrt(error))
    return objective, [torch.zeros(1, 3, 8, 8), base_mask, targets, view_masks, identities(1, 2)]


@pytest.mark.parametrize("error", [0.05, 2.0])
def test_uncertainty_settles_at_ln_2e(error):
    """For an error e the cost exp(-u) e + u / 2 is least at u = ln(2 e)."""
    objective, case = uncertain_case(error)
    assert objective.uncertainty is not None
    # The map is all zeros, so the network is a constant: its last layer times gelu of the hidden bias.
    optimizer = torch.optim.Adam(objective.uncertainty.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        objective(*case).total.backward()
        optimizer.step()
    found = objective.uncertainty(case[0])
    assert (found - math.log(2 * error)).abs().max() < 0.03
    losses = objective(*case)
    assert losses.reconstruction.item() == pytest.approx(error, rel=1e-4)
    assert losses.total.item() == pytest.approx(0.5 + math.log(2 * error) / 2, abs=0.01)


def test_uncertainty_starts_without_effect_and_is_no_way_out_for_the_upsampler():
    objective, case = uncertain_case(0.7)
    assert objective.uncertainty is not None
    losses = objective(*case)
    assert losses.total.item() == pytest.approx(0.7, rel=1e-5)
    assert losses.terms["regularizer"].item() == 0
    # With the network switched on, its input still gets no gradient: only the warped prediction does.
    objective.uncertainty.out.weight.data.normal_()
    high_res = torch.randn(1, 3, 8, 8, requires_grad=True)
    losses = objective(high_res, *case[1:])
    weights = torch.exp(-objective.uncertainty(high_res.detach()).detach())
    error = (F.avg_pool2d(high_res, 2) - case[2]).square().mean(1, keepdim=True)
    pooled = warp(weights.expand(2, -1, -1, -1), torch.eye(3).expand(2, 3, 3), (4, 4))
    (expected,) = torch.autograd.grad((pooled * error).mean(), high_res)
    (found,) = torch.autograd.grad(losses.total, high_res)
    assert torch.allclose(found, expected, atol=1e-7)


# Parts


def test_total_variation_counts_steps_only():
    assert total_variation(torch.full((1, 2, 5, 6), 3.0)) == 0
    ramp = torch.arange(6.0).expand(1, 1, 5, 6)  # steps of 1 along x: smooth-L1 of 1 is one half
    assert total_variation(ramp).item() == pytest.approx(0.5)
    base_mask, view_masks = masks_of(1, 1, (4, 4))
    case = (torch.randn(1, 3, 8, 8), base_mask, torch.randn(1, 3, 4, 4), view_masks, identities(1, 1))
    without, losses = objective_of()(*case), objective_of(tv_weight=0.5)(*case)
    assert losses.total.item() == pytest.approx((without.total + 0.5 * losses.terms["tv"]).item())


def test_unknown_distance_lists_the_known():
    with pytest.raises(ConfigError, match="'mse'"):
        objective_of(distance="mes")
