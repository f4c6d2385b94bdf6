"""Optimiser groups and learning-rate schedule of the published FeatSharp training (arXiv 2502.16025)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.errors import ConfigError, InputError
from featsharp.layers.spectral import SpectralScale
from featsharp.model import SharpEncoder
from featsharp.settings import key
from featsharp.training.objectives import Objective


@dataclass
class RateConfig:
    """Rate and schedule of every run.

    Attributes:
        learning_rate: Of all that has no rate of its own.
        warmup_steps: Linear warm-up from a tenth of the rate, at most a tenth of the run.
        clip_norm: Largest global gradient norm.
    """

    learning_rate: float = key(1e-3, least=0)
    warmup_steps: int = key(100, least=0)
    clip_norm: float = key(5.0, least=0)


@dataclass
class OptimConfig(RateConfig):
    """Rates of an upsampler, its objective and its bias buffer.

    Attributes:
        jbu_learning_rate: Of JBU levels inside FeatSharp; the upsampler "featup" trains at ``learning_rate``.
        spectral_scale: Rate of the learned spectral norms over ``learning_rate``; their weight decay is 0.01.
        uncertainty_learning_rate: Of the uncertainty network.
    """

    jbu_learning_rate: float = key(1e-3, least=0)
    spectral_scale: float = key(0.1, least=0)
    uncertainty_learning_rate: float = key(1e-5, least=0)


def parameter_groups(encoder: SharpEncoder, objective: Objective, config: OptimConfig) -> list[dict[str, object]]:
    """Group all trainable parameters of upsampler, bias buffer and objective, each in exactly one group."""
    special = {id(p): name for name, params in encoder.upsampler.parameter_groups().items() for p in params}
    for module in encoder.upsampler.modules():
        if isinstance(module, SpectralScale):
            special |= {id(p): "spectral" for p in module.parameters()}
    if objective.uncertainty is not None:
        special |= {id(p): "uncertainty" for p in objective.uncertainty.parameters()}
    settings = {
        "main": (config.learning_rate, 0.0),
        "jbu": (config.jbu_learning_rate, 0.0),
        "spectral": (config.learning_rate * config.spectral_scale, 0.01),
        "uncertainty": (config.uncertainty_learning_rate, 0.0),
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    for parameter in [*_encoder_parameters(encoder), *objective.parameters()]:
        if parameter.requires_grad:
            members.setdefault(special.get(id(parameter), "main"), []).append(parameter)
    groups: list[dict[str, object]] = []
    for name, params in members.items():
        rate, decay = settings.get(name, settings["main"])
        if params:
            groups.append({"name": name, "params": params, "lr": rate, "weight_decay": decay})
    return groups


def _encoder_parameters(encoder: SharpEncoder) -> list[nn.Parameter]:
    bias = [] if encoder.bias_buffer is None else encoder.bias_buffer.parameters()
    return [*encoder.upsampler.parameters(), *bias]


def build_optimizer(encoder: SharpEncoder, objective: Objective, config: OptimConfig) -> torch.optim.NAdam:
    """Build NAdam with its default betas over :func:`parameter_groups`.

    Raises:
        ConfigError: For an encoder without anything to train.
    """
    groups = parameter_groups(encoder, objective, config)
    if not any(parameter.requires_grad for parameter in _encoder_parameters(encoder)):
        raise ConfigError(
            "there is nothing to train: this upsampler has no parameters; turn on bias_buffer, or use it untrained "
            "(load_from_file('bilinear-2x', featurizer=...))"
        )
    return torch.optim.NAdam(groups)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: RateConfig, total_steps: int, done_steps: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build a linear warm-up from a tenth of the rate, then a cosine to zero; continues after ``done_steps``."""
    warmup = min(config.warmup_steps, max(1, total_steps // 10))

    def rate(step: int) -> float:
        if step < warmup:
            return 0.1 + 0.9 * step / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate, last_epoch=done_steps - 1)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore the optimiser's state; learning rates and weight decays stay those of the configuration."""
    settings = [(group.get("initial_lr", group["lr"]), group["weight_decay"]) for group in optimizer.param_groups]
    restore_optimizer(optimizer, state)
    for group, (rate, decay) in zip(optimizer.param_groups, settings, strict=True):
        group["initial_lr"] = group["lr"] = rate
        group["weight_decay"] = decay


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore the optimiser's state; ValueError for one that it could not step with."""
    optimizer.load_state_dict(dict(state))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if not isinstance(value, Tensor) or (value.numel() > 1 and value.shape != parameter.shape):
                raise ValueError(f"{name} of the optimiser is not as large as its weights")


def build_scaler(device: torch.device, autocast_dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """Build a scaler of the loss for float16, whose smallest gradients would be zero; disabled for other types."""
    scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype == torch.float16)
    scaler.scale(torch.ones((), device=device))  # creates its tensors
    return scaler


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Sequence[nn.Parameter],
    clip_norm: float,
    step: int,
) -> Tensor:
    """Clip the (scaled) gradients and step; returns their unscaled norm.

    With float16 a gradient that is not finite is no error at first: the step only lowers the scale.

    Args:
        optimizer: Of the parameters.
        scaler: Of the loss.
        parameters: All parameters of the optimiser.
        clip_norm: Largest norm of the gradient.
        step: Its number, for the message.

    Raises:
        InputError: When the gradient is not finite and the scale cannot be lowered. Nothing was changed.
    """
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    if not torch.isfinite(norm) and scaler.get_scale() <= 1:
        raise InputError(f"the gradient of step {step} is not finite; lower the learning rate, or use float32")
    scaler.step(optimizer)
    scaler.update()
    return norm
