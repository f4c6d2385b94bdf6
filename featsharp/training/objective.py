"""The multi-view consistency objective: what is left of a training step once the features are there.

The high-resolution map of the base image is warped into each jittered view, pooled to the backbone's grid and compared
with what the backbone itself says about that view. FeatUp (arXiv 2403.10516), FeatSharp (arXiv 2502.16025).

Shapes: B images, n views per image, C channels, f factor, (h, w) low-resolution grid.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import unknown_name
from featsharp.ops.resize import resize
from featsharp.ops.warp import inside, warp
from featsharp.training.downsamplers import create_downsampler

DISTANCES = {
    "mse": lambda a, b: (a - b).square(),
    "l1": lambda a, b: (a - b).abs(),
    "smooth_l1": lambda a, b: F.smooth_l1_loss(a, b, reduction="none"),
}


@dataclass
class ObjectiveConfig:
    """Parts of the objective.

    Attributes:
        distance: "mse", "l1" or "smooth_l1", averaged over channels.
        downsampler: "attention", "simple" or "area".
        kernel_size: K of the downsampler.
        uncertainty: Whether to weigh places by a learned uncertainty.
        border_weight: Weight of the rows and columns beside tile borders, relative to the rest.
        tv_weight: Weight of the total variation of the high-resolution map.
    """

    distance: str = "mse"
    downsampler: str = "simple"
    kernel_size: int = 5
    uncertainty: bool = False
    border_weight: float = 2.0
    tv_weight: float = 0.0


class Losses(NamedTuple):
    """Scalars of one step: ``total`` is to be minimised; ``reconstruction`` is unweighted, for comparison."""

    total: Tensor
    reconstruction: Tensor  # mean squared or other distance, without uncertainty; its inverse is the fidelity
    regularizer: Tensor
    tv: Tensor


class MultiViewObjective(nn.Module):
    """Compares a high-resolution map with the backbone's features of jittered views.

    Args:
        embed_dim: C.
        factor: f.
        config: See :class:`ObjectiveConfig`.
    """

    def __init__(self, embed_dim: int, factor: int, config: ObjectiveConfig) -> None:
        super().__init__()
        if config.distance not in DISTANCES:
            raise unknown_name("distance", config.distance, DISTANCES)
        self.config = config
        self.factor = factor
        self.downsampler = create_downsampler(config.downsampler, embed_dim, factor, config.kernel_size)
        self.uncertainty = UncertaintyNet(embed_dim) if config.uncertainty else None

    def forward(
        self, high_res: Tensor, base_mask: Tensor, targets: Tensor, view_masks: Tensor, homographies: Tensor
    ) -> Losses:
        """Losses of one batch.

        Args:
            high_res: [B, C, f*h, f*w], normalised features of the base images.
            base_mask: [B, 1, H, W], 1 where the base image shows image; any size.
            targets: [B*n, C, h, w], normalised features of the views, ordered (image, view).
            view_masks: [B*n, 1, h, w], 1 where a view shows image.
            homographies: [B, n, 3, 3], view to base.
        """
        count = homographies.shape[1]
        large, small = (high_res.shape[-2], high_res.shape[-1]), (targets.shape[-2], targets.shape[-1])
        to_base = homographies.flatten(0, 1)

        def to_views(x: Tensor, size: tuple[int, int], padding_mode: str = "reflection") -> Tensor:
            x = x.expand(len(homographies), -1, -1, -1) if x.shape[0] == 1 else x
            return warp(x.repeat_interleave(count, 0), to_base, size, padding_mode=padding_mode)

        prediction = self.downsampler(to_views(high_res, large))
        mask_large = resize(base_mask, large)
        valid = (to_views(mask_large, small, "zeros") > 0.5).to(targets) * view_masks * inside(to_base, small)
        border = border_weights(large, self.factor, self.config.border_weight).to(targets)
        error = DISTANCES[self.config.distance](prediction, targets).mean(1, keepdim=True)
        error = valid * to_views(border, small, "zeros") * error
        # A view that shows little of the base image must not weigh as much as a full one.
        scale = valid.sum((1, 2, 3)).clamp(min=0.5 * valid[0].numel())

        def average(x: Tensor) -> Tensor:
            return (x.sum((1, 2, 3)) / scale).mean()

        reconstruction = average(error)
        weighted, regularizer = reconstruction, reconstruction.new_zeros(())
        if self.uncertainty is not None:
            log_variance = self.uncertainty(high_res.detach())
            weighted = average(to_views(torch.exp(-log_variance), small) * error)
            regularizer = (log_variance / 2 * mask_large).mean()
        tv = total_variation(high_res) if self.config.tv_weight > 0 else reconstruction.new_zeros(())
        total = weighted + regularizer + self.config.tv_weight * tv
        return Losses(total, reconstruction.detach(), regularizer.detach(), tv.detach())


class UncertaintyNet(nn.Module):
    """Log variance u of the prediction at every place; errors are weighed by exp(-u), u / 2 is the price.

    [B, C, H, W] to [B, 1, H, W], zero at the start. It sees the detached map: an upsampler cannot buy itself off.
    """

    def __init__(self, embed_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(embed_dim, hidden_dim, 5, padding=2, padding_mode="replicate")
        self.out = nn.Conv2d(hidden_dim, 1, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(x)))


def border_weights(size: tuple[int, int], factor: int, weight: float) -> Tensor:
    """[1, 1, H, W]: ``weight`` on the two rows or columns beside every tile border, 1 elsewhere, scaled to mean 1."""
    out = torch.ones(1, 1, *size)
    for axis in (2, 3):
        cells = size[axis - 2] // factor
        for border in range(cells, size[axis - 2], cells):
            out.narrow(axis, border - 1, 2).fill_(weight)
    return out / out.mean()


def total_variation(x: Tensor) -> Tensor:
    """Mean smooth-L1 distance between vertical and between horizontal neighbours."""
    return F.smooth_l1_loss(x[..., 1:, :], x[..., :-1, :]) + F.smooth_l1_loss(x[..., 1:], x[..., :-1])
