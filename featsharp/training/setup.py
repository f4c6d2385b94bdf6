"""From a configuration to the objects of a run: encoder, objective, data, writer; and the fits before step 1."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone
from featsharp.builder import create_encoder
from featsharp.checkpoint import ENCODER_FILE, FileKind
from featsharp.data.filters import ImageFilter
from featsharp.data.loader import Batch, S, SampleDataset, StepSampler, ViewDataset, check_repeatable, load_batches
from featsharp.data.mixture import ImageMixture
from featsharp.data.sources import ImageSource
from featsharp.data.views import ViewConfig, base_view
from featsharp.device import autocast_dtype, deterministic_algorithms, usual_defaults
from featsharp.errors import ConfigError, DataError
from featsharp.files import check_writable, remove_leftovers, write_file
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics, StatisticsKey, fit_with_cache
from featsharp.normalizers.base import Normalizer
from featsharp.terminal import with_progress
from featsharp.training.config import LoopConfig, RunConfig, public_form, to_yaml
from featsharp.training.distributed import World, copy_from_main, merge_statistics, object_from_main, start_world
from featsharp.training.feature_cache import CachedBackbone
from featsharp.training.least_squares import check_linear_fit, fit_linear
from featsharp.training.loggers import NullWriter, VizWriter, get_visualizer
from featsharp.training.objectives import Objective, create_objective
from featsharp.training.resume import read_earlier
from featsharp.training.trainer import LAST, Loop

logger = logging.getLogger(__name__)


class Parts(NamedTuple):
    """The objects that a run trains and trains on."""

    backbone: Backbone  # without the feature cache
    encoder: SharpEncoder  # on the device of the run
    objective: Objective
    dataset: SampleDataset[Any]


def expand_path(path: str) -> Path:
    """Expand ``~`` and environment variables in a path of the configuration."""
    return Path(os.path.expandvars(path)).expanduser()


def build(config: RunConfig, world: World) -> Parts:
    """Build the objects of a run; nothing is fitted yet.

    Raises:
        ConfigError: For names or settings that do not exist or do not fit together.
        DataError: When ``train_data_dir`` holds no images.
    """
    backbone = create_backbone(config.model.name, autocast_dtype=autocast_dtype(config.model.dtype, world.device))
    wrapped = backbone
    if config.feature_cache.samples:
        wrapped = CachedBackbone(wrapped, expand_path(config.feature_cache.folder))
    if config.compile_model:
        from featsharp.training.uncompiled import UncompiledBackbone

        wrapped = UncompiledBackbone(wrapped)
    torch.manual_seed(config.seed)
    encoder = create_encoder(
        wrapped,
        config.upsampler.name,
        config.upsampler.factor,
        upsampler_options=config.upsampler.options,
        normalizer=config.normalizer.name,
        bias_buffer=config.bias_buffer,
    ).to(world.device)
    objective = create_objective(encoder, config.objective)
    if config.linear_fit.samples:
        check_linear_fit(encoder.upsampler, config.linear_fit.ridge)  # before the statistics, which take long
    mixture = open_mixture(config.train_data_dir, config)
    if config.feature_cache.samples:
        check_repeatable(mixture)
    dataset = objective.open_dataset(encoder, mixture, config.views, config.seed)
    return Parts(backbone, encoder, objective, dataset)


@usual_defaults()
def fit_before_training(parts: Parts, config: RunConfig, world: World) -> list[tuple[str, str]]:
    """Fit the normalizer and, with ``linear_fit``, the upsampler's linear weight, each process on its share.

    Returns:
        Names of skipped images, and reasons: those of the linear fit, whose images are those of the training.
    """
    encoder = parts.encoder
    fit_normalizer(encoder.normalizer, parts.backbone, encoder.input_conditioner, config, world)
    if not config.linear_fit.samples:
        return []
    steps, batches = first_samples(parts.dataset, config.linear_fit.samples, config.batch_size, config, world)
    shown = with_progress(batches, "linear fit", config.progress and world.is_main, total=steps, unit="batch")
    return fit_linear(encoder, parts.objective, shown, config.linear_fit.ridge, encoder.backbone.input_size, world)


@dataclass
class Start:
    """A run before its first step.

    Attributes:
        config: Of the run.
        folder: Of its results, writable.
        world: Rank of this process.
        earlier: Content of the checkpoint that it goes on from, on every process; None: it is new.
        stack: Closes what the run opens.
        writer: Opened once nothing of the configuration can be wrong any more.
    """

    config: LoopConfig
    folder: Path
    world: World
    earlier: dict[str, Any] | None
    stack: contextlib.ExitStack
    writer: VizWriter | None = None

    def open_writer(self, step: int = 0) -> None:
        """Open the writer of a run that starts or resumes after ``step``; see :func:`open_writer`."""
        self.writer = self.stack.enter_context(open_writer(self.config, self.folder, self.world, step))

    def train(self, trainer: Loop[Any]) -> None:
        """Train to the end, from the earlier checkpoint where there is one."""
        if self.earlier is not None:
            trainer.restore(self.earlier, self.folder / LAST)
            self.earlier = None  # its memory
            self.open_writer(trainer.step)
        assert self.writer is not None
        trainer.run(self.writer)


@contextlib.contextmanager
def start_run(config: LoopConfig, kind: FileKind = ENCODER_FILE) -> Iterator[Start]:
    """Start the processes of a run, and read the checkpoint of an earlier one in its folder.

    Raises:
        ConfigError: Without ``train_data_dir``, or for an earlier run that ``resume=false`` would overwrite.
        CheckpointError: For an earlier run with another configuration.
    """
    if config.train_data_dir is None:
        raise ConfigError("which images? Set train_data_dir=FOLDER (images or tars), or the variable FEATSHARP_DATA")
    folder = expand_path(config.output_root)
    with contextlib.ExitStack() as stack:
        if config.deterministic:
            stack.enter_context(deterministic_algorithms())
        world = start_world(config.device, config.distributed_timeout)
        object_from_main(lambda: check_writable(folder), world)
        earlier = object_from_main(lambda: read_earlier(folder / LAST, config, kind), world)
        yield Start(config, folder, world, earlier, stack)


@contextlib.contextmanager
def open_writer(config: LoopConfig, folder: Path, world: World, step: int = 0) -> Iterator[VizWriter]:
    """Save the configuration and open the writers of ``viz.type``, which are closed in any case; on rank 0 alone.

    Call it when a run starts or resumes after ``step``: until then the files of an earlier one stay unchanged.
    """
    if not world.is_main:
        yield NullWriter()
        return
    remove_leftovers(folder)
    write_file(folder / "config.yaml", to_yaml(config).encode())
    logger.info("writing to %s: checkpoints, config.yaml%s", folder, "" if config.viz.type == "none" else ", logs")
    viz = config.viz
    writers = get_visualizer(viz.type, folder, entity=viz.entity, project=viz.project, mode=viz.mode, step=step)
    with contextlib.closing(writers):
        writers.config(public_form(config))
        yield writers


def open_mixture(data_dir: object, config: LoopConfig) -> ImageMixture:
    """Open the images of ``train_data_dir`` or ``dist_train_data_dir``."""
    keep = ImageFilter(config.data.min_size, config.data.filter)
    return ImageMixture.from_data_dir(data_dir, seed=config.seed, keep=keep, shuffle_buffer=config.data.shuffle_buffer)


def first_samples(
    dataset: SampleDataset[S], samples: int, batch_size: int, config: LoopConfig, world: World
) -> tuple[int, Iterator[Batch[S]]]:
    """Load this process's share of the first samples (or a few more): the number of batches, and the batches."""
    steps = -(-samples // (batch_size * world.size))
    sampler = StepSampler(0, steps, batch_size, world.rank, world.size)
    return steps, load_batches(dataset, sampler, config.num_workers)


def fit_normalizer(
    normalizer: Normalizer, backbone: Backbone, whiten: Callable[[Tensor], Tensor], config: LoopConfig, world: World
) -> None:
    """Fit to images of ``dist_train_data_dir``, each process on its share, or take the fit from the cache."""
    if not normalizer.needs_fit:
        return
    mixture = open_mixture(config.dist_train_data_dir, config)

    def collect() -> FeatureStatistics:
        return collect_statistics(backbone, whiten, mixture, config, world)

    if not config.normalizer.cache or world.size > 1 or mixture.has_streams:
        # With several processes all must take part, though their disks may differ; streams have no fingerprint.
        normalizer.fit(collect())
        copy_from_main(normalizer.buffers(), world)
        return
    samples = config.normalizer.num_samples
    key = StatisticsKey(
        backbone=backbone.name,
        weights_sha256=backbone.weights_hash(),
        input_size=backbone.input_size,
        data=compute_fingerprint(mixture, samples),
        samples=samples,
        seed=config.seed,
    )
    fit_with_cache(normalizer, key, collect)


@torch.no_grad()
def collect_statistics(
    backbone: Backbone, whiten: Callable[[Tensor], Tensor], mixture: ImageMixture, config: LoopConfig, world: World
) -> FeatureStatistics:
    """Collect statistics of the features of ``normalizer.num_samples`` random crops over all processes."""
    dataset = ViewDataset(mixture, backbone.input_size, ViewConfig(num_views=1), config.seed)
    statistics = FeatureStatistics(backbone.embed_dim)
    settings = config.normalizer
    for views, _ in first_samples(dataset, settings.num_samples, settings.batch_size, config, world)[1]:
        statistics.update(backbone(whiten(base_view(views)[0].to(world.device))).features)
    return merge_statistics(statistics, world)


def compute_fingerprint(mixture: ImageMixture, samples: int) -> str:
    """Hash the first samples of a mixture without streams: the content of their files, not only their names."""
    digests: dict[tuple[int, int], bytes] = {}
    whole = hashlib.sha256(b"" if mixture.keep == ImageFilter() else repr(mixture.keep).encode())
    for n in range(samples):
        location = mixture.locate(n)
        if location not in digests:
            source = mixture.sources[location[0]]
            assert isinstance(source, ImageSource)
            try:
                content = source.read(location[1])
            except DataError:
                content = b""  # skipped in the statistics, too
            digests[location] = hashlib.sha256(content).digest()
        whole.update(digests[location])
    return whole.hexdigest()[:16]
