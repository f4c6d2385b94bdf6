"""The type of every configuration key. What is not here does not exist: a mistyped key fails at once."""

from dataclasses import dataclass, field
from typing import Any

from featsharp.data.filters import MIN_SIZE
from featsharp.data.streams import SHUFFLE_BUFFER
from featsharp.training.least_squares import LinearFitConfig
from featsharp.training.objectives import ObjectiveConfig
from featsharp.training.objectives.multi_view import MultiViewConfig
from featsharp.training.optim import OptimConfig


@dataclass
class ModelConfig:
    """The backbone. ``name`` is what ``create_backbone`` takes; ``dtype`` is the autocast type of its passes."""

    name: str = "???"
    dtype: str = "auto"


@dataclass
class UpsamplerConfig:
    """``name`` and ``factor`` as ``create_upsampler`` takes them; ``options`` are its class's keyword arguments;
    ``dtype`` is the autocast type of training."""

    name: str = "???"
    factor: float = 2
    dtype: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class NormalizerConfig:
    """``num_samples`` images of ``dist_train_data_dir`` give the statistics, which ``cache`` keeps on disk."""

    name: str = "phi-s"
    num_samples: int = 512
    batch_size: int = 16
    cache: bool = True


@dataclass
class ViewsConfig:
    """See ``featsharp.data.views.ViewConfig``."""

    num_views: int = 5
    zoom: list[float] = field(default_factory=lambda: [1.0, 2.0])
    jitter_zoom: list[float] = field(default_factory=lambda: [0.95, 2.0])
    perspective: list[float] = field(default_factory=lambda: [0.01, 0.05])
    rotation: float = 5.0
    shift: float = 0.08
    flip: float = 0.0


@dataclass
class DataConfig:
    """Which images train: see ``featsharp.data.filters``; ``shuffle_buffer`` is for shards by URL or pipe."""

    min_size: int = MIN_SIZE
    filter: str | None = None
    shuffle_buffer: int = SHUFFLE_BUFFER


@dataclass
class FeatureCacheConfig:
    """``samples`` are trained on again and again, their backbone features kept in ``folder``; 0: always new ones."""

    samples: int = 0
    folder: str = "${output_root}/features"


@dataclass
class VizConfig:
    """``type`` is tensorboard, wandb, none, ``package.module:Class`` (a writer of your own, which is imported), or a
    list of these; ``entity``, ``project`` and ``mode`` are wandb's; ``num_images`` of ``val_data_dir`` are drawn and
    scored every time."""

    type: Any = "tensorboard"
    num_images: int = 4
    entity: str | None = None
    project: str = "featsharp"
    mode: str | None = None


@dataclass
class RunConfig:
    """A whole run. Paths may use ``~`` and environment variables."""

    train_data_dir: Any = "???"
    val_data_dir: Any = "???"
    dist_train_data_dir: Any = "???"
    output_base: str = "outputs"
    output_subdir: str = "???"
    output_root: str = "${output_base}/${output_subdir}"
    num_training_steps: int = 3000
    batch_size: int = 4
    accumulation_steps: int = 1
    num_workers: int = 1
    log_frequency: int = 10
    val_frequency: int = 1000
    checkpoint_frequency: int = 500
    seed: int = 0
    device: str = "auto"
    distributed_timeout: float = 600.0
    compile_model: bool = False
    compile_backend: str = "inductor"
    resume: bool = True
    force_resume: bool = False
    dry_run: bool = False
    progress: bool = True
    bias_buffer: bool = True
    spectral: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    upsampler: UpsamplerConfig = field(default_factory=UpsamplerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    normalizer: NormalizerConfig = field(default_factory=NormalizerConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    objective: ObjectiveConfig = field(default_factory=MultiViewConfig)  # of the class that its name says
    optim: OptimConfig = field(default_factory=OptimConfig)
    linear_fit: LinearFitConfig = field(default_factory=LinearFitConfig)
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)
    viz: VizConfig = field(default_factory=VizConfig)
