"""Similarity maps: the cosine of every feature with one of the map, or with vectors of its space such as text."""

import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import ConfigError, InputError
from featsharp.visualization.colours import colour_map


def cosine_map(features: Tensor, vectors: Tensor) -> Tensor:
    """Compute the cosines of features [B, C, h, w] with vectors [N, C]: [B, N, h, w] from -1 to 1, float32.

    Raises:
        InputError: For vectors of another length.
    """
    if vectors.ndim != 2 or features.ndim != 4 or vectors.shape[1] != features.shape[1]:
        raise InputError(
            f"similarity compares features [B, C, h, w] with vectors [N, C]; got {tuple(features.shape)} and "
            f"{tuple(vectors.shape)}"
        )
    unit = F.normalize(vectors.float(), dim=1).to(features.device)
    # Divided by their lengths afterwards, without a copy of a map that may be large.
    products = F.conv2d(features.float(), unit[:, :, None, None])
    return products / features.float().norm(dim=1, keepdim=True).clamp(min=1e-12)


def self_similarity(features: Tensor, at: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Compute the cosine of every feature with the one of the cell that holds the point ``at``.

    Args:
        features: [1, C, h, w].
        at: (y, x) in [0, 1] of the picture, (0, 0) its top left corner.

    Returns:
        [h, w] from -1 to 1, float32; 1 at the cell itself.

    Raises:
        ConfigError: For a point outside of the picture.
        InputError: For another shape, or NaN and infinite features.
    """
    if not all(0 <= coordinate <= 1 for coordinate in at):
        raise ConfigError(f"the point is (y, x) from 0 to 1 of the picture; got {at[0]:g},{at[1]:g}")
    if features.ndim != 4 or len(features) != 1:
        raise InputError(f"self-similarity takes one map [1, C, h, w]; got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise InputError("cannot draw features with NaN or infinite values")
    row, column = (
        min(int(coordinate * side), side - 1) for coordinate, side in zip(at, features.shape[-2:], strict=True)
    )  # the last cell includes its right and lower border
    return cosine_map(features, features[:, :, row, column])[0, 0]


def similarity_picture(similarity: Tensor, value_range: tuple[float, float] | None = None) -> Tensor:
    """Draw a map [h, w] in viridis, [3, h, w], dark and bright at the range, by default its own extremes."""
    low, high = value_range or (similarity.min().item(), similarity.max().item())
    return colour_map(similarity, low, high)
