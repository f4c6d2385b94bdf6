"""Workloads of the curves of cost over the upsampling factor (FeatSharp, arXiv 2502.16025, figure 14).

direct      the backbone on an image of factor x its native size, in one pass
passes      the backbone on the image and on the tiles that cover it: 1 + f^2 passes at the native size
UPSAMPLER   a sharp encoder with the upsampler's default options, untrained, its low-resolution pass at the native size;
            for a trainable upsampler with the default normalizer of training
CHECKPOINT  a sharp encoder with its weights, at its factor

All make the same number of cells at a factor, factor x the tokens of the native size in each direction.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone
from featsharp.builder import SharpEncoder, content_key, create_encoder, load_from_file
from featsharp.errors import ConfigError, FeatSharpError
from featsharp.names import is_function_name, label_encoders, parse_upsampler, plain_value
from featsharp.normalizers import FeatureStatistics
from featsharp.ops.tiling import window_starts
from featsharp.settings import PlainTask, setting
from featsharp.upsamplers import UPSAMPLERS
from featsharp.upsamplers.base import check_factor, scale_length
from featsharp.upsamplers.registration import default_factor, read_trait, resolve_upsampler
from featsharp.weights import list_weights

DIRECT, PASSES = "direct", "passes"
TRAINING_NORMALIZER = "phi-s"


@dataclass
class CurvesTask(PlainTask):
    """Settings of tasks that draw curves of cost."""

    backbone: str | Backbone = setting("vits14-focus", "name of the backbone")
    upsampler: tuple[str, ...] = setting(
        ("featsharp", "tile", "bilinear"), "names, or module:function", nargs="+", metavar="NAME"
    )
    factors: tuple[float, ...] = setting((1, 1.5, 2, 3, 4), "upsampling factors", type=float, nargs="+", metavar="F")
    checkpoint: Sequence[str] | None = setting(
        None, "trained files and shipped weights, each at its factor", nargs="+", metavar="[LABEL=]FILE"
    )

    def workloads(
        self, backbone: Backbone, device: torch.device, *, factors: Sequence[float] = (), batch_size: int = 1
    ) -> "tuple[list[Workload], list[dict[str, Any]]]":
        """List the points of all curves, at the factors of the settings and ``factors``; see :func:`list_workloads`."""
        return list_workloads(
            backbone,
            (DIRECT, PASSES, *self.upsampler),
            (*factors, *self.factors),
            device,
            checkpoints=self.checkpoint or (),
            batch_size=batch_size,
        )


@dataclass(frozen=True)
class Workload:
    """A point of a curve, not yet measured."""

    curve: str  # DIRECT, PASSES, the name of an upsampler with its options, or the label of a checkpoint
    factor: float
    module: Backbone | SharpEncoder
    input_shape: tuple[int, ...]  # [B, 3, H, W] of the images
    cells: int  # of the result, per image
    key: str | None = None  # of the encoder's content (content_key); None for a backbone alone and random weights
    autocast: torch.dtype | None = None  # of the whole call, beside the backbone's autocast

    @property
    def backbone(self) -> Backbone:
        """The backbone itself, or the encoder's."""
        return self.module if isinstance(self.module, Backbone) else self.module.backbone

    @property
    def recipe(self) -> dict[str, Any]:
        """Entries of a result: "normalizer", given "options" of the upsampler, "key"; None of a backbone alone."""
        if isinstance(self.module, Backbone):
            return {"normalizer": None, "options": None, "key": None}
        recipe = self.module.recipe
        return {"normalizer": recipe["normalizer"], "options": plain_value(recipe["options"]), "key": self.key}


def list_workloads(
    backbone: Backbone,
    curves: Sequence[str],
    factors: Sequence[float],
    device: torch.device,
    *,
    checkpoints: Sequence[str] = (),
    batch_size: int = 1,
    normalizer: str | None = None,
) -> tuple[list[Workload], list[dict[str, Any]]]:
    """List the points of all curves, by factor, and impossible ones, as {"curve", "factor", "reason"}.

    Args:
        backbone: Shared by all.
        curves: :data:`DIRECT`, :data:`PASSES`, names of upsamplers, also with options, ``module:function`` for a custom
            one; each measured at ``factors``, or with -FACTORx after its name at that one.
        factors: In each direction; checkpoints have their own.
        device: Of backbone and encoders.
        checkpoints: ``[LABEL=]FILE`` each, trained for that backbone.
        batch_size: Images at a time.
        normalizer: Of untrained encoders; see :func:`build_encoder`.

    Raises:
        ConfigError: For an unknown upsampler, factors below 1, two curves of one name.
        CheckpointError: For a file that cannot be read, or was trained for another backbone.
    """
    named = [parse_upsampler(curve, UPSAMPLERS) for curve in curves]
    curves = [one.curve for one in named]
    at = [
        (one.curve, check_factor(f, "any", "a curve of cost"))
        for one in named
        for f in ([one.factor] if one.factor else factors)
    ]
    for name, _, _ in named:
        if not is_function_name(name) and name not in (DIRECT, PASSES):
            UPSAMPLERS[name]  # unknown ones are refused before anything is measured
    points, skipped = [], []
    for label, path in label_encoders(checkpoints).items():
        if label in curves:
            raise ConfigError(f"two curves are called {label!r}; name the checkpoint: LABEL={path}")
        encoder = load_from_file(path, featurizer=backbone).to(device)
        points.append(_encoder_workload(label, encoder, batch_size, content_key(encoder)))
    backbone.to(device)
    for curve, factor in sorted(dict.fromkeys(at), key=lambda point: point[1]):
        try:
            if curve in (DIRECT, PASSES):
                points.append(_backbone_workload(backbone, curve, factor, batch_size))
            else:
                encoder = build_encoder(backbone, curve, factor, normalizer).to(device)
                random = encoder.upsampler.trainable or encoder.normalizer.needs_fit
                key = None if random else content_key(encoder)
                points.append(_encoder_workload(curve, encoder, batch_size, key))
        except FeatSharpError as error:
            skipped.append(skip(curve, factor, str(error)))
    return sorted(points, key=lambda point: (point.factor, point.curve != DIRECT)), skipped


