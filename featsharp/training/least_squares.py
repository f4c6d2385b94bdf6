"""The ``linear_weight`` of an upsampler in closed form, before (or instead of) training by steps.

Area pooling and warping are linear and the same for every channel, so the multi-view objective with mean squared errors
is a linear least-squares problem in the weight that mixes the inputs:

    minimise  (sum over tokens |y - W x|^2) + ridge * tokens * s * |W - W0|^2

with x [D] the inputs of a base image, warped and pooled under a token of a view, y [C] the backbone's features of that
token, s the mean square of an input, and W0 the start. One pass over the samples solves it; thanks to the ridge towards
a start that already works a few hundred photographs are enough.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from featsharp.data.loader import Batch, S
from featsharp.errors import ConfigError, DataError
from featsharp.model import SharpEncoder
from featsharp.settings import key
from featsharp.training.distributed import World, add_over_processes
from featsharp.training.objectives.base import Objective
from featsharp.upsamplers.base import Upsampler

logger = logging.getLogger(__name__)


@dataclass
class LinearFitConfig:
    """The fit in closed form.

    Attributes:
        samples: Number of images (with their views) that are used, once each; 0: no fit.
        ridge: Strength of the regularisation towards the start, relative to the mean square of the inputs; above 0.
    """

    samples: int = key(0, least=0)
    ridge: float = key(0.1, least=0)


def check_linear_fit(upsampler: Upsampler, ridge: float) -> Tensor:
    """Return the weight [C, D] of an upsampler that can be fitted in closed form.

    Raises:
        ConfigError: For an upsampler without such a weight, or a ridge that is not above 0: inputs may depend on each
            other.
    """
    weight = upsampler.linear_weight
    if weight is None:
        raise ConfigError(
            f"linear_fit is for upsamplers with a linear_weight, such as learned-views and featsharp with start='mix'; "
            f"this {type(upsampler).__name__} has none; take one of those, or linear_fit.samples=0"
        )
    if not ridge > 0:
        raise ConfigError(f"linear_fit.ridge must be above 0; got {ridge:g}")
    return weight


class LinearFit:
    """Sums over samples that determine the weight: 8 D (D + C) bytes for any number of samples.

    The upsampler's ``linear_weight`` is the start. Raises like :func:`check_linear_fit`.
    """

    def __init__(self, upsampler: Upsampler, ridge: float) -> None:
        self.upsampler, self.ridge = upsampler, ridge
        self.weight = check_linear_fit(upsampler, ridge)
        self.start = self.weight.detach().double().clone()
        out_dim, in_dim = self.start.shape
        self.inputs = self.start.new_zeros(in_dim, in_dim)  # sum of x x^T
        self.targets = self.start.new_zeros(in_dim, out_dim)  # sum of x y^T
        self.tokens = self.start.new_zeros(())

    @torch.no_grad()
    def add(self, inputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add inputs [B, D, h, w] and target features [B, C, h, w] where ``valid`` [B, 1, h, w] is 1."""
        chosen = valid[:, 0] > 0
        x = inputs.permute(0, 2, 3, 1)[chosen]
        y = targets.permute(0, 2, 3, 1)[chosen].to(x.dtype)
        self.inputs += x.T @ x
        self.targets += x.T @ y
        self.tokens += len(x)

    def solve(self) -> Tensor:
        """Compute the weight [C, D] in float64.

        Raises:
            DataError: When no token could be compared.
        """
        if self.tokens == 0:
            raise DataError("no view shows enough of its image to compare; lower views.shift and views.perspective")
        start = self.start.T
        strength = self.ridge * self.inputs.diagonal().mean()
        matrix = self.inputs + strength * torch.eye(len(self.inputs), dtype=start.dtype, device=start.device)
        weight = start + torch.linalg.solve(matrix, self.targets - self.inputs @ start)
        return weight.T


def fit_linear(
    encoder: SharpEncoder,
    objective: Objective[S],
    batches: Iterable[Batch[S]],
    ridge: float,
    low_res_size: tuple[int, int],
    world: World,
) -> list[tuple[str, str]]:
    """Fit the linear weight of the encoder's upsampler to the samples of an objective, over all processes.

    Returns:
        Names of skipped images, and reasons.

    Raises:
        ConfigError: See :func:`check_linear_fit`.
    """
    fit = LinearFit(encoder.upsampler, ridge)
    encoder.eval()
    skipped = []
    with torch.no_grad():
        for samples, problems in batches:
            for rows in objective.linear_samples(encoder, samples.to(world.device), low_res_size):
                fit.add(*rows)
            skipped += problems
    add_over_processes([fit.inputs, fit.targets, fit.tokens], world)
    with torch.no_grad():
        fit.weight.copy_(fit.solve())
    logger.info("linear weight fitted to %d tokens", int(fit.tokens))
    return skipped
