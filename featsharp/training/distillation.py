"""Distillation: a student learns the features of frozen teachers, upsampled (FeatSharp, arXiv 2502.16025, table 2).

The losses are those of the RADIO line: of a summary 1 - cosine; of the map, after PHI-S of the teacher (arXiv
2410.01680), the squared error, or 0.9 (1 - cosine) + 0.1 smooth L1 of AM-RADIO (arXiv 2312.06709). All teachers count
the same. A student has one head for the map and one for the summary of each teacher.

Shapes: the student's grid is (h, w) cells. A teacher encodes the same picture at (h, w) / factor cells, and its map is
upsampled to (h, w), so that every cell of the student has a target of its own; of a teacher that is not upsampled it is
an interpolated one, which is the baseline.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones import Backbone, create_backbone
from featsharp.backbones.student import STUDENT_FILE, Shape, StudentViT, check_shape, student_content
from featsharp.builder import content_key, create_encoder, load_from_file
from featsharp.checkpoint import write_checkpoint
from featsharp.data.loader import SampleDataset
from featsharp.data.views import ViewConfig, Views, base_view
from featsharp.device import autocast_dtype
from featsharp.errors import CheckpointError, ConfigError, unknown_name
from featsharp.layers.input_conditioner import InputConditioner
from featsharp.model import SharpEncoder
from featsharp.normalizers import create_normalizer
from featsharp.ops.resize import resize, size_of
from featsharp.settings import key
from featsharp.training.config import LoopConfig
from featsharp.training.distributed import World
from featsharp.training.feature_cache import CachedBackbone
from featsharp.training.objectives import Losses
from featsharp.training.objectives.base import autocast, check_finite, cosine_distance
from featsharp.training.optim import RateConfig
from featsharp.training.setup import expand_path
from featsharp.training.trainer import Loop, Validate

NO_UPSAMPLER = "none"


def cosine_and_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Average the spatial loss of AM-RADIO over cells: 0.9 (1 - cosine) + 0.1 smooth L1."""
    return 0.9 * cosine_distance(prediction, target) + 0.1 * F.smooth_l1_loss(prediction, target)


# Losses of maps [B, C, h, w] in normalised space.
SPATIAL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "cosine-l1": cosine_and_l1}


@dataclass
class StudentConfig:
    """The network that learns, see :class:`featsharp.backbones.student.Shape`."""

    size: int = key(224, least=1)
    patch_size: int = key(14, least=1)
    width: int = key(192, least=1)
    depth: int = key(12, least=1)
    num_heads: int = key(3, least=1)

    def shape(self, class_tokens: int) -> Shape:
        """Return the shape of the network; raises ConfigError for one that cannot be built."""
        shape = Shape(self.size, self.patch_size, self.width, self.depth, self.num_heads, class_tokens)
        check_shape(shape)
        return shape


@dataclass
class StudentRateConfig(RateConfig):
    """Rates of the student; ``weight_decay`` is decoupled, and of matrices only."""

    weight_decay: float = key(0.02, least=0)


@dataclass
class DistillConfig(LoopConfig):
    """A distillation run.

    Attributes:
        teachers: A backbone, or a list of them.
        upsamplers: Names or files for ``load_from_file``, "none" for none; one for all teachers or one for each.
        factor: Student's grid over that of the low-resolution pass of the teachers.
        spatial_loss: "mse" or "cosine-l1".
        spatial_weight, summary_weight: Of the two losses.
        dtype: Autocast type of teachers and student.
    """

    teachers: Any = "???"
    upsamplers: Any = NO_UPSAMPLER
    factor: int = key(2, least=1)
    spatial_loss: str = "mse"
    spatial_weight: float = key(1.0, least=0)
    summary_weight: float = key(1.0, least=0)
    dtype: str = "auto"
    student: StudentConfig = field(default_factory=StudentConfig)
    views: ViewConfig = field(default_factory=lambda: ViewConfig(num_views=1))
    optim: StudentRateConfig = field(default_factory=StudentRateConfig)


class Target(NamedTuple):
    """Features of a batch that a head learns, or gives."""

    spatial: Tensor  # [B, C, h, w]
    summary: Tensor | None  # [B, C_s]


