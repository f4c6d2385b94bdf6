"""What curves of cost over the upsampling factor are made of (FeatSharp, arXiv 2502.16025, figure 14).

direct      the backbone on an image of factor x its native size, in one pass
passes      the backbone on the image and on the tiles that cover it: 1 + f^2 passes at the native size
UPSAMPLER   a whole sharp encoder, its low-resolution pass at the native size, untrained: weights change no cost; with
            default options and, where there is something to learn, the normalizer that it is trained with by default

All three give the same number of cells at a factor, factor x the tokens of the native size in each direction.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError, FeatSharpError
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics
from featsharp.ops.tiling import window_starts
from featsharp.settings import setting
from featsharp.upsamplers import UPSAMPLERS
from featsharp.upsamplers.base import check_factor, scale_length
from featsharp.upsamplers.registration import plain_options

DIRECT, PASSES = "direct", "passes"
TRAINING_NORMALIZER = "phi-s"


@dataclass
class CurvesTask:
    """Settings of tasks that draw curves of cost."""

    backbone: str = setting("vits14-focus", "name of the backbone")
    upsampler: tuple[str, ...] = setting(
        ("featsharp", "tile", "bilinear"), "names, or module:function", nargs="+", metavar="NAME"
    )
    factors: tuple[float, ...] = setting((1, 1.5, 2, 3, 4), "gains", type=float, nargs="+", metavar="F")


@dataclass(frozen=True)
class Workload:
    """A point of a curve, not yet measured."""

    curve: str  # DIRECT, PASSES or the name of an upsampler
    factor: float
    module: Backbone | SharpEncoder
    input_shape: tuple[int, ...]  # [B, 3, H, W] of the images that it is given
    cells: int  # of the result, per image

    @property
    def backbone(self) -> Backbone:
        """The module itself, or the encoder's."""
        return self.module if isinstance(self.module, Backbone) else self.module.backbone

    @property
    def recipe(self) -> dict[str, Any]:
        """What results say about the encoder: "normalizer" and "options" of the upsampler; None of a backbone alone."""
        if isinstance(self.module, Backbone):
            return {"normalizer": None, "options": None}
        return describe_recipe(self.module)


def list_workloads(
    backbone: Backbone,
    upsamplers: Sequence[str],
    factors: Sequence[float],
    device: torch.device,
    *,
    batch_size: int = 1,
) -> tuple[list[Workload], list[dict[str, Any]]]:
    """The points of all curves, by factor, and those that cannot be, as {"curve", "factor", "reason"}.

    Args:
        backbone: Shared by all.
        upsamplers: Names, or ``module:function`` for one made of a function.
        factors: Gains in each direction.
        device: Where everything is put.
        batch_size: Images at a time.

    Raises:
        ConfigError: For an unknown upsampler, or factors below 1.
    """
    for name in upsamplers:
        if ":" not in name:
            UPSAMPLERS[name]  # unknown ones are refused before anything is measured
    backbone.to(device)
    found, skipped = [], []
    for factor in sorted({check_factor(factor, "any", "a curve of cost") for factor in factors}):
        for curve in (DIRECT, PASSES, *dict.fromkeys(upsamplers)):
            try:
                found.append(_workload(backbone, curve, factor, device, batch_size))
            except FeatSharpError as error:
                skipped.append(skip(curve, factor, str(error)))
    return found, skipped


def skip(curve: str, factor: float, reason: str) -> dict[str, Any]:
    """What results say about a point that is not there."""
    return {"curve": curve, "factor": factor, "reason": reason}


def describe_skipped(skipped: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each point that is not there."""
    return [f"not measured: {entry['curve']} {entry['factor']:g}x: {entry['reason']}" for entry in skipped]


def build_encoder(
    backbone: str | Backbone, upsampler: str, factor: float, normalizer: str | None = None
) -> SharpEncoder:
    """An untrained encoder, whose normalizer is fitted to random vectors, which cost what others do.

    Args:
        backbone: Name or object.
        upsampler: Name, or ``module:function`` for one made of a function.
        factor: Gain.
        normalizer: Name; None: PHI-S, the default of training, where there is something to learn, otherwise none.
    """
    options = {"function": upsampler} if ":" in upsampler else {}
    name = "custom" if options else upsampler
    if normalizer is None:
        normalizer = TRAINING_NORMALIZER if needs_training(name) else "none"
    encoder = create_encoder(backbone, name, factor, upsampler_options=options, normalizer=normalizer)
    if encoder.normalizer.needs_fit:
        statistics = FeatureStatistics(encoder.embed_dim)
        statistics.update(torch.randn(2 * encoder.embed_dim, encoder.embed_dim))
        encoder.normalizer.fit(statistics)
        # It looks at its values once, which a copy without values could not do.
        encoder.normalizer(torch.zeros(1, encoder.embed_dim, 1, 1))
    return encoder


def needs_training(upsampler: str) -> bool:
    """Whether there is anything to learn for an upsampler of this name."""
    return bool(getattr(UPSAMPLERS[upsampler].factory, "trainable", False))


def needs_function(upsampler: str) -> bool:
    """Whether an upsampler of this name is made of a function of the user's."""
    return bool(getattr(UPSAMPLERS[upsampler].factory, "function_options", ()))


def describe_recipe(encoder: SharpEncoder) -> dict[str, Any]:
    """The "normalizer" and all "options" of the upsampler, those left at their defaults included."""
    parameters = signature(UPSAMPLERS[encoder.recipe["upsampler"]].factory).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    options = defaults | encoder.recipe["options"]
    return {"normalizer": encoder.recipe["normalizer"], "options": plain_options(options)}


def is_foreign(module: Backbone | SharpEncoder) -> bool:
    """Whether a function of the user's runs in it."""
    return isinstance(module, SharpEncoder) and bool(module.upsampler.function_options)


def backbone_passes(backbone: Backbone, function: Callable[[], object]) -> list[Tensor]:
    """The batches that go through a backbone during a call."""
    batches: list[Tensor] = []
    hook = backbone.register_forward_pre_hook(lambda module, arguments: batches.append(arguments[0]))
    try:
        function()
    finally:
        hook.remove()
    return batches


def _workload(backbone: Backbone, curve: str, factor: float, device: torch.device, batch_size: int) -> Workload:
    native, patch = backbone.grid_size(backbone.input_size), backbone.patch_size
    grid = scale_length(native[0], factor), scale_length(native[1], factor)
    module: Backbone | SharpEncoder = backbone
    images, size = batch_size, backbone.input_size
    if curve == DIRECT:
        size = grid[0] * patch, grid[1] * patch
        if grid != native and not backbone.flexible:
            raise ConfigError(
                f"backbone {backbone.name!r} takes {native[0] * patch}x{native[1] * patch} pixels only, not "
                f"{size[0]}x{size[1]}"
            )
    elif curve == PASSES:
        tiles = math.prod(len(window_starts(*sides, overlap=0)) for sides in zip(grid, native, strict=True))
        # A single tile is the image itself.
        images *= 1 if tiles == 1 else 1 + tiles
    else:
        module = build_encoder(backbone, curve, factor).to(device)
        size = module.input_size
    return Workload(curve, factor, module, (images, 3, *size), math.prod(grid))
