"""The configuration of a training run: every key, its type, default and range. A mistyped key fails at once.

``featsharp/configs/base_config.yaml`` mirrors it and describes each key.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from featsharp.data.filters import MIN_SIZE
from featsharp.data.streams import SHUFFLE_BUFFER
from featsharp.data.views import ViewConfig
from featsharp.errors import ConfigError
from featsharp.names import readable
from featsharp.settings import key
from featsharp.training.least_squares import LinearFitConfig
from featsharp.training.loggers import writer_names
from featsharp.training.objectives import ObjectiveConfig
from featsharp.training.objectives.multi_view import MultiViewConfig
from featsharp.training.optim import OptimConfig, RateConfig
from featsharp.urls import redact_setting

WANDB_MODES = ("online", "offline", None)


@dataclass
class ModelConfig:
    """The backbone: ``name`` as for ``create_backbone``; ``dtype`` is the autocast type of its passes."""

    name: str = "???"
    dtype: str = "auto"


@dataclass
class UpsamplerConfig:
    """The upsampler: ``name``, ``factor`` and ``options`` as for ``create_upsampler``.

    ``dtype`` is the autocast type of training.
    """

    name: str = "???"
    factor: float = 2
    dtype: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class NormalizerConfig:
    """Statistics of ``num_samples`` images of ``dist_train_data_dir``, kept on disk with ``cache``."""

    name: str = "phi-s"
    num_samples: int = key(512, least=1)
    batch_size: int = key(16, least=1)
    cache: bool = key(True, free=True)


@dataclass
class DataConfig:
    """Filter of images (see ``featsharp.data.filters``); ``shuffle_buffer`` is for shards by URL or pipe."""

    min_size: int = key(MIN_SIZE, least=1)
    filter: str | None = None
    shuffle_buffer: int = key(SHUFFLE_BUFFER, least=1)


@dataclass
class FeatureCacheConfig:
    """Training on ``samples`` repeatedly, with their backbone features cached in ``folder``; 0: always new ones."""

    samples: int = key(0, least=0)
    folder: str = key("${output_root}/features", free=True)


@dataclass
class VizConfig:
    """Writers of the log.

    ``type`` is tensorboard, wandb, none, ``package.module:Class`` (a custom writer, which is imported), or a list of
    these; ``entity``, ``project`` and ``mode`` are for wandb; ``num_images`` of ``val_data_dir`` are drawn and scored
    every time.
    """

    type: Any = key("tensorboard", free=True)
    num_images: int = key(4, least=1, free=True)
    entity: str | None = key(None, free=True)
    project: str = key("featsharp", free=True)
    mode: str | None = key(None, free=True)


@dataclass
class LoopConfig:
    """The keys of every training run. Paths may use ``~`` and environment variables."""

    train_data_dir: Any = "???"
    val_data_dir: Any = key("???", free=True)
    dist_train_data_dir: Any = "???"
    output_base: str = key("outputs", free=True)
    output_subdir: str = "???"
    output_root: str = key("${output_base}/${output_subdir}", free=True)
    num_training_steps: int = key(3000, least=0, free=True)
    batch_size: int = key(4, least=1)
    accumulation_steps: int = key(1, least=1)
    # Not free for streams, which check_continuation checks.
    num_workers: int = key(1, least=0, free=True)
    log_frequency: int = key(10, least=0, free=True)
    val_frequency: int = key(1000, least=0, free=True)
    checkpoint_frequency: int = key(500, least=0, free=True)
    seed: int = key(0, least=0)
    deterministic: bool = key(False, free=True)
    device: str = key("auto", free=True)
    distributed_timeout: float = key(600.0, least=1, free=True)
    compile_model: bool = key(False, free=True)
    compile_backend: str = key("inductor", free=True)
    resume: bool = key(True, free=True)
    force_resume: bool = key(False, free=True)
    dry_run: bool = key(False, free=True)
    progress: bool = key(True, free=True)
    data: DataConfig = field(default_factory=DataConfig)
    normalizer: NormalizerConfig = field(default_factory=NormalizerConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    optim: RateConfig = field(default_factory=RateConfig)
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)
    viz: VizConfig = field(default_factory=VizConfig)


@dataclass
class RunConfig(LoopConfig):
    """A training run of an upsampler."""

    bias_buffer: bool = True
    spectral: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    upsampler: UpsamplerConfig = field(default_factory=UpsamplerConfig)
    objective: ObjectiveConfig = field(default_factory=MultiViewConfig)  # of the class that its name says
    optim: OptimConfig = field(default_factory=OptimConfig)
    linear_fit: LinearFitConfig = field(default_factory=LinearFitConfig)


def check_values(config: LoopConfig) -> None:
    """Raise ConfigError for a value that would fail only in the middle of a run."""
    writer_names(config.viz.type)
    if config.viz.mode not in WANDB_MODES:
        raise ConfigError(f"viz.mode must be online, offline or null; got {config.viz.mode!r}")
    _check_ranges(config)


def walk_keys(config: Any, prefix: str = "") -> "Iterator[tuple[str, dataclasses.Field[Any], Any]]":
    """Yield the dotted name, field and value of every key of a configuration, those of its groups too."""
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from walk_keys(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry, value


def _check_ranges(config: Any) -> None:
    """Raise ConfigError for the first key of a configuration that is out of its range."""
    for name, entry, value in walk_keys(config):
        limits = entry.metadata
        if "least" in limits and not limits["least"] <= value < math.inf:
            raise ConfigError(f"{name} must be at least {limits['least']:g} and finite; got {value}")
        if "most" in limits and value > limits["most"]:
            raise ConfigError(f"{name} must be at most {limits['most']:g}; got {value}")
        if "least_low" in limits:
            low = limits["least_low"]
            if len(value) != 2 or not low <= value[0] <= value[1] < math.inf:
                raise ConfigError(f"{name} must be [low, high] with {low:g} <= low <= high, finite; got {value}")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration to dotted keys; options of an upsampler stay together."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and name != "options":
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def public_form(config: LoopConfig) -> dict[str, Any]:
    """Convert a configuration to the plain values that are saved, logged and compared; URLs without their secrets."""
    return {name: _without_secrets(value) for name, value in dataclasses.asdict(config).items()}


def to_yaml(config: LoopConfig) -> str:
    """Format the public form of a configuration as YAML, as it is saved beside the checkpoints."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(public_form(config)))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        return readable(redact_setting(value))
    if isinstance(value, Mapping):
        return {name: _without_secrets(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(entry) for entry in value]
    return value
