"""Position biases as pictures (FeatSharp, arXiv 2502.16025, figure 11): the fixed pattern in a backbone's features.

Two views of it, each in separate PCA colours: the bias buffer that an upsampler learned, and the mean feature map of
many images, whose contents average out.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featsharp.errors import ConfigError, InputError
from featsharp.names import readable, split_label
from featsharp.settings import add_backbone, add_device
from featsharp.visualization.grid import show_picture
from featsharp.visualization.style import FAINT, INK, SMALL, TITLE, new_figure, wrap

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from featsharp.backbones.base import Backbone
    from featsharp.model import SharpEncoder

PER_LINE = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", nargs="+", metavar="[LABEL=]FILE", help="trained files with a bias buffer")
    add_backbone(parser, "whose pattern is measured", nargs="+", metavar="NAME")
    parser.add_argument("--images", type=int, default=16, metavar="N", help="random images to measure on; default: 16")
    add_device(parser)


def make_figure(arguments: argparse.Namespace) -> "Figure":
    from featsharp.backbones import create_backbone
    from featsharp.builder import load_from_file
    from featsharp.device import find_device

    if arguments.images < 2:
        raise ConfigError(f"--images must be at least 2; got {arguments.images}")
    device = find_device(arguments.device)
    learned: list[Pattern] = []
    measured: dict[str, Pattern] = {}
    for text in arguments.checkpoint or []:
        label, path = split_label(text)
        encoder = load_from_file(path, allow_functions=arguments.allow_functions).to(device)
        name = encoder.backbone.name
        features = _random_features(encoder.backbone, arguments.images, device)
        measured[name] = _measured_pattern(name, features)
        pattern, strength = learned_pattern(encoder, features)
        strengths = {"strength": strength, **measured[name].strengths}
        learned.append(Pattern(label or f"{name}, {readable(Path(path).stem)}", pattern, strengths))
    for name in arguments.backbone or []:
        if name not in measured:
            features = _random_features(create_backbone(name).to(device), arguments.images, device)
            measured[name] = _measured_pattern(name, features)
    if not measured:
        raise ConfigError("nothing to draw; give --checkpoint FILE ... or --backbone NAME ..., or both")
    average = f"mean features of {arguments.images} random images"
    return draw_bias({"learned bias buffers": learned, average: list(measured.values())})


@dataclass(frozen=True)
class Pattern:
    """A positional pattern and its strength.

    Attributes:
        label: Of the model.
        features: [1, C, h, w] with spatial mean 0.
        strengths: By name, 0 for none; patterns are sorted by the first.
    """

    label: str
    features: "Tensor"
    strengths: Mapping[str, float]


def mean_pattern(features: "Tensor") -> "Tensor":
    """Compute the mean of the maps [n, C, h, w] of n images without its spatial mean, [1, C, h, w]."""
    mean = features.float().mean(0, keepdim=True)
    return mean - mean.mean((2, 3), keepdim=True)


def learned_pattern(encoder: "SharpEncoder", features: "Tensor") -> "tuple[Tensor, float]":
    """Return the bias buffer of an encoder, and its strength: its rms over that of the features around their mean.

    Both are computed in the backbone's space, where the fitted normalizer has the spread of the features over its
    images. Without a fitted normalizer or an inverse, both are computed in normalised space, and the spread is that of
    ``features``.

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
    import torch

    normalizer = encoder.normalizer
    with torch.inference_mode():
        buffer = encoder.bias_buffer.buffer
        pattern = encoder.bias_buffer.at((buffer.shape[-2], buffer.shape[-1])).float()
        if normalizer.invertible and normalizer.fitted:
            raw = normalizer.denormalize(pattern) - normalizer.denormalize(torch.zeros_like(pattern))
            return pattern, _rms(raw) / math.sqrt(normalizer.variance_scale)
        normalised = normalizer(features.to(pattern))
        return pattern, _rms(pattern) / _rms(normalised - normalised.mean((0, 2, 3), keepdim=True))


def draw_bias(groups: Mapping[str, Sequence[Pattern]], *, cell: float = 1.9) -> "Figure":
    """Draw lines of pictures for every group, the strongest pattern first, each picture in separate colours.

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
    lines = [
        (heading if first == 0 else "", some[first : first + columns])
        for heading, some in groups.items()
        for first in range(0, len(some), columns)
    ]
    figure = new_figure(cell * columns + 0.5, (cell + 0.8) * len(lines), compressed=True)
    all_axes = figure.subplots(len(lines), columns, squeeze=False)
    for (heading, patterns), line in zip(lines, all_axes, strict=True):
        line[0].set_ylabel(wrap(heading, cell, TITLE), fontsize=TITLE, color=INK)
        for axes, pattern in zip(line, patterns, strict=False):
            show_picture(axes, _picture(pattern.features), 1.0)
            axes.set_title(wrap(pattern.label, cell, SMALL), fontsize=SMALL, color=INK)
            strengths = "\n".join(f"{name} {value:.3f}" for name, value in pattern.strengths.items())
            axes.set_xlabel(strengths, fontsize=SMALL, color=FAINT)
        for axes in line[len(patterns) :]:
            axes.remove()
    return figure


def _random_features(backbone: "Backbone", count: int, device: "torch.device") -> "Tensor":
    """Compute the features of random images of a backbone's native size, [n, C, h, w] on the CPU."""
    import torch

    from featsharp.evaluation.position_bias import random_images
    from featsharp.model import InputConditioner

    images = InputConditioner(backbone.mean, backbone.std)(random_images(count, backbone.input_size))
    with torch.inference_mode():
        return torch.cat([backbone(image[None].to(device)).features.float().cpu() for image in images])


def _measured_pattern(name: str, features: "Tensor") -> Pattern:
    from featsharp.evaluation.position_bias import explained_by_position

    return Pattern(name, mean_pattern(features), {"position bias": explained_by_position(features)})


def _strength(pattern: Pattern) -> float:
    return next(iter(pattern.strengths.values()))


def _picture(features: "Tensor") -> "Tensor":
    from featsharp.visualization.pca import FeaturePCA

    return FeaturePCA(features)(features)[0]


def _rms(values: "Tensor") -> float:
    return values.square().mean().sqrt().item()
