"""Position biases as pictures (FeatSharp, arXiv 2502.16025, figure 11): the fixed pattern in a backbone's features.

Two views of it, each in the PCA colours of its own: the bias buffer that an upsampler learned, and the mean feature map
of many images, which is what is left of a backbone's features when contents average out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from featsharp.errors import ConfigError, InputError
from featsharp.model import SharpEncoder
from featsharp.visualization.pca import FeaturePCA
from featsharp.visualization.style import FAINT, INK, SMALL, TITLE, line_height, new_figure, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_LINE = 6
# Inches between pictures, and between them and their texts.
GAP = 0.1


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
    most = max(map(len, groups.values()))
    columns = math.ceil(most / math.ceil(most / PER_LINE))  # so that all lines are about as long
    width = max((cell + GAP) * columns, 3.2)
    lines = [
        _Line(
            wrap(f"{heading}, each in its own colours", width, TITLE) if first == 0 else "",
            some[first:][:columns],
            cell,
        )
        for heading, some in groups.items()
        for first in range(0, len(some), columns)
    ]
    height = sum(line.height for line in lines)
    figure = new_figure(width, height)
    figure.set_layout_engine("none")  # it would leave gaps around squares; all is placed by hand
    top = height
    for line in lines:
        if line.heading:
            figure.text(0, top / height, line.heading, fontsize=TITLE, color=INK, va="top")
        bottom = top - line.above - cell
        for column, pattern in enumerate(line.patterns):
            place = (column * (cell + GAP) / width, bottom / height, cell / width, cell / height)
            _draw(figure.add_axes(place), pattern, cell)
        top -= line.height
    return figure


@dataclass(frozen=True)
class _Line:
    """A line of pictures, under the heading of its group where it is the first."""

    heading: str
    patterns: Sequence[Pattern]
    cell: float

    @property
    def above(self) -> float:
        """Inches from the top of the line to its pictures."""
        heading = _lines(self.heading) * line_height(TITLE) if self.heading else 0.0
        return heading + max(_lines(_title(p, self.cell)) for p in self.patterns) * line_height(SMALL) + GAP

    @property
    def height(self) -> float:
        """Inches of all of it."""
        below = max(len(pattern.strengths) for pattern in self.patterns) * line_height(SMALL)
        return self.above + self.cell + below + 2.5 * GAP


def _draw(axes: "Axes", pattern: Pattern, cell: float) -> None:
    axes.imshow(_picture(pattern.features), interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(_title(pattern, cell), fontsize=SMALL, color=INK, pad=4)
    text = "\n".join(f"{name} {value:.3f}" for name, value in pattern.strengths.items())
    axes.set_xlabel(text, fontsize=SMALL, color=FAINT)


def _title(pattern: Pattern, cell: float) -> str:
    return wrap(pattern.label, cell, SMALL)


def _lines(text: str) -> int:
    return text.count("\n") + 1


def _strength(pattern: Pattern) -> float:
    return next(iter(pattern.strengths.values()))


def _picture(features: Tensor) -> Any:
    return FeaturePCA(features)(features)[0].permute(1, 2, 0).cpu().numpy()


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