class Teacher(NamedTuple):
    """A frozen teacher.

    Attributes:
        encoder: In eval mode, on its device.
        backbone: Of it, without the feature cache.
        low_res_size: (h, w) in pixels of its low-resolution pass.
    """

    encoder: SharpEncoder
    backbone: Backbone
    low_res_size: tuple[int, int]

    @property
    def channels(self) -> int:
        """Channels of its map: those of the backbone, times the maps of its upsampler (S2 has several)."""
        return self.encoder.embed_dim * self.encoder.upsampler.num_maps

    @torch.no_grad()
    def encode(self, images: Tensor, normalizer: Callable[[Tensor], Tensor], grid: tuple[int, int]) -> Target:
        """Compute the targets of images [B, 3, H, W] in [0, 1] for a student of a grid (h, w)."""
        summarises = self.encoder.backbone.summary_dim is not None
        out = self.encoder(
            self.encoder.input_conditioner(images),
            denormalize=True,
            return_summary=summarises,
            low_res_size=self.low_res_size,
        )
        maps = out.high_res.unflatten(1, (-1, self.encoder.embed_dim)).flatten(0, 1)
        spatial = normalizer(maps).unflatten(0, (len(images), -1)).flatten(1, 2)
        return Target(spatial if size_of(spatial) == grid else resize(spatial, grid), out.summary)


def open_teachers(config: DistillConfig, world: World) -> list[Teacher]:
    """Load the teachers of a run.

    Raises:
        ConfigError: For a student that cannot be built, no teacher, another number of upsamplers than of teachers,
            names that do not exist, and an upsampled grid that is not the student's.
    """
    names, upsamplers = _as_list(config.teachers), _as_list(config.upsamplers)
    config.student.shape(0)
    if not names:
        raise ConfigError("which teachers? Set teachers=NAME or teachers=[NAME,NAME]; see `featsharp ls backbones`")
    if len(upsamplers) == 1:
        upsamplers *= len(names)
    if len(upsamplers) != len(names):
        raise ConfigError(f"{len(names)} teachers have {len(upsamplers)} upsamplers; give one for all, or one for each")
    return [_open_teacher(*pair, config, world) for pair in zip(names, upsamplers, strict=True)]


def _open_teacher(name: str, upsampler: str, config: DistillConfig, world: World) -> Teacher:
    backbone = create_backbone(name)
    backbone.autocast_dtype = autocast_dtype(config.dtype, world.device)
    cached = config.feature_cache.samples > 0
    source = CachedBackbone(backbone, expand_path(config.feature_cache.folder)) if cached else backbone
    if upsampler == NO_UPSAMPLER:
        encoder = create_encoder(source, "identity", 1)
    else:
        encoder = load_from_file(upsampler, featurizer=source)
    side = config.student.size // config.student.patch_size
    if side % config.factor or encoder.factor not in (1, config.factor):
        raise ConfigError(
            f"the map of teacher {name!r} cannot match the student's: upsampler {upsampler!r} enlarges by "
            f"{encoder.factor:g}, factor={config.factor} is set, and the student has {side}x{side} cells. Take an "
            f"upsampler of {config.factor}x (or none), and a factor that divides {side}"
        )
    pixels = side // config.factor * backbone.patch_size
    if backbone.fit_size(pixels, pixels) != (pixels, pixels):
        height, width = backbone.input_size
        raise ConfigError(
            f"the map of teacher {name!r} cannot match the student's: it would have to encode {pixels}x{pixels} pixels "
            f"for {side}x{side} cells at {config.factor}x, and takes {height}x{width} only. Choose student.size, "
            f"student.patch_size and factor so that student.size / student.patch_size / factor is "
            f"{height // backbone.patch_size}"
        )
    return Teacher(encoder.to(world.device).eval().requires_grad_(False), backbone, (pixels, pixels))


def _as_list(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


class Student(nn.Module):
    """A student with its heads.

    Args:
        config: Of the network.
        teachers: For whose maps and summaries it has heads.
    """

    def __init__(self, config: StudentConfig, teachers: Sequence[Teacher]) -> None:
        super().__init__()
        summaries = [teacher.encoder.backbone.summary_dim for teacher in teachers]
        class_tokens = sum(channels is not None for channels in summaries)
        self.trunk = StudentViT(config.shape(class_tokens))
        self.spatial_heads = nn.ModuleList(head(config.width, teacher.channels) for teacher in teachers)
        # By the number of the teacher, as only some have a summary.
        self.summary_heads = nn.ModuleDict(
            {str(number): head(config.width, channels) for number, channels in enumerate(summaries) if channels}
        )
        self.input_conditioner = InputConditioner(self.trunk.mean, self.trunk.std)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) cells of its native size."""
        return self.trunk.grid_size(self.trunk.input_size)

    def forward(self, images: Tensor) -> list[Target]:
        """Predict what each teacher gives for images [B, 3, H, W] in [0, 1] of its native size."""
        features, summary = self.trunk(self.input_conditioner(images))
        tokens = features.flatten(2).transpose(1, 2)
        own = iter(() if summary is None else summary.split(self.trunk.embed_dim, 1))
        predicted = []
        for number, spatial_head in enumerate(self.spatial_heads):
            spatial = spatial_head(tokens).transpose(1, 2).unflatten(2, size_of(features))
            name = str(number)
            pooled = self.summary_heads[name](next(own)) if name in self.summary_heads else None
            predicted.append(Target(spatial, pooled))
        return predicted


def head(width: int, channels: int) -> nn.Sequential:
    """Build the head of RADIO's second version, without residual blocks: tokens [..., width] to [..., channels]."""
    hidden = 2 * width
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, channels))


