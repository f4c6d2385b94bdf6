"""The contract of objectives, which compute gradients from a batch of samples, mostly views."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple

import torch
from torch import Tensor, nn

from featsharp.data.loader import S, SampleDataset, ViewDataset
from featsharp.data.mixture import ImageMixture
from featsharp.data.views import ViewConfig
from featsharp.errors import ConfigError, InputError
from featsharp.model import SharpEncoder
from featsharp.registry import Registry
from featsharp.training.downsamplers import Downsampler
from featsharp.upsamplers.base import Encode, GuidedUpsampler


class Losses(NamedTuple):
    """Scalars of one step: ``total`` is minimised; ``reconstruction`` is unweighted, for comparison."""

    total: Tensor
    reconstruction: Tensor
    terms: dict[str, Tensor]  # further scalars by name


@dataclass
class ObjectiveConfig:
    """Settings of an objective; all have its ``name``."""

    name: str = field(default="???")


class LinearSamples(NamedTuple):
    """Rows of a least-squares problem: what a linear weight is applied to, and what it should give."""

    inputs: Tensor  # [B, D, h, w]
    targets: Tensor  # [B, C, h, w]
    valid: Tensor  # [B, 1, h, w], 1 where they are compared


class Objective(nn.Module, Generic[S]):
    """Base of all objectives. Subclasses implement :meth:`backward`, and build from (embed_dim, factor, config).

    Attributes:
        config_type: The dataclass of its settings.
        downsampler: Learned model of how the backbone pools, [N, C, F*h, F*w] to [N, C, h, w] in
            normalised space, F the next whole number from the factor upwards; None where it has none.
        uncertainty: A network with a separate learning rate, or None.
    """

    config_type: ClassVar[type[ObjectiveConfig]]

    def __init__(self) -> None:
        super().__init__()
        self.downsampler: Downsampler | None = None
        self.uncertainty: nn.Module | None = None

    def check(self, encoder: SharpEncoder) -> None:
        """Raise ConfigError for an encoder that this objective cannot train; the message names an alternative."""
        if encoder.upsampler.num_maps > 1:
            raise ConfigError(
                f"{type(encoder.upsampler).__name__} returns {encoder.upsampler.num_maps} maps at once, which cannot "
                "be compared with the backbone's one; use it untrained"
            )

    def begin(self, encoder: SharpEncoder) -> None:
        """Take over what is needed of an encoder, or give it weights to start from, before its first step."""

    def open_dataset(
        self, encoder: SharpEncoder, mixture: ImageMixture, views: ViewConfig, seed: int
    ) -> SampleDataset[Any]:
        """Open what the objective learns from: views of the images of ``mixture``, drawn by ``seed``."""
        return ViewDataset(mixture, self.view_size(encoder), views, seed)

    def view_size(self, encoder: SharpEncoder) -> tuple[int, int]:
        """Compute (h, w) in pixels of the training views: whole patches, with enough detail for zooming and tiles."""
        times, patch = max(2, encoder.upsampler.input_upsample_factor), encoder.patch_size
        height, width = (math.ceil(length * times / patch) * patch for length in encoder.backbone.input_size)
        return height, width

    def backward(
        self,
        encoder: SharpEncoder,
        samples: S,
        low_res_size: tuple[int, int],
        autocast_dtype: torch.dtype | None = None,
        loss_scale: float = 1.0,
    ) -> Losses:
        """Add the gradients of one batch to the encoder and to the parameters of the objective.

        Args:
            encoder: In training mode; the backbone stays frozen.
            samples: Of :meth:`dataset`, on the encoder's device.
            low_res_size: (h, w) in pixels of the backbone's native pass.
            autocast_dtype: Type of the upsampler's matrix products; None: that of its weights. Losses are computed in
                float32 either way.
            loss_scale: Factor of the gradients, but not of the returned losses.

        Returns:
            The losses, detached.

        Raises:
            InputError: When a loss is not finite; only gradients have changed.
        """
        raise NotImplementedError

    def linear_samples(
        self, encoder: SharpEncoder, samples: S, low_res_size: tuple[int, int]
    ) -> Iterator[LinearSamples]:
        """Yield the rows that determine a linear weight in closed form; ConfigError where the objective has none."""
        raise ConfigError(
            f"{type(self).__name__} has no fit in closed form; use objective=multi-view, or linear_fit.samples=0"
        )

    def scalars(self, losses: Losses) -> dict[str, float]:
        """Collect the scalars of a step, for the log."""
        return loss_scalars(losses)


OBJECTIVES: Registry[Objective[Any]] = Registry("objective")
register_objective = OBJECTIVES.register


def guided_upsampler(encoder: SharpEncoder) -> GuidedUpsampler:
    """Return the encoder's upsampler; raises ConfigError for one that encodes the image again."""
    upsampler = encoder.upsampler
    if not isinstance(upsampler, GuidedUpsampler):
        raise ConfigError(
            f"this objective gives the upsampler one map of features and an image, but {type(upsampler).__name__} "
            "encodes the image again; train it with objective=multi-view"
        )
    return upsampler


