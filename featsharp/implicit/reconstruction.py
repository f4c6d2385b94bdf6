"""How well a map of an image explains what the backbone says about views of it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.ops.warp import inside, warp


class Reconstruction(NamedTuple):
    """Agreement of a map with views; higher is better."""

    fidelity: float  # variance of the targets over the mean squared error
    cosine: float  # mean cosine similarity of tokens


@torch.no_grad()
def reconstruction(features: Tensor, targets: Tensor, homographies: Tensor) -> Reconstruction:
    """Compare a map, seen as each view and pooled by the mean over each token, with the features of the view.

    Args:
        features: [1, C, H, W], whole cells per token.
        targets: [n, C, h, w], the backbone's features of the views.
        homographies: [n, 3, 3], view to image.

    Tokens count where their centre lies inside the image.
    """
    grid = (targets.shape[-2], targets.shape[-1])
    large = (features.shape[-2], features.shape[-1])
    valid = inside(homographies, grid)[:, 0].bool()
    errors, cosines = [], []
    for target, homography, mask in zip(targets, homographies, valid, strict=True):  # one by one: maps may be wide
        pooled = F.adaptive_avg_pool2d(warp(features, homography[None], large), grid)[0]
        errors.append((pooled - target).square().sum(0)[mask])
        cosines.append(F.cosine_similarity(pooled, target, dim=0)[mask])
    seen = targets.movedim(1, -1)[valid]
    variance = (seen - seen.mean(0)).square().sum(1).mean()
    return Reconstruction(float(variance / torch.cat(errors).mean().clamp(min=1e-12)), float(torch.cat(cosines).mean()))
