"""Every trained parameter has exactly one group and the rate that is meant for it."""

import math

import pytest
import torch
from torch import nn

from featsharp.builder import create_encoder
from featsharp.errors import ConfigError
from featsharp.layers.spectral import SpectralScale, add_spectral
from featsharp.model import SharpEncoder
from featsharp.training.objectives.multi_view import MultiViewConfig, MultiViewObjective
from featsharp.training.optim import OptimConfig, build_optimizer, build_schedule, parameter_groups

RATES = OptimConfig(
    learning_rate=1.0, jbu_learning_rate=0.3, spectral_scale=0.2, uncertainty_learning_rate=0.05, warmup_steps=10
)


def parts_of(upsampler: str, *, spectral: bool = True) -> tuple[SharpEncoder, MultiViewObjective]:
    encoder = create_encoder("toy-vit", upsampler, 2, bias_buffer=True)
    if spectral:
        add_spectral(encoder.upsampler)
    settings = MultiViewConfig(downsampler="attention", kernel_size=3, uncertainty=True)
    return encoder, MultiViewObjective(encoder.embed_dim, 2, settings)


@pytest.mark.parametrize("upsampler", ["featsharp", "featsharp-progressive", "featup", "bilinear"])
@pytest.mark.parametrize("spectral", [True, False])
def test_every_parameter_is_in_exactly_one_group_with_its_rate(upsampler, spectral):
    encoder, objective = parts_of(upsampler, spectral=spectral)
    rate_of: dict[int, tuple[float, float]] = {}
    for group in parameter_groups(encoder, objective, RATES):
        assert group["params"]
        for parameter in group["params"]:
            assert id(parameter) not in rate_of
            rate_of[id(parameter)] = (group["lr"], group["weight_decay"])
    trained = [(n, p) for n, p in encoder.named_parameters() if n.startswith(("upsampler.", "bias_buffer."))]
    named = [*trained, *((f"objective.{n}", p) for n, p in objective.named_parameters())]
    assert len(rate_of) == len(named)
    scales = {id(p) for m in encoder.modules() if isinstance(m, SpectralScale) for p in m.parameters()}
    assert bool(scales) == (spectral and "featsharp" in upsampler)
    for name, parameter in named:
        expected = (1.0, 0.0)
        if id(parameter) in scales:
            expected = (0.2, 0.01)
        elif "featsharp" in upsampler and ".jbu." in name:
            expected = (0.3, 0.0)
        elif name.startswith("objective.uncertainty."):
            expected = (0.05, 0.0)
        assert rate_of[id(parameter)] == pytest.approx(expected), name


def test_frozen_parameters_are_left_out():
    encoder, objective = parts_of("featup")
    encoder.bias_buffer.requires_grad_(False)
    optimizer = build_optimizer(encoder, objective, RATES)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(encoder.bias_buffer.buffer) not in held


def rates_of_run(total: int, warmup: int) -> list[float]:
    config = OptimConfig(learning_rate=2.0, warmup_steps=warmup)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.learning_rate)
    schedule = build_schedule(optimizer, config, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


def test_schedule_warms_up_and_follows_a_cosine_to_zero():
    rates = rates_of_run(total=1000, warmup=100)
    assert rates[0] == pytest.approx(0.2)
    assert rates[50] == pytest.approx(2 * 0.55)
    assert rates[100] == pytest.approx(2.0)
    assert max(rates) == rates[100]
    assert rates[550] == pytest.approx(1.0)
    assert rates[775] == pytest.approx(1 + math.cos(0.75 * math.pi))
    assert rates[1000] == pytest.approx(0.0, abs=1e-12)
    assert 0 < rates[999] < 1e-4


@pytest.mark.parametrize(("total", "warmup"), [(2, 1), (5, 1), (30, 3)])
def test_short_runs_warm_up_for_at_most_a_tenth(total, warmup):
    rates = rates_of_run(total, warmup=100)
    assert rates[0] == pytest.approx(0.2)
    assert rates[warmup] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_resumed_schedule_continues():
    config = OptimConfig(learning_rate=2.0, warmup_steps=5)
    whole = rates_of_run(60, 5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    build_schedule(optimizer, config, 60)  # what a trainer does before it loads the state of the optimiser
    schedule = build_schedule(optimizer, config, 60, done_steps=23)
    rates = []
    for _ in range(37):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(whole[23:60])


def test_nothing_to_train_is_said():
    objective = MultiViewObjective(32, 2, MultiViewConfig(downsampler="area", uncertainty=False))
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(create_encoder("toy-vit", "bilinear", 2), objective, OptimConfig())
