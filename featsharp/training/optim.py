"""Optimiser groups and learning-rate schedule of the published FeatSharp training (arXiv 2502.16025)."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from featsharp.errors import ConfigError
from featsharp.layers.spectral import SpectralScale
from featsharp.training.objectives import Objective
from featsharp.upsamplers.featsharp import FeatSharp
from featsharp.upsamplers.featup import JBULevel


@dataclass
class OptimConfig:
    """Rates and schedule.

    Attributes:
        learning_rate: Of upsampler, downsampler and bias buffer.
        jbu_learning_rate: Of JBU levels inside FeatSharp; a stack on its own trains at ``learning_rate``.
        spectral_scale: Rate of the learned spectral norms, as a part of ``learning_rate``; their weight decay is 0.01.
        uncertainty_learning_rate: Of the uncertainty network.
        warmup_steps: Linear warm-up from a tenth of the rate, at most a tenth of the run.
        clip_norm: Largest global gradient norm.
    """

    learning_rate: float = 1e-3
    jbu_learning_rate: float = 1e-3
    spectral_scale: float = 0.1
    uncertainty_learning_rate: float = 1e-5
    warmup_steps: int = 100
    clip_norm: float = 5.0


def parameter_groups(encoder_parts: nn.Module, objective: Objective, config: OptimConfig) -> list[dict[str, object]]:
    """Groups of every trainable parameter, each in exactly one.

    Args:
        encoder_parts: Holds the upsampler and the bias buffer.
        objective: With the parameters that it has itself, of a downsampler or an uncertainty network.
    """
    special: dict[int, str] = {}
    for module in encoder_parts.modules():
        if isinstance(module, SpectralScale):
            special |= {id(p): "spectral" for p in module.parameters()}
        if isinstance(module, FeatSharp):
            levels = (m for m in module.modules() if isinstance(m, JBULevel))
            special |= {id(p): "jbu" for level in levels for p in level.parameters()}
    if objective.uncertainty is not None:
        special |= {id(p): "uncertainty" for p in objective.uncertainty.parameters()}
    settings = {
        "main": (config.learning_rate, 0.0),
        "jbu": (config.jbu_learning_rate, 0.0),
        "spectral": (config.learning_rate * config.spectral_scale, 0.01),
        "uncertainty": (config.uncertainty_learning_rate, 0.0),
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    for parameter in [*encoder_parts.parameters(), *objective.parameters()]:
        if parameter.requires_grad:
            members[special.get(id(parameter), "main")].append(parameter)
    return [
        {"name": name, "params": params, "lr": settings[name][0], "weight_decay": settings[name][1]}
        for name, params in members.items()
        if params
    ]


def build_optimizer(encoder_parts: nn.Module, objective: Objective, config: OptimConfig) -> torch.optim.NAdam:
    """NAdam with its default betas over :func:`parameter_groups`."""
    groups = parameter_groups(encoder_parts, objective, config)
    if not any(parameter.requires_grad for parameter in encoder_parts.parameters()):
        raise ConfigError(
            "there is nothing to train: this upsampler has no parameters; turn on bias_buffer, or use it untrained "
            "(load_from_file('bilinear-2x', featurizer=...))"
        )
    return torch.optim.NAdam(groups)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int, done_steps: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from a tenth of the rate, then a cosine to zero at the last step; goes on after ``done_steps``."""
    warmup = min(config.warmup_steps, max(1, total_steps // 10))

    def rate(step: int) -> float:
        if step < warmup:
            return 0.1 + 0.9 * step / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate, last_epoch=done_steps - 1)
