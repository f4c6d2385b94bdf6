"""Reconstruction from a smaller image: LiFT's objective (Suri et al., ECCV 2024, arXiv 2403.14625).

The features of an image are predicted from those of the same image at 1 / f of its size:

    loss = d( Up(I_f, phi(I_f)), phi(I) )  +  d( Up(I_ff, phi(I_ff)), phi(I_f) )

with the encoder's features phi, images I, I_f and I_ff at f, 1 and 1 / f times the backbone's native size, and d a mean
over tokens. Works for every guided upsampler with a whole factor f. The second term is left out where the grid of I_ff
would not be whole, or a single token.

UPLiFT (arXiv 2601.17950) compares several doublings at once, too (``terms=all``): + d( Up(I_ff, phi(I_ff)) at the grid
of I, phi(I) ). Its third smaller scale, for some backbones, is not here. NAF (arXiv 2511.18452) has the first
term alone. Both take the mean squared error of raw features (``normalizer=none``).

Published LiFT has d = 1 - cosine, of raw features (``distance=cosine normalizer=none``). That leaves the length of the
features open, and in centred space a wrong length becomes a wrong direction, so the default is the mean squared error.
It shrinks by taking every f-th pixel, which aliases unlike photographs that are resized for inference
(``subsample=slice``); the default is antialiased. Its colour jitter is not here. In its training the running statistics
of batch normalisation mix both scales; here they are those of the native grid, at which the result is used.

Shapes: B images, C channels, (h, w) native grid.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featsharp.data.views import Views, base_view
from featsharp.errors import ConfigError, unknown_name
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.training.objectives.base import (
    DISTANCES,
    Losses,
    Objective,
    ObjectiveConfig,
    autocast,
    check_finite,
    check_larger_images,
    guided_upsampler,
    register_objective,
)

SUBSAMPLES = ("antialias", "slice")
TERMS = ("next", "all")
# Terms by the names of the losses, as (source, target) among I, I_f and I_ff; the first is the loss itself.
PAIRS = {"reconstruction": (1, 0), "small": (2, 1), "twice": (2, 0)}


@dataclass
class ReconstructionConfig(ObjectiveConfig):
    """Settings of the objective.

    Attributes:
        distance: "mse", "l1" or "cosine" (1 - cosine), averaged over tokens and, except for the last, over channels.
        subsample: Method of shrinking images: "antialias", or "slice" for every f-th pixel.
        terms: "next" compares with the next larger image, "all" with every larger one.
    """

    name: str = "reconstruction"
    distance: str = "mse"
    subsample: str = "antialias"
    terms: str = "next"


@register_objective("reconstruction", "predict the features of an image from those of the image made smaller (LiFT)")
class ReconstructionObjective(Objective[Views]):
    """Prediction of features from a smaller image's. Trains guided upsamplers of a whole factor; has no parameters."""

    config_type = ReconstructionConfig

    def __init__(self, embed_dim: int, factor: float, config: ReconstructionConfig) -> None:
        super().__init__()
        if config.distance not in DISTANCES:
            raise unknown_name("distance", config.distance, DISTANCES)
        if config.subsample not in SUBSAMPLES:
            raise unknown_name("subsample", config.subsample, SUBSAMPLES)
        if config.terms not in TERMS:
            raise unknown_name("terms", config.terms, TERMS)
        if factor != int(factor) or factor < 2:
            raise ConfigError(
                f"objective 'reconstruction' compares with an image a whole number of times as large; got factor "
                f"{factor:g}, use 2 (or objective=multi-view)"
            )
        self.config = config
        self.factor = int(factor)

    def check(self, encoder: SharpEncoder) -> None:
        super().check(encoder)
        check_larger_images(encoder, "reconstruction")
        upsampler = guided_upsampler(encoder)
        if self.config.terms == "all" and upsampler.factors != "any":
            raise ConfigError(
                f"objective.terms=all needs an upsampler that makes maps of any size; {type(upsampler).__name__} has "
                "one factor, use objective.terms=next"
            )

    def view_size(self, encoder: SharpEncoder) -> tuple[int, int]:
        """Return f times the native size."""
        height, width = encoder.backbone.input_size
        return self.factor * height, self.factor * width

    def backward(
        self,
        encoder: SharpEncoder,
        samples: Views,
        low_res_size: tuple[int, int],
        autocast_dtype: torch.dtype | None = None,
        loss_scale: float = 1.0,
    ) -> Losses:
        """See :meth:`Objective.backward`; ``reconstruction`` is the first term alone, others are in :data:`PAIRS`."""
        images = self.pyramid(encoder, samples, low_res_size)
        with torch.no_grad():
            features = [encoder.encode(image).features for image in images]
        losses = {}
        for name, (source, target) in PAIRS.items():
            if source >= len(images) or (self.config.terms == "next" and source - target > 1):
                continue
            frozen = _frozen_statistics(encoder.upsampler) if source > 1 else nullcontext()
            size = None if source - target == 1 else size_of(features[target])
            with frozen, autocast(images[source], autocast_dtype):
                prediction = guided_upsampler(encoder).upsample(features[source], images[source], size)
            # Term by term: only one graph is held.
            loss = DISTANCES[self.config.distance](prediction.float(), features[target].float())
            check_finite(loss)
            (loss * loss_scale).backward()
            losses[name] = loss.detach()
        total = torch.stack(list(losses.values())).sum()
        return Losses(total, losses.pop("reconstruction"), losses)

    def pyramid(self, encoder: SharpEncoder, views: Views, low_res_size: tuple[int, int]) -> list[Tensor]:
        """Resize base images to f, 1 and, where its grid is whole and more than a token, 1 / f times the native size.

        Returns:
            Whitened images, each [B, 3, height, width].
        """
        height, width = low_res_size
        sizes = [(self.factor * height, self.factor * width), low_res_size]
        grid = encoder.backbone.grid_size(low_res_size)
        if all(cells % self.factor == 0 and cells > self.factor for cells in grid):
            sizes.append((height // self.factor, width // self.factor))
        full = resize(encoder.input_conditioner(base_view(views)[0]), sizes[0])
        return [self._shrink(full, size) for size in sizes]

    def _shrink(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        if self.config.subsample == "slice":
            height, width = size_of(image)
            return image[..., :: height // size[0], :: width // size[1]]
        return resize(image, size)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Freeze the running statistics of batch normalisation, which still uses those of the batch."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
