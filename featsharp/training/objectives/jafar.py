"""JAFAR's objective (arXiv 2506.11136): upsample features of a smaller image to the grid of a larger one.

    loss = (1 - cos(P, T)) + mse(minmax(P), minmax(T)),    P = Up(phi(s I), J, grid of T),    T = phi(I)

with the encoder's features phi, the image I at twice the backbone's native size, s ~ U(0.25, 0.5) drawn for every step,
and the guidance J: the image at half its size. For upsamplers that make maps of any size.

The paper's third term, 0.1 times a self-consistency under blur and noise, is not specified well enough to be
reproduced, and is left out. Nor are the axes of min-max scaling: here it is one minimum and one maximum per map, so
that images of a batch do not mix.

Shapes: B images, C channels, (H, W) grid of the target.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.data.views import Views, base_view
from featsharp.errors import ConfigError
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.settings import key
from featsharp.training.objectives.base import (
    Losses,
    Objective,
    ObjectiveConfig,
    autocast,
    check_finite,
    check_larger_images,
    cosine_distance,
    guided_upsampler,
    register_objective,
)


@dataclass
class JAFARConfig(ObjectiveConfig):
    """Settings of the objective. Scales are relative to the image of the target.

    Attributes:
        input_scale: [low, high] of the image of the input features, in (0, 1].
        guidance_scale: Of the guidance image, in (0, 1].
        mse_weight: Weight of the distance of min-max scaled features.
    """

    name: str = "jafar"
    input_scale: list[float] = field(default_factory=lambda: [0.25, 0.5])
    guidance_scale: float = 0.5
    mse_weight: float = key(1.0, least=0)


@register_objective(
    "jafar", "predict the features of an image from those of the image made smaller by any scale (JAFAR)"
)
class JAFARObjective(Objective[Views]):
    """Prediction of features at the grid of a larger image. Trains guided upsamplers of any size; has no parameters.

    Args:
        embed_dim: C.
        factor: Not used: the factor of a step is that of its images.
        config: See :class:`JAFARConfig`.
    """

    config_type = JAFARConfig

    def __init__(self, embed_dim: int, factor: float, config: JAFARConfig) -> None:
        super().__init__()
        scale = config.input_scale
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(f"objective.input_scale must be [low, high] with 0 < low <= high <= 1; got {scale}")
        if not 0 < config.guidance_scale <= 1:
            raise ConfigError(f"objective.guidance_scale must be above 0 and at most 1; got {config.guidance_scale:g}")
        self.config = config

    def check(self, encoder: SharpEncoder) -> None:
        super().check(encoder)
        check_larger_images(encoder, "jafar")
        if encoder.upsampler.factors != "any":
            name = type(encoder.upsampler).__name__
            raise ConfigError(
                f"objective 'jafar' asks for maps of any size, but {name} has factors that are "
                f"{encoder.upsampler.factors!r}; use objective=reconstruction"
            )

    def view_size(self, encoder: SharpEncoder) -> tuple[int, int]:
        """Return twice the native size."""
        height, width = encoder.backbone.input_size
        return 2 * height, 2 * width

    def backward(
        self,
        encoder: SharpEncoder,
        samples: Views,
        low_res_size: tuple[int, int],
        autocast_dtype: torch.dtype | None = None,
        loss_scale: float = 1.0,
    ) -> Losses:
        """See :meth:`Objective.backward`; ``reconstruction`` is 1 - cosine, "mse" the unweighted other distance."""
        image = resize(encoder.input_conditioner(base_view(samples)[0]), (2 * low_res_size[0], 2 * low_res_size[1]))
        low, high = self.config.input_scale
        scale = low + (high - low) * torch.rand((), dtype=torch.float32, device="cpu").item()
        with torch.no_grad():
            target = encoder.encode(image).features
            features = encoder.encode(resize(image, self.input_size(encoder, image, scale))).features
        guidance = resize(image, _scaled(image, self.config.guidance_scale))
        with autocast(image, autocast_dtype):
            prediction = guided_upsampler(encoder).upsample(features, guidance, size_of(target))
        prediction, target = prediction.float(), target.float()
        cosine = cosine_distance(prediction, target)
        mse = F.mse_loss(min_max(prediction), min_max(target))
        total = cosine + self.config.mse_weight * mse
        check_finite(total)
        (total * loss_scale).backward()
        return Losses(total.detach(), cosine.detach(), {"mse": mse.detach()})

    def input_size(self, encoder: SharpEncoder, image: Tensor, scale: float) -> tuple[int, int]:
        """Compute (h, w) in pixels of the image of the input features: whole patches, at least one."""
        height, width = _scaled(image, scale)
        patch = encoder.patch_size
        return encoder.backbone.fit_size(max(height, patch), max(width, patch))


def min_max(x: Tensor) -> Tensor:
    """Scale [B, C, H, W] to [0, 1] by the smallest and the largest value of each map; a constant map to 0."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).eps)


def _scaled(image: Tensor, scale: float) -> tuple[int, int]:
    height, width = size_of(image)
    return max(1, round(height * scale)), max(1, round(width * scale))
