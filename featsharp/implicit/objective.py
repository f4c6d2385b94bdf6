"""Agreement of a map with views of its image: the loss of a fit, and scores on views that were held out.

A map is warped to each view, pooled to tokens, and compared with the backbone's features of that view.

FeatUp (arXiv 2403.10516, section 3.1 and appendix). Shapes: n views, K channels, r cells per token, (h, w) tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.ops.resize import size_of
from featsharp.ops.views import View
from featsharp.training.downsamplers import create_downsampler

MAGNITUDE_WEIGHT, TV_WEIGHT, BLUR_WEIGHT = 0.001, 0.05, 0.1
LEAST_SPREAD = 1e-4


class FitLosses(NamedTuple):
    """Scalars of one step: ``total`` is minimised, ``error`` is the mean squared error, for comparison."""

    total: Tensor
    error: Tensor


class FitObjective(nn.Module):
    """Loss of a pooled map, with the error weighted by a learned uncertainty.

    Args:
        dim: K.
        render: r.
        downsampler: Of ``featsharp.training.downsamplers``; its kernel spans two tokens (published: 29 pixels of
            14-pixel tokens).
    """

    def __init__(self, dim: int, render: int, downsampler: str) -> None:
        super().__init__()
        # The magnitude is an additional channel, pooled like the others.
        self.downsampler = create_downsampler(downsampler, dim + 1, render, 2 * render)
        self.uncertainty = nn.Conv2d(dim, 1, 1)
        with torch.no_grad():
            for parameter in self.uncertainty.parameters():
                parameter.mul_(0.1)

    def forward(self, features: Tensor, targets: Tensor, views: View) -> FitLosses:
        """Compute the losses of one step.

        Args:
            features: [1, K, r*h, r*w], the map of the whole image.
            targets: [n, K, h, w], the backbone's features of the views.
            views: n views of the image.
        """
        magnitude = features.norm(dim=1, keepdim=True)
        full = torch.cat([magnitude, features], 1)
        pooled = self.downsampler(views.warp(full, size_of(full)))
        # Tokens whose centre lies in the mirrored margin do not describe the image.
        valid = views.inside(size_of(targets))
        spread = (self.uncertainty(targets) + 0.1).exp().clamp(min=LEAST_SPREAD)
        error = (pooled[:, 1:] - targets).square().mean(1, keepdim=True)
        magnitude_error = (pooled[:, :1] - targets.norm(dim=1, keepdim=True)).square()
        terms = error / (2 * spread.square()) + spread.log() + MAGNITUDE_WEIGHT * magnitude_error
        count = valid.sum().clamp(min=1)
        total = (valid * terms).sum() / count
        total = (
            total + TV_WEIGHT * squared_variation(magnitude) + BLUR_WEIGHT * (features - blur(features)).square().mean()
        )
        return FitLosses(total, ((valid * error).sum() / count).detach())


def squared_variation(x: Tensor) -> Tensor:
    """Compute the mean squared difference of vertical and horizontal neighbours, added; 0 along an axis of one cell."""
    differences = (x.diff(dim=-2), x.diff(dim=-1))
    return sum((d.square().mean() for d in differences if d.numel()), x.new_zeros(()))


def blur(x: Tensor) -> Tensor:
    """Blur with a 5 x 5 Gaussian of sigma 1 over [B, C, H, W], borders repeated."""
    taps = torch.exp(-(torch.arange(-2.0, 3.0, dtype=torch.float32, device=x.device) ** 2) / 2).to(x.dtype)
    taps = (taps / taps.sum()).expand(x.shape[1], 1, 5)
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    rows = F.conv2d(padded, taps[..., None], groups=x.shape[1])
    return F.conv2d(rows, taps[:, :, None], groups=x.shape[1])


class Reconstruction(NamedTuple):
    """Agreement of a map with views; higher is better."""

    fidelity: float  # variance of the targets over the mean squared error
    cosine: float  # mean cosine similarity of tokens


@torch.no_grad()
def score_reconstruction(features: Tensor, targets: Tensor, views: View) -> Reconstruction:
    """Compare a map, warped to each view and averaged over each token, with the features of the view.

    Tokens count where their centre lies inside the image.

    Args:
        features: [1, C, H, W], whole cells per token.
        targets: [n, C, h, w], the backbone's features of the views.
        views: n views of the image.
    """
    grid = size_of(targets)
    valid = views.inside(grid)[:, 0].bool()
    errors, cosines = [], []
    for target, view, mask in zip(targets, views.split(1), valid, strict=True):  # one by one: maps may be wide
        pooled = F.adaptive_avg_pool2d(view.warp(features, size_of(features)), grid)[0]
        errors.append((pooled - target).square().sum(0)[mask])
        cosines.append(F.cosine_similarity(pooled, target, dim=0)[mask])
    seen = targets.movedim(1, -1)[valid]
    variance = (seen - seen.mean(0)).square().sum(1).mean()
    return Reconstruction(float(variance / torch.cat(errors).mean().clamp(min=1e-12)), float(torch.cat(cosines).mean()))
