"""What curves of cost over the upsampling factor are made of (FeatSharp, arXiv 2502.16025, figure 14).

direct      the backbone on an image of factor x its native size, in one pass
passes      the backbone on the image and on the tiles that cover it: 1 + f^2 passes at the native size
UPSAMPLER   a whole sharp encoder, its low-resolution pass at the native size, untrained: weights change no cost

All three give the same number of cells at a factor, factor x the tokens of the native size in each direction.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError, FeatSharpError
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics
from featsharp.ops.tiling import window_starts
from featsharp.upsamplers import UPSAMPLERS
from featsharp.upsamplers.base import check_factor, scale_length

DIRECT, PASSES = "direct", "passes"


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


def build_encoder(backbone: str | Backbone, upsampler: str, factor: float, normalizer: str = "none") -> SharpEncoder:
    """An untrained encoder; ``module:function`` makes an upsampler of a function.

    A normalizer is fitted to random vectors, which cost what others do.
    """
    options = {"function": upsampler} if ":" in upsampler else {}
    name = "custom" if options else upsampler
    encoder = create_encoder(backbone, name, factor, upsampler_options=options, normalizer=normalizer)
    if encoder.normalizer.needs_fit:
        statistics = FeatureStatistics(encoder.embed_dim)
        statistics.update(torch.randn(2 * encoder.embed_dim, encoder.embed_dim))
        encoder.normalizer.fit(statistics)
    return encoder


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
