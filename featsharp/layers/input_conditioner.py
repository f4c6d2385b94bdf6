"""Whitening of pixels, the first step of every encoder."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.errors import ConfigError, InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Of the three colours.
Whitening = tuple[float, ...]


def three_numbers(values: Any, *, positive: bool) -> Whitening | None:
    """Return values as three finite numbers, above 0 where ``positive``; None for others."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return None
    valid = len(numbers) == 3 and all(math.isfinite(n) and (n > 0 or not positive) for n in numbers)
    return numbers if valid else None


def check_whitening(mean: Any, std: Any, owner: str = "") -> tuple[Whitening, Whitening]:
    """Return the mean and deviation of pixels in [0, 1] as tuples; ConfigError, with the owner, for other values."""
    means, deviations = three_numbers(mean, positive=False), three_numbers(std, positive=True)
    of = f" of {owner}" if owner else ""
    if means is None or deviations is None:
        raise ConfigError(
            f"mean and std{of} are three numbers each, those of std above 0; got mean={mean!r}, std={std!r}"
        )
    if max(map(abs, means)) > 1:
        raise ConfigError(
            f"mean and std{of} are those of pixels in [0, 1]; got mean={mean!r}, std={std!r}. Divide both by 255 where "
            "they are for 0..255"
        )
    return means, deviations


class InputConditioner(nn.Module):
    """Whitening of pixels in [0, 1], like torchvision's ``Normalize``: ``(x - mean) / std`` per channel.

    It warns once about input that looks whitened already (values outside of [0, 1]). It holds no tensors, so it works
    in the processes of a data loader whatever device the encoder is on.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self._warned = False

    def forward(self, images: Tensor) -> Tensor:
        """[..., 3, H, W] in [0, 1], floating point, to the same shape and dtype."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            given = getattr(images, "dtype", type(images).__name__)
            raise InputError(f"input_conditioner takes a tensor of pixels in [0, 1]; got {given}, divide by 255 first")
        # On a GPU this check would make the host wait.
        if (
            not self._warned
            and images.device.type == "cpu"
            and images.numel()
            and (images.amin() < -0.01 or images.amax() > 1.01)
        ):
            warnings.warn(
                f"input_conditioner got values from {images.amin():.2f} to {images.amax():.2f}; it expects pixels in "
                "[0, 1]. Are the images already whitened, or in 0..255?",
                stacklevel=2,
            )
            self._warned = True
        return (images - self._constants(self.mean, images)) / self._constants(self.std, images)

    def invert(self, images: Tensor) -> Tensor:
        """Whitened images back to pixels in [0, 1]."""
        return images * self._constants(self.std, images) + self._constants(self.mean, images)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"

    @staticmethod
    def _constants(values: tuple[float, ...], images: Tensor) -> Tensor:
        return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]
