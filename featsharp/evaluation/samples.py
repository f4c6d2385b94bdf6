"""What the evaluation tasks share: images in, feature maps in the backbone's own space out, intervals over images."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from featsharp.data.sources import open_source, try_decode
from featsharp.errors import ConfigError, DataError, InputError
from featsharp.model import SharpEncoder

logger = logging.getLogger(__name__)


class Estimate(NamedTuple):
    """A number and its 95 % interval over images."""

    value: float
    low: float
    high: float


class ImageSet:
    """The readable images of a folder or tar, by name; what cannot be read is listed in ``skipped``."""

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self._source = open_source(folder)
        self._limit = limit
        self.folder = str(folder)
        self.skipped: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[tuple[str, Image]]:
        """Name and RGB picture of each; the order is that of the names."""
        self.skipped = [(problem, "damaged shard") for problem in self._source.problems]
        found = 0
        for index in range(len(self._source)):
            if found == self._limit:
                return
            name = self._source.name(index)
            image = try_decode(name, partial(self._source.read, index), self.skipped)
            if image is None:
                logger.warning("%s skipped: %s", *self.skipped[-1])
                continue
            found += 1
            yield name, image
        if found == 0:
            raise DataError(f"{self.folder} holds no readable image; the first problem: {self.skipped[0][1]}")


def encode_raw(encoder: SharpEncoder, images: Tensor) -> Tensor:
    """What the backbone itself says about whitened images, [B, C, h, w] float32, in its own space.

    Where the normalizer has no inverse (LayerNorm), here and in :func:`predict_raw`: in normalised space.
    """
    features = encoder.backbone(images).features.float()
    if not torch.isfinite(features).all():
        raise InputError(
            f"backbone {encoder.backbone.name!r} returned NaN or infinite features for {len(images)} image(s); is half "
            "precision too narrow for it?"
        )
    return features if encoder.normalizer.invertible else encoder.normalizer(features)


def predict_raw(
    encoder: SharpEncoder, images: Tensor, low_res_size: tuple[int, int], *, positional: bool = True
) -> Tensor:
    """High-resolution features of whitened images in the backbone's own space, [B, C, H, W], float32.

    Args:
        encoder: In eval mode.
        images: [B, 3, h, w].
        low_res_size: (h, w) in pixels of the low-resolution pass.
        positional: Whether to put the positional pattern back that a bias buffer has learned to remove: encoders with
            and without one then answer to the same target, the backbone's own features. False is what users get.

    Raises:
        ConfigError: For an upsampler that returns several maps.
        InputError: For features that are NaN or infinite.
    """
    if encoder.upsampler.num_maps > 1:
        raise ConfigError(
            f"{type(encoder.upsampler).__name__} returns {encoder.upsampler.num_maps} maps at once, which cannot be "
            "compared with the backbone's one; measure it in a task with a head of its own"
        )
    high_res = encoder(images, low_res_size=low_res_size).high_res.float()
    if encoder.bias_buffer is not None and positional:
        high_res = high_res - encoder.bias_buffer.at((high_res.shape[-2], high_res.shape[-1]))
    raw = encoder.normalizer.denormalize(high_res) if encoder.normalizer.invertible else high_res
    check_finite(raw)
    return raw


def check_finite(features: Tensor) -> None:
    """Raise InputError for features [B, ...] of an encoder that are NaN or infinite."""
    if not torch.isfinite(features).all():
        raise InputError(
            f"the encoder returned NaN or infinite features for {len(features)} image(s); is the checkpoint damaged, "
            "or half precision too narrow for this backbone?"
        )


def bootstrap(
    per_image: Sequence[Sequence[float]] | np.ndarray,
    statistic: Callable[[np.ndarray], float],
    *,
    resamples: int = 1000,
) -> Estimate:
    """A statistic of all images with its 95 % percentile interval under resampling of images (seed fixed).

    Args:
        per_image: One row of numbers per image.
        statistic: Maps rows [images, numbers] to a number; NaN for a resample that has none is left out.
        resamples: 0 for no interval (NaN).
    """
    rows = np.asarray(per_image, dtype=np.float64)
    if resamples == 0:
        return Estimate(float(statistic(rows)), float("nan"), float("nan"))
    rng = np.random.default_rng(0)
    draws = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(resamples)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Estimate(float(statistic(rows)), float(low), float(high))


def bootstrap_sums(
    per_image: np.ndarray, statistic: Callable[[np.ndarray], float], *, resamples: int = 1000
) -> Estimate:
    """:func:`bootstrap` of a statistic that depends on the sum over images only: fast where rows are long.

    Args:
        per_image: [images, ...].
        statistic: Maps a sum [...] to a number.
        resamples: At least 1.
    """
    count = len(per_image)
    rng = np.random.default_rng(0)
    times = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples)]
    sums = np.tensordot(np.array(times, dtype=np.float64), per_image, 1)
    low, high = np.nanpercentile([statistic(total) for total in sums], [2.5, 97.5])
    return Estimate(float(statistic(per_image.sum(0))), float(low), float(high))