def skip(curve: str, factor: float, reason: str) -> dict[str, Any]:
    """Make the entry of a result for a point that was not measured."""
    return {"curve": curve, "factor": factor, "reason": reason}


def describe_skipped(skipped: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format a line for each point that was not measured."""
    return [f"not measured: {entry['curve']} {entry['factor']:g}x: {entry['reason']}" for entry in skipped]


def build_encoder(
    backbone: str | Backbone, upsampler: str, factor: float, normalizer: str | None = None
) -> SharpEncoder:
    """Build an untrained encoder, whose normalizer is fitted to random vectors, which take the same time as others.

    Args:
        backbone: Name or object.
        upsampler: Name, also with options, or ``module:function`` for a custom one.
        factor: In each direction.
        normalizer: Name; None: PHI-S, the default of training, for a trainable upsampler, otherwise none.
    """
    name, factor, options = resolve_upsampler(upsampler, factor, functions=True)
    if normalizer is None:
        normalizer = TRAINING_NORMALIZER if needs_training(name) else "none"
    encoder = create_encoder(backbone, name, factor, upsampler_options=options, normalizer=normalizer)
    if encoder.normalizer.needs_fit:
        statistics = FeatureStatistics(encoder.embed_dim)
        statistics.update(torch.randn(2 * encoder.embed_dim, encoder.embed_dim))
        encoder.normalizer.fit(statistics)
    return encoder


def needs_training(upsampler: str) -> bool:
    """Return whether an upsampler of this name is trainable."""
    return bool(read_trait(upsampler, "trainable"))


def needs_function(upsampler: str) -> bool:
    """Return whether an upsampler of this name needs a function of the user."""
    return bool(read_trait(upsampler, "function_options"))


def list_ready(backbone: str, factor: float = 2) -> list[str]:
    """List, as `load_from_file` takes them, all that makes one map of a backbone's space and needs no training.

    Upsamplers with the options that they name as worth comparing, and the weights that ship for the backbone.
    """
    free = [name for name in UPSAMPLERS.names() if not needs_training(name) and not needs_function(name)]
    free = [name for name in free if read_trait(name, "keeps_space") != "no" and default_factor(name) != 1]
    named = [(f"{name}-{factor:g}x", preset) for name in free for preset in read_trait(name, "presets")]
    return ["?".join(filter(None, parts)) for parts in named] + shipped_weights(backbone, factor)


def shipped_weights(backbone: str, factor: float) -> list[str]:
    """List the names of the shipped weights for a backbone and a factor."""
    return [name for name in list_weights() if name.startswith(f"{backbone}/") and name.endswith(f"-{factor:g}x")]


def is_foreign(module: Backbone | SharpEncoder) -> bool:
    """Return whether a module runs a function of the user."""
    return isinstance(module, SharpEncoder) and bool(module.upsampler.function_options)


def backbone_passes(backbone: Backbone, function: Callable[[], object]) -> list[Tensor]:
    """Collect the batches that a backbone encodes during a call."""
    batches: list[Tensor] = []
    hook = backbone.register_forward_pre_hook(lambda module, arguments: batches.append(arguments[0]))
    try:
        function()
    finally:
        hook.remove()
    return batches


def _backbone_workload(backbone: Backbone, curve: str, factor: float, batch_size: int) -> Workload:
    native, patch = backbone.grid_size(backbone.input_size), backbone.patch_size
    grid = scale_length(native[0], factor), scale_length(native[1], factor)
    images, size = batch_size, backbone.input_size
    if curve == PASSES:
        tiles = math.prod(len(window_starts(*sides, overlap=0)) for sides in zip(grid, native, strict=True))
        # A single tile is the image itself.
        images *= 1 if tiles == 1 else 1 + tiles
    else:
        size = grid[0] * patch, grid[1] * patch
        if grid != native and not backbone.flexible:
            raise ConfigError(
                f"backbone {backbone.name!r} takes {native[0] * patch}x{native[1] * patch} pixels only, not "
                f"{size[0]}x{size[1]}"
            )
    return Workload(curve, factor, backbone, (images, 3, *size), math.prod(grid))


def _encoder_workload(curve: str, encoder: SharpEncoder, batch_size: int, key: str | None) -> Workload:
    # A fitted normalizer reads its buffers once, which a fake copy could not do.
    encoder.normalizer(torch.zeros(1, encoder.embed_dim, 1, 1, device=encoder.device))
    native = encoder.backbone.grid_size(encoder.backbone.input_size)
    cells = scale_length(native[0], encoder.factor) * scale_length(native[1], encoder.factor)
    return Workload(curve, encoder.factor, encoder, (batch_size, 3, *encoder.input_size), cells, key)
