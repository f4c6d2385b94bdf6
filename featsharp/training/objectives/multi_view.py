"""The multi-view consistency objective.

The high-resolution map of the base image is warped into each jittered view, pooled to the backbone's grid and compared
with the backbone's features of that view. FeatUp (arXiv 2403.10516), FeatSharp (arXiv 2502.16025).

Shapes: B images, n views per image, C channels, (h, w) low-resolution grid, f factor, F the next whole number from f
upwards, of the grid on which maps are warped and pooled.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.data.views import Views, base_view, render_views
from featsharp.errors import unknown_name
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.ops.views import View
from featsharp.settings import key
from featsharp.training.downsamplers import Downsampler, create_downsampler
from featsharp.training.objectives.base import (
    LinearSamples,
    Losses,
    Objective,
    ObjectiveConfig,
    autocast,
    check_finite,
    keep_autocast,
    register_objective,
    weighted_sum,
)

DISTANCES = {
    "mse": lambda a, b: (a - b).square(),
    "l1": lambda a, b: (a - b).abs(),
    "smooth_l1": lambda a, b: F.smooth_l1_loss(a, b, reduction="none"),
}

# Numbers in the warped maps that the objective holds at once: 512 MiB in float32.
MAX_WARPED_ELEMENTS = 2**27
# Least fraction of a token's pixels that must show image for it to count.
TOKEN_COVERAGE = 0.99


@dataclass
class MultiViewConfig(ObjectiveConfig):
    """Settings of the objective.

    Attributes:
        distance: "mse", "l1" or "smooth_l1", averaged over channels.
        downsampler: "attention", "simple" or "area".
        kernel_size: K of the downsampler.
        uncertainty: Whether to weight errors by a learned uncertainty.
        border_weight: Weight of the rows and columns beside tile borders, relative to the rest.
        tv_weight: Weight of the total variation of the high-resolution map.
    """

    name: str = "multi-view"
    distance: str = "mse"
    downsampler: str = "simple"
    kernel_size: int = key(5, least=1)
    uncertainty: bool = False
    border_weight: float = key(2.0, least=0)
    tv_weight: float = key(0.0, least=0)


@register_objective("multi-view", "match the warped and pooled sharp map to the backbone's features of jittered views")
class MultiViewObjective(Objective[Views]):
    """Comparison of a high-resolution map with the backbone's features of jittered views. Trains every upsampler."""

    config_type = MultiViewConfig
    downsampler: Downsampler
    uncertainty: "UncertaintyNet | None"

    def __init__(self, embed_dim: int, factor: float, config: MultiViewConfig) -> None:
        super().__init__()
        if config.distance not in DISTANCES:
            raise unknown_name("distance", config.distance, DISTANCES)
        self.config = config
        self.factor = factor
        self.whole_factor = math.ceil(factor)
        self.max_warped_elements = MAX_WARPED_ELEMENTS
        self.downsampler = create_downsampler(config.downsampler, embed_dim, self.whole_factor, config.kernel_size)
        self.uncertainty = UncertaintyNet(embed_dim) if config.uncertainty else None

    def forward(
        self, high_res: Tensor, base_mask: Tensor, targets: Tensor, view_masks: Tensor, homographies: Tensor
    ) -> Losses:
        """Compute the losses of one batch; terms are the regularizer of the uncertainty and the total variation.

        Args:
            high_res: [B, C, f*h, f*w], normalised features of the base images.
            base_mask: [B, 1, H, W], 1 where the base image shows image; any size.
            targets: [B*n, C, h, w], normalised features of the views, ordered (image, view).
            view_masks: [B*n, 1, h, w], 1 where a view shows image.
            homographies: [B, n, 3, 3], view to base.
        """
        views = View(homographies.flatten(0, 1))
        small = size_of(targets)
        large = self.whole_factor * small[0], self.whole_factor * small[1]
        prediction = self.downsampler(views.warp(high_res, large))
        valid = tokens_to_compare(base_mask, view_masks, views, large)
        error = DISTANCES[self.config.distance](prediction, targets).mean(1, keepdim=True)
        error = valid * views.warp(self._border_weights(large).to(targets), small, padding_mode="zeros") * error
        # A view that shows little of the base image must not weigh as much as a full one.
        scale = valid.sum((1, 2, 3)).clamp(min=0.5 * valid[0].numel())

        def average(x: Tensor) -> Tensor:
            return (x.sum((1, 2, 3)) / scale).mean()

        reconstruction = average(error)
        weighted, regularizer = reconstruction, reconstruction.new_zeros(())
        if self.uncertainty is not None:
            log_variance = self.uncertainty(high_res.detach())
            weighted = average(views.warp(torch.exp(-log_variance), small) * error)
            regularizer = (log_variance / 2 * resize(base_mask, size_of(high_res))).mean()
        tv = total_variation(high_res) if self.config.tv_weight > 0 else reconstruction.new_zeros(())
        total = weighted + regularizer + self.config.tv_weight * tv
        terms = {"regularizer": regularizer.detach(), "tv": tv.detach()}
        return Losses(total, reconstruction.detach(), terms)

    def backward(
        self,
        encoder: SharpEncoder,
        samples: Views,
        low_res_size: tuple[int, int],
        autocast_dtype: torch.dtype | None = None,
        loss_scale: float = 1.0,
    ) -> Losses:
        """See :meth:`Objective.backward`.

        The losses are differentiated down to a detached leaf of the high-resolution map, as many views at a time as
        memory allows; the gradient is then propagated once through the upsampler. The result equals the gradient of
        all views at once.
        """
        base, base_mask = base_view(samples)
        targets, token_masks = encode_views(encoder, samples, low_res_size)
        encode = keep_autocast(encoder, base)
        with autocast(base, autocast_dtype):
            high_res = encoder.upsampler(encoder.input_conditioner(base), encode, low_res_size).high_res
        high_res = high_res.to(base.dtype)
        leaf = high_res.detach().requires_grad_()
        target_leaf = targets.detach().requires_grad_(targets.requires_grad)
        losses, weights = [], []
        batch, count = samples.homographies.shape[:2]
        for chosen in torch.arange(count, device="cpu").split(self.views_at_once(targets, count)):

            def pick(x: Tensor, chosen: Tensor = chosen) -> Tensor:
                return x.unflatten(0, (batch, count))[:, chosen].flatten(0, 1)

            loss = self(leaf, base_mask, pick(target_leaf), pick(token_masks), samples.homographies[:, chosen])
            check_finite(loss.total)
            weight = len(chosen) / count  # the losses are means over samples
            (loss.total * weight * loss_scale).backward()
            losses.append(loss)
            weights.append(weight)
        if high_res.requires_grad:
            high_res.backward(leaf.grad)
        if targets.requires_grad:
            targets.backward(target_leaf.grad)
        return weighted_sum(losses, weights)

    def linear_samples(
        self, encoder: SharpEncoder, samples: Views, low_res_size: tuple[int, int]
    ) -> Iterator[LinearSamples]:
        """See :meth:`Objective.linear_samples`: area pooling and warping are linear, and the same for all channels."""
        base, base_mask = base_view(samples)
        targets, token_masks = encode_views(encoder, samples, low_res_size)
        maps = encoder.upsampler.linear_maps(encoder.input_conditioner(base), encoder.encode, low_res_size).float()
        small = size_of(targets)
        # Whole cells under every token, also for fractional factors.
        large = self.whole_factor * small[0], self.whole_factor * small[1]
        valid = tokens_to_compare(base_mask, token_masks, samples.jitters, large)
        count = samples.homographies.shape[1]
        for n in range(count):  # one view at a time: all of them would hold n copies of the inputs
            pooled = F.avg_pool2d(View(samples.homographies[:, n]).warp(maps, large), self.whole_factor)
            yield LinearSamples(pooled, targets[n::count], valid[n::count])

    def scalars(self, losses: Losses) -> dict[str, float]:
        """See :meth:`Objective.scalars`; the training fidelity is the inverse of the reconstruction loss."""
        return {**super().scalars(losses), "fidelity/train": 1 / max(losses.reconstruction.item(), 1e-12)}

    def views_at_once(self, targets: Tensor, count: int) -> int:
        """Compute the number of warped copies of a batch of maps that fit ``max_warped_elements``, at least one."""
        warped = self.whole_factor**2 * targets.numel() // count
        return max(1, self.max_warped_elements // warped)

    def _border_weights(self, size: tuple[int, int]) -> Tensor:
        """Compute weights of tile borders, which lie between cells for whole factors only."""
        return border_weights(
            size, self.whole_factor, self.config.border_weight if self.whole_factor == self.factor else 1.0
        )


def encode_views(encoder: SharpEncoder, views: Views, low_res_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Encode every view: features [B*n, C, h, w] and token masks [B*n, 1, h, w]."""
    images, masks = render_views(views, low_res_size)
    features = encoder.encode(encoder.input_conditioner(images)).features
    return features, (resize(masks, size_of(features)) > TOKEN_COVERAGE).to(features.dtype)


def tokens_to_compare(base_mask: Tensor, view_masks: Tensor, views: View, large: tuple[int, int]) -> Tensor:
    """Mask of the tokens of views that show image which the base image shows, too: [B*n, 1, h, w].

    Args:
        base_mask: [B, 1, H, W].
        view_masks: [B*n, 1, h, w], of :func:`encode_views`.
        views: B*n of them.
        large: (H, W) of the high-resolution map.
    """
    small = size_of(view_masks)
    shown = views.warp(resize(base_mask, large), small, padding_mode="zeros") > 0.5
    return shown.to(view_masks) * view_masks * views.inside(small)


class UncertaintyNet(nn.Module):
    """Log variance u of the prediction in every cell; errors are weighted by exp(-u), and u / 2 is added to the loss.

    [B, C, H, W] to [B, 1, H, W], zero at the start. Its input is detached, so that the upsampler cannot learn to be
    uncertain.
    """

    def __init__(self, embed_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(embed_dim, hidden_dim, 5, padding=2, padding_mode="replicate")
        self.out = nn.Conv2d(hidden_dim, 1, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(x)))


def border_weights(size: tuple[int, int], factor: int, weight: float) -> Tensor:
    """Compute weights [1, 1, H, W]: ``weight`` in the two rows or columns at every tile border, scaled to mean 1."""
    out = torch.ones(1, 1, *size, dtype=torch.float32, device="cpu")
    for axis in (2, 3):
        cells = size[axis - 2] // factor
        for border in range(cells, size[axis - 2], cells):
            out.narrow(axis, border - 1, 2).fill_(weight)
    return out / out.mean()


def total_variation(x: Tensor) -> Tensor:
    """Average the smooth-L1 distances of vertical and of horizontal neighbours, and add both."""
    return F.smooth_l1_loss(x[..., 1:, :], x[..., :-1, :]) + F.smooth_l1_loss(x[..., 1:], x[..., :-1])
