"""Guidance: the image at the grid that a guided upsampler needs it on."""

import math

from torch import Tensor

from featsharp.errors import ConfigError
from featsharp.ops.resize import average, resize


def pool_guidance(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Average an image [B, 3, height, width] over the cells of a grid (h, w), or enlarge it: [B, 3, h, w]."""
    if image.shape[-2] >= size[0] and image.shape[-1] >= size[1]:
        return average(image, size)
    return resize(image, size)


def shrink_guidance(image: Tensor, size: tuple[int, int], scale: float | None) -> Tensor:
    """Shrink an image larger than ``scale`` times a grid of ``size`` (h, w) to that; None: leave it as it is."""
    if scale is None:
        return image
    # Lengths that a graph leaves open stay whole numbers.
    height, width = (max(1, int(scale) * side if scale == int(scale) else round(scale * side)) for side in size)
    return resize(image, (min(image.shape[2], height), min(image.shape[3], width)))


def check_guidance_scale(scale: float | None) -> float | None:
    """Return ``scale``; raise ConfigError unless it is None or a positive number."""
    if scale is not None and not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise ConfigError(f"guidance_scale must be a positive number, or None for the image as it is; got {scale!r}")
    return scale
