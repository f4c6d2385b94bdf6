"""Position biases as pictures (FeatSharp, arXiv 2502.16025, figure 11): the fixed pattern in a backbone's features.

Two views of it, each in the PCA colours of its own: the bias buffer that an upsampler learned, and the mean feature map
of many images, which is what is left of a backbone's features when contents average out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featsharp.errors import ConfigError, InputError
from featsharp.model import SharpEncoder
from featsharp.visualization.pca import FeaturePCA
from featsharp.visualization.style import FAINT, INK, SMALL, TITLE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PER_LINE = 6


@dataclass(frozen=True)
class Pattern:
    """A positional pattern and how strong it is.

    Attributes:
        label: Of the model.
        features: [1, C, h, w] with spatial mean 0.
        strengths: By name, 0 for none; the first decides the order.
    """

    label: str
    features: Tensor
    strengths: Mapping[str, float]


def mean_pattern(features: Tensor) -> Tensor:
    """What the maps [n, C, h, w] of n images have in common: their mean without its spatial mean, [1, C, h, w]."""
    mean = features.float().mean(0, keepdim=True)
    return mean - mean.mean((2, 3), keepdim=True)


@torch.inference_mode()
def learned_pattern(encoder: SharpEncoder, features: Tensor) -> tuple[Tensor, float]:
    """The bias buffer of an encoder, and its strength: its rms over that of the features around their mean.

    Both are taken in the backbone's own space, where the fitted normalizer knows the spread of the features over the
    images it was fitted on. Without a fitted normalizer or an inverse, both are taken in normalised space, and the
    spread is that of ``features``.

    Args:
        encoder: With a bias buffer.
        features: [n, C, h, w] of the backbone, of n images.

    Returns:
        The buffer in normalised space [1, C, h, w], and the strength.

    Raises:
        ConfigError: For an encoder without a bias buffer.
    """
    if encoder.bias_buffer is None:
        raise ConfigError("this checkpoint has no bias buffer; train with bias_buffer=true, or draw --backbone NAME")
    normalizer = encoder.normalizer
    buffer = encoder.bias_buffer.buffer
    pattern = encoder.bias_buffer.at((buffer.shape[-2], buffer.shape[-1])).float()
    if normalizer.invertible and normalizer.fitted:
        raw = normalizer.denormalize(pattern) - normalizer.denormalize(torch.zeros_like(pattern))
        return pattern, _rms(raw) / math.sqrt(normalizer.variance_scale)
    normalised = normalizer(features.to(pattern))
    return pattern, _rms(pattern) / _rms(normalised - normalised.mean((0, 2, 3), keepdim=True))


def draw_bias(groups: Mapping[str, Sequence[Pattern]], *, cell: float = 1.9) -> "Figure":
    """The figure: a block of pictures for every group, the strongest pattern first.

    Args:
        groups: By heading, such as "learned bias buffers"; groups without patterns are left out.
        cell: Side of a picture in inches.

    Raises:
        InputError: When there is nothing to draw.
    """
    groups = {heading: sorted(some, key=_strength, reverse=True) for heading, some in groups.items() if some}
    if not groups:
        raise InputError("there is no pattern to draw; give at least one checkpoint or backbone")
    columns = min(PER_LINE, max(map(len, groups.values())))
    lines = {heading: math.ceil(len(some) / columns) for heading, some in groups.items()}
    numbers = max(len(pattern.strengths) for some in groups.values() for pattern in some)
    line_height = cell + 0.3 + 0.16 * numbers
    width = max(cell * columns, 3.2)
    figure = new_figure(width, sum(0.3 + n * line_height for n in lines.values()))
    blocks = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=list(lines.values()))[:, 0]
    for block, (heading, patterns) in zip(blocks, groups.items(), strict=True):
        block.suptitle(heading, fontsize=TITLE, color=INK, x=0.01, ha="left")
        places = block.subplots(lines[heading], columns, squeeze=False).ravel()
        for axes in places:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, pattern in zip(places, patterns, strict=False):
            axes.imshow(_picture(pattern.features), interpolation="nearest")
            axes.set_title(pattern.label, fontsize=SMALL, color=INK)
            text = "\n".join(f"{name} {value:.3f}" for name, value in pattern.strengths.items())
            axes.set_xlabel(text, fontsize=SMALL, color=FAINT)
    return figure


def _strength(pattern: Pattern) -> float:
    return next(iter(pattern.strengths.values()))


def _picture(features: Tensor) -> object:
    return FeaturePCA(features)(features)[0].permute(1, 2, 0).cpu().numpy()


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
