"""Spectral reparametrisation of linear layers: training in low precision stays stable (AM-RADIO family).

    W_eff = W * (softplus(t) + 0.05) / (sigma(W) + 1e-6)

``sigma`` is the largest singular value, tracked by one power-iteration step per training forward; the scalar ``t`` is
learned and starts where the numerator is 1. A stacked weight (query, key and value) is scaled block by block.
Checkpoints hold the product as a plain weight (:func:`folded_state`), so that inference needs none of this.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featsharp.device import without_autocast

FLOOR = 0.05
EPS = 1e-6


class SpectralScale(nn.Module):
    """Parametrisation that gives each of ``parts`` equal row blocks of a weight a learned spectral norm.

    Only the shape [rows, cols] of ``weight`` and its singular vectors at the start are used.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, parts: int = 1) -> None:
        super().__init__()
        self.parts = parts
        # Two-dimensional, so that the decay rule of the optimiser (which spares vectors) reaches it.
        self.log_scale = nn.Parameter(torch.full((parts, 1), math.log(math.expm1(1 - FLOOR)), dtype=weight.dtype))
        left, _, right = torch.linalg.svd(weight.detach().float().unflatten(0, (parts, -1)), full_matrices=False)
        self.register_buffer("u", left[..., 0].to(weight.dtype).contiguous())
        self.register_buffer("v", right[..., 0, :].to(weight.dtype).contiguous())

    def norms(self, weight: Tensor) -> Tensor:
        """Estimate the largest singular value of each block: [parts]."""
        with without_autocast(weight):
            return torch.einsum("pr,prc,pc->p", self.u, weight.unflatten(0, (self.parts, -1)), self.v)

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self._power_iteration(weight.detach().unflatten(0, (self.parts, -1)))
        return self.scaled(weight)

    def scaled(self, weight: Tensor) -> Tensor:
        """Compute the effective weight with the present estimate, which stays as it is."""
        blocks = weight.unflatten(0, (self.parts, -1))
        scale = (F.softplus(self.log_scale) + FLOOR) / (self.norms(weight) + EPS)[:, None]
        return (blocks * scale[..., None]).flatten(0, 1)

    @torch.no_grad()
    def _power_iteration(self, blocks: Tensor) -> None:
        # New tensors, not in place: autograd may hold the old ones from an earlier forward of the same step.
        with without_autocast(blocks):
            self.u = F.normalize(torch.einsum("prc,pc->pr", blocks, self.v), dim=-1)
            self.v = F.normalize(torch.einsum("prc,pr->pc", blocks, self.u), dim=-1)


def add_spectral(module: nn.Module) -> None:
    """Reparametrise every ``nn.Linear`` inside ``module``, in ``spectral_parts`` row blocks where it has that."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not parametrize.is_parametrized(layer):
            parts = int(getattr(layer, "spectral_parts", 1))
            parametrize.register_parametrization(layer, "weight", SpectralScale(layer.weight, parts))


def folded_state(module: nn.Module) -> dict[str, Tensor]:
    """Compute the state dict with plain effective weights, as a module without reparametrisation takes it.

    The module does not change. (Removing the parametrisations of a deep copy would change it: the copy shares the
    class that torch makes for a parametrised layer, and loses ``weight`` for both.)
    """
    state = dict(module.state_dict())
    for name, scale in module.named_modules():
        if isinstance(scale, SpectralScale):
            prefix = name.removesuffix("0")  # "(layer.)parametrizations.weight."
            raw = state[f"{prefix}original"]
            state = {key: value for key, value in state.items() if not key.startswith(prefix)}
            state[f"{prefix.removesuffix('parametrizations.weight.')}weight"] = scale.scaled(raw).detach()
    return state


def spectral_norms(module: nn.Module) -> dict[str, Tensor]:
    """Learned spectral norms by layer name, each [parts]."""
    return {
        name.removesuffix(".parametrizations.weight.0"): F.softplus(scale.log_scale.detach()).flatten() + FLOOR
        for name, scale in module.named_modules()
        if isinstance(scale, SpectralScale)
    }
