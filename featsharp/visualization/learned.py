"""Pictures of modules that are trained beside the upsampler: bias buffer, uncertainty, kernels of the downsampler.

Pictures are float [3, H, W] in [0, 1] on the CPU. Single maps are drawn in viridis, dark for low and yellow for high.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.visualization.colours import colour_map
from featsharp.visualization.panels import panel
from featsharp.visualization.pca import FeaturePCA

# Most kernels of a mosaic in each direction; of more tokens every second, third, ... is drawn.
MAX_KERNELS = 32


def bias_picture(bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Draw a bias buffer [1, C, h, w] in two cells of ``size``, PCA and length (from 0 up): [3, H, 2 * W]."""
    bias = (bias - bias.mean((2, 3), keepdim=True)).detach().cpu().float()
    length = bias[0].norm(dim=0)
    return panel([FeaturePCA(bias)(bias)[0], colour_map(length, 0, length.max().item())], size)


def uncertainty_picture(
    samples: list[tuple[Tensor, Tensor]], value_range: tuple[float, float], size: tuple[int, int]
) -> Tensor:
    """Draw images beside their log variances in cells of ``size``, a row each: [3, n * H, 2 * W].

    Args:
        samples: Image [3, height, width] in [0, 1] and log variance [h, w], n times.
        value_range: Darkest and brightest value; see :func:`middle_range`.
        size: (H, W).
    """
    return torch.cat([panel([image, colour_map(values, *value_range)], size) for image, values in samples], 1)


def middle_range(maps: list[Tensor]) -> tuple[float, float]:
    """Compute the 1st and the 99th percentile of all values of some maps."""
    # Not torch.quantile, which refuses more than 2^24 values.
    values = torch.cat([values.flatten() for values in maps]).sort().values
    last = len(values) - 1
    return values[round(0.01 * last)].item(), values[round(0.99 * last)].item()


def kernel_picture(kernels: Tensor, side: int) -> Tensor:
    """Draw non-negative kernels [rows, cols, K, K] as a mosaic, about ``side`` pixels high or wide.

    All share one scale, from 0 to the largest weight. A weight is a square of whole pixels, with white lines between
    kernels.
    """
    step = max(-(-count // MAX_KERNELS) for count in kernels.shape[:2])
    kernels = kernels[::step, ::step].detach().cpu().float()
    rows, cols, k, _ = kernels.shape
    coloured = colour_map(kernels.permute(0, 2, 1, 3).reshape(rows * k, cols * k), 0, kernels.max().item())
    tiles = F.pad(coloured.reshape(3, rows, k, cols, k), (0, 1, 0, 0, 0, 1), value=1.0)
    mosaic = tiles.reshape(3, rows * (k + 1), cols * (k + 1))[:, :-1, :-1]
    times = max(1, round(side / max(mosaic.shape[1:])))
    return mosaic.repeat_interleave(times, 1).repeat_interleave(times, 2)
