"""The quick protocol of boundaries: ridges of the change of features, and people's boundaries near them.

The change at a cell is the sum over both axes of 1 - cosine between its neighbours on either side, at half of the
picture's resolution. A pixel is predicted where it is about as large as the largest change next to it, and its rank
among all pixels of the picture is above a threshold, so that thresholds mean the same for every backbone and upsampler.
A pixel counts as right where the other side has any within the tolerance: thick edges are not punished, as they are by
one-to-one matching.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import InputError, MissingDependencyError
from featsharp.ops.resize import resize

# Thresholds on the rank, and the tolerance as a share of the picture's diagonal.
LOWEST, HIGHEST, THRESHOLDS = 0.02, 0.98, 25
TOLERANCE = 0.01
# Share of annotators who drew a pixel for it to be a boundary.
AGREEMENT = 0.3
# Share of the largest change of the 3 x 3 pixels around a pixel at which it belongs to a ridge.
_PEAK = 0.98


class Ridges(NamedTuple):
    """Predicted boundaries of a picture, [H, W] each."""

    ridge: np.ndarray  # bool
    rank: np.ndarray  # float32 in [0, 1): the share of pixels with a smaller change


def find_ridges(features: Tensor, size: tuple[int, int]) -> Ridges:
    """Find the ridges of the change of a feature map [C, h, w] that covers a picture of ``size`` (H, W)."""
    height, width = size[0] // 2, size[1] // 2
    if min(height, width) < 3:
        raise InputError(f"ridges need a picture of at least 6x6 pixels; got {size[0]}x{size[1]}")
    cells = F.normalize(resize(F.normalize(features[None].float(), dim=1), (height, width)), dim=1)[0]
    change = torch.zeros(height, width, dtype=torch.float32, device=cells.device)
    change[:, 1:-1] += 1 - (cells[:, :, 2:] * cells[:, :, :-2]).sum(0)
    change[1:-1] += 1 - (cells[:, 2:] * cells[:, :-2]).sum(0)
    change = resize(change[None, None], size)[0, 0]
    rank = change.flatten().argsort().argsort().float().reshape(size) / change.numel()
    ridge = change >= _PEAK * F.max_pool2d(change[None, None], 3, 1, 1)[0, 0]
    return Ridges(ridge.cpu().numpy(), rank.cpu().numpy())


def agreed_boundaries(humans: Sequence[np.ndarray]) -> np.ndarray:
    """Combine the maps of annotators [H, W] bool to the pixels that at least 30 % of them drew."""
    return np.mean(humans, axis=0) >= AGREEMENT


def count_near(ridges: Ridges, human: np.ndarray, thresholds: Sequence[float], tolerance: float) -> np.ndarray:
    """Count pixels at each threshold.

    Args:
        ridges: Predicted.
        human: [H, W] bool.
        thresholds: On the rank.
        tolerance: In pixels.

    Returns:
        [thresholds, 4] int64: predicted pixels near a human one, predicted pixels, human pixels near a predicted one,
        human pixels.

    Raises:
        MissingDependencyError: Without scipy.
    """
    near = _is_near(human, tolerance)
    rows = []
    for threshold in thresholds:
        predicted = ridges.ridge & (ridges.rank > threshold)
        reached = human & _is_near(predicted, tolerance)
        rows.append(((predicted & near).sum(), predicted.sum(), reached.sum(), human.sum()))
    return np.array(rows, dtype=np.int64)


def _is_near(pixels: np.ndarray, tolerance: float) -> np.ndarray:
    """Mark the pixels [H, W] that have one of ``pixels`` within the tolerance; none where there are none."""
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise MissingDependencyError(
            "boundaries by the quick protocol need the package scipy: pip install 'featsharp[eval]'"
        ) from error
    near: np.ndarray = distance_transform_edt(~pixels) <= tolerance
    return near & pixels.any()