class Distillation(nn.Module):
    """The losses of a student against its teachers, whose normalizers it holds.

    Args:
        teachers: Frozen.
        config: Of the run.

    Raises:
        ConfigError: For an unknown loss or normalizer.
    """

    def __init__(self, teachers: Sequence[Teacher], config: DistillConfig) -> None:
        super().__init__()
        if config.spatial_loss not in SPATIAL_LOSSES:
            raise unknown_name("spatial_loss", config.spatial_loss, SPATIAL_LOSSES)
        self.teachers = tuple(teachers)  # no submodules: checkpoints have no weights of theirs
        self.spatial_loss = SPATIAL_LOSSES[config.spatial_loss]
        self.weights = config.spatial_weight, config.summary_weight
        self.normalizers = [
            create_normalizer(config.normalizer.name, teacher.encoder.embed_dim) for teacher in teachers
        ]
        self._saved = nn.ModuleList(self.normalizers)  # beside the typed list

    def forward(self, student: Student, images: Tensor, dtype: torch.dtype | None = None) -> Losses:
        """Compute the losses of images [B, 3, H, W] in [0, 1]; ``dtype`` is the autocast type of the student."""
        with autocast(images, dtype):
            predicted = student(images)
        spatial, summary = [], []
        for teacher, normalizer, given in zip(self.teachers, self.normalizers, predicted, strict=True):
            target = teacher.encode(images, normalizer, student.grid)
            spatial.append(self.spatial_loss(given.spatial.float(), target.spatial.float()))
            if given.summary is not None and target.summary is not None:
                summary.append(cosine_distance(given.summary.float(), target.summary.float()))
        of_maps = torch.stack(spatial).mean()
        of_summaries = torch.stack(summary).mean() if summary else torch.zeros_like(of_maps)
        total = self.weights[0] * of_maps + self.weights[1] * of_summaries
        return Losses(total, of_maps, {"summary": of_summaries})


class StudentTrainer(Loop[Views]):
    """Training of a student; its checkpoints are ``student:FILE`` for ``create_backbone``.

    Args:
        student: On the device of ``world``.
        objective: On the same device, its normalizers fitted (or about to be loaded by :meth:`resume`).
        dataset, config, folder, world, validate, skipped: As for :class:`Loop`.
    """

    config: DistillConfig
    kind = STUDENT_FILE

    def __init__(
        self,
        student: Student,
        objective: Distillation,
        dataset: SampleDataset[Views],
        config: DistillConfig,
        folder: Path,
        world: World,
        *,
        validate: Validate | None = None,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.student, self.distillation = student, objective
        self._teachers = [content_key(teacher.encoder) for teacher in objective.teachers]
        super().__init__(
            student, objective, dataset, config, folder, world,
            dtype=config.dtype, validate=validate, skipped=skipped,
        )  # fmt: skip

    def trained_parts(self) -> nn.ModuleDict:
        return nn.ModuleDict({"student": self.student})

    def build_optimizer(self) -> torch.optim.Optimizer:
        config, parameters = self.config.optim, list(self.student.parameters())
        matrices = {"name": "matrices", "params": [p for p in parameters if p.ndim > 1]}
        others = {"name": "others", "params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
        groups = [
            {"lr": config.learning_rate, "weight_decay": config.weight_decay, **group} for group in (matrices, others)
        ]
        return torch.optim.NAdam(groups, decoupled_weight_decay=True)

    def backward(self, samples: Views, loss_scale: float) -> Losses:
        losses = self.distillation(self.student, base_view(samples)[0], self.autocast_dtype)
        check_finite(losses.total)
        (losses.total * loss_scale).backward()
        return Losses(
            losses.total.detach(), losses.reconstruction.detach(), {"summary": losses.terms["summary"].detach()}
        )

    def write(self, path: Path, config: dict[str, Any], training: dict[str, Any]) -> None:
        content = student_content(self.student.trunk)
        training = {**training, "teachers": self._teachers}
        write_checkpoint(path, {**content, "config": config, "training": training}, STUDENT_FILE)

    def check_model(self, content: Mapping[str, Any], path: Path) -> None:
        if content["training"]["teachers"] != self._teachers:
            raise CheckpointError(
                f"checkpoint {path} was taught by other teachers: a backbone or an upsampler of that name now has "
                "other weights"
            )