def check_larger_images(encoder: SharpEncoder, name: str) -> None:
    """Raise ConfigError unless an encoder can be trained on features of larger images."""
    backbone, upsampler = encoder.backbone, guided_upsampler(encoder)
    if not backbone.flexible:
        raise ConfigError(
            f"objective {name!r} learns from the features of larger images, but backbone {backbone.name!r} takes "
            f"{backbone.input_size[0]}x{backbone.input_size[1]} only; use objective=multi-view"
        )
    if encoder.bias_buffer is not None:
        raise ConfigError(
            f"objective {name!r} compares an image with itself, which cannot tell a positional pattern from content; "
            "set bias_buffer=false, or use objective=multi-view"
        )
    if not upsampler.trainable:
        raise ConfigError(
            f"there is nothing to train: {type(upsampler).__name__} has no parameters; use it untrained, or learn its "
            "bias buffer with objective=multi-view"
        )


def autocast(images: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Make the autocast context of the upsampler; without a ``dtype`` that of the caller."""
    return nullcontext() if dtype is None else torch.autocast(images.device.type, dtype)


def keep_autocast(encoder: SharpEncoder, images: Tensor) -> Encode:
    """Wrap ``encoder.encode`` in the caller's autocast, for an upsampler that runs under :func:`autocast`.

    Backbone passes have a separate setting, ``model.dtype``, and must have one type for targets and inputs.
    """
    device = images.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def encode(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(device, dtype, enabled=enabled):
            return encoder.encode(images, patch_stride=patch_stride)

    return encode


def check_finite(loss: Tensor) -> None:
    """Raise InputError for a loss that is NaN or infinite."""
    if not torch.isfinite(loss):
        raise InputError(
            f"the training loss is {loss.item()}; the backbone or the upsampler returns NaN or infinite features "
            "(lower the learning rate, or use float32)"
        )


def loss_scalars(losses: Losses) -> dict[str, float]:
    """Collect the scalars of a step, for the log."""
    named = {"total": losses.total, "reconstruction": losses.reconstruction, **losses.terms}
    return {f"loss/{name}": value.item() for name, value in named.items()}


def weighted_sum(losses: list[Losses], weights: list[float]) -> Losses:
    """Sum losses of chunks or batches with weights; the result is detached."""

    def combine(values: list[Tensor]) -> Tensor:
        weighted = [value.detach() * weight for value, weight in zip(values, weights, strict=True)]
        return torch.stack(weighted).sum()

    terms = {name: combine([one.terms[name] for one in losses]) for name in losses[0].terms}
    return Losses(combine([one.total for one in losses]), combine([one.reconstruction for one in losses]), terms)


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Average 1 - cosine of the channels over images and cells; a vector of zeros has cosine 0 to anything."""
    return 1 - nn.functional.cosine_similarity(prediction, target, dim=1).mean()


# Mean distances of maps [B, C, h, w].
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "l1": nn.functional.l1_loss,
    "mse": nn.functional.mse_loss,
}
