"""Train an upsampler for a backbone, without labels.

    python -m featsharp.train +model=vits14-focus +upsampler=featsharp-2x train_data_dir=photos num_training_steps=500
    torchrun --nproc-per-node=8 -m featsharp.train +model=siglip2 +upsampler=featsharp-4x train_data_dir=shards

Configuration groups and every default are in ``featsharp/configs``; ``dry_run=true`` prints the plan and stops.
Artifacts go to ``output_base/output_subdir``: ``last.pth``, ``best.pth``, ``config.yaml`` and what ``viz.type`` writes.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from featsharp.backbones import create_backbone
from featsharp.builder import create_encoder
from featsharp.checkpoint import read_checkpoint, restoring
from featsharp.configs.compose import compose, flatten, public_form, to_yaml
from featsharp.configs.schema import RunConfig
from featsharp.data.filters import ImageFilter
from featsharp.data.loader import StepSampler, ViewBatch, ViewDataset, check_repeatable, load_views
from featsharp.data.sources import ImageMixture, ImageSource
from featsharp.data.views import ViewConfig, base_view
from featsharp.device import autocast_dtype
from featsharp.errors import CheckpointError, ConfigError, DataError, FeatSharpError
from featsharp.files import remove_leftovers, write_file
from featsharp.memory import keep_freed_memory
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics, StatisticsKey, fit_with_cache
from featsharp.terminal import parse_verbosity, set_up_terminal
from featsharp.training.distributed import (
    World,
    copy_from_main,
    merge_statistics,
    object_from_main,
    start_world,
    stop_world,
)
from featsharp.training.feature_cache import remember_features
from featsharp.training.least_squares import check_linear_fit, fit_linear
from featsharp.training.loggers import NullWriter, VizWriter, get_visualizer
from featsharp.training.objectives import create_objective
from featsharp.training.signals import Terminated
from featsharp.training.trainer import LAST, LoopConfig, Trainer
from featsharp.urls import redact_url
from featsharp.validation import ValidationSamples

logger = logging.getLogger("featsharp.train")  # also where this module is __main__

# Keys that a resumed run may change: they change how long, where and how closely watched, not what a step does. Workers
# do where there are streams, which the trainer looks after.
FREE_TO_CHANGE = {
    "compile_backend", "compile_model", "device", "distributed_timeout", "dry_run", "force_resume", "log_frequency",
    "val_frequency", "checkpoint_frequency", "num_workers", "output_base", "output_root", "progress", "resume",
    "val_data_dir", "num_training_steps", "normalizer.cache", "feature_cache.folder", "viz.type", "viz.num_images",
    "viz.entity", "viz.project", "viz.mode",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Compose, build, train; returns the exit status: 1 for an error, 130 for Ctrl-C, 143 for SIGTERM."""
    verbosity, arguments = parse_verbosity(sys.argv[1:] if arguments is None else arguments)
    set_up_terminal(verbosity, usual=logging.INFO)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    keep_freed_memory()
    try:
        config = compose(arguments)
        if config.dry_run:
            print(to_yaml(config), end="")
            return 0
        train(config)
    except FeatSharpError as error:
        print(f"featsharp train: {_whose()}{redact_url(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("featsharp train: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Terminated as stop:
        stop_world()
        print(f"featsharp train: {_whose()}{stop}; the same command goes on from there", file=sys.stderr)
        return 128 + signal.SIGTERM
    stop_world()
    return 0


def train(config: RunConfig) -> Trainer:
    """Run a whole training; returns the finished trainer.

    Raises:
        Terminated: When SIGTERM came; everything is saved.
    """
    if config.train_data_dir is None:
        raise ConfigError("which images? Set train_data_dir=FOLDER (images or tars), or the variable FEATSHARP_DATA")
    folder = Path(os.path.expandvars(config.output_root)).expanduser()
    last = folder / LAST
    world = start_world(config.device, config.distributed_timeout)
    earlier = object_from_main(lambda: _read_earlier(last, config), world)
    backbone = create_backbone(config.model.name, autocast_dtype=autocast_dtype(config.model.dtype, world.device))
    torch.manual_seed(config.seed)
    encoder = create_encoder(
        backbone,
        config.upsampler.name,
        config.upsampler.factor,
        upsampler_options=config.upsampler.options,
        normalizer=config.normalizer.name,
        bias_buffer=config.bias_buffer,
    ).to(world.device)
    objective = create_objective(encoder, config.objective)
    if config.linear_fit.samples and earlier is None:
        check_linear_fit(encoder.upsampler, config.linear_fit.ridge)  # before the statistics, which take long
    mixture = _open_mixture(config.train_data_dir, config)
    if config.feature_cache.samples:
        check_repeatable(mixture)
    validate = ValidationSamples(config.val_data_dir, config.viz.num_images) if world.is_main else None
    views = dataclasses.asdict(config.views)
    views = {key: tuple(value) if isinstance(value, list) else value for key, value in views.items()}
    dataset = ViewDataset(mixture, objective.view_size(encoder), ViewConfig(**views), config.seed)
    with contextlib.ExitStack() as stack:
        writer: VizWriter = NullWriter()
        if earlier is None:
            writer = stack.enter_context(_reporting(config, folder, world))
            fit_normalizer(encoder, config, world)
        if config.feature_cache.samples:
            remember_features(backbone, Path(os.path.expandvars(config.feature_cache.folder)).expanduser())
        skipped = []
        if config.linear_fit.samples and earlier is None:
            skipped = _fit_linear(encoder, dataset, config, world)
        trainer = Trainer(
            encoder,
            objective,
            dataset,
            _loop_config(config, encoder, world),
            folder,
            writer,
            world,
            run_config=public_form(config),
            validate=validate,
            progress=config.progress,
        )
        trainable = sum(p.numel() for p in trainer.trained.parameters())
        logger.info("%s on %s: %d trainable parameters", config.upsampler.name, backbone.name, trainable)
        if earlier is not None:
            trainer.restore(earlier, last, force=config.force_resume)
            logger.info("resuming %s at step %d", last, trainer.step)
            trainer.writer = stack.enter_context(_reporting(config, folder, world, trainer.step))
        else:
            trainer.skipped.add(skipped)
            if world.is_main:  # every process has opened the same sources
                trainer.skipped.add(mixture.skipped)
                if config.linear_fit.samples:
                    trainer.save()  # a run that is killed in its first steps need not fit again
        del earlier
        trainer.run()
    return trainer


def _loop_config(config: RunConfig, encoder: SharpEncoder, world: World) -> LoopConfig:
    return LoopConfig(
        num_steps=config.num_training_steps,
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        num_workers=config.num_workers,
        log_frequency=config.log_frequency,
        val_frequency=config.val_frequency,
        checkpoint_frequency=config.checkpoint_frequency,
        seed=config.seed,
        distinct_samples=config.feature_cache.samples,
        spectral=config.spectral,
        low_res_size=encoder.backbone.input_size,
        autocast_dtype=autocast_dtype(config.upsampler.dtype, world.device),
        compile_backend=config.compile_backend if config.compile_model else None,
        optim=config.optim,
    )


@contextlib.contextmanager
def _reporting(config: RunConfig, folder: Path, world: World, step: int = 0) -> Iterator[VizWriter]:
    """Note down the configuration and open what ``viz`` names, which is closed whatever happens; on rank 0 alone.

    Only for runs that really start, or go on after ``step``: what an earlier one has written stays as it is until then.
    """
    if not world.is_main:
        yield NullWriter()
        return
    remove_leftovers(folder)
    write_file(folder / "config.yaml", to_yaml(config).encode())
    viz = config.viz
    writers = get_visualizer(viz.type, folder, entity=viz.entity, project=viz.project, mode=viz.mode, step=step)
    with contextlib.closing(writers):
        writers.config(public_form(config))
        yield writers


def _open_mixture(data_dir: object, config: RunConfig) -> ImageMixture:
    keep = ImageFilter(config.data.min_size, config.data.filter)
    return ImageMixture.from_data_dir(data_dir, seed=config.seed, keep=keep, shuffle_buffer=config.data.shuffle_buffer)


def _fit_linear(encoder: SharpEncoder, dataset: ViewDataset, config: RunConfig, world: World) -> list[tuple[str, str]]:
    """Fit FeatSharp's linear weight, each process on its share of the samples; returns what was skipped."""
    from tqdm import tqdm

    steps, batches = _first_samples(dataset, config.linear_fit.samples, config.batch_size, config, world)
    disable = not (config.progress and world.is_main)
    shown = tqdm(batches, total=steps, desc="linear fit", unit="batch", file=sys.stderr, disable=disable)
    return fit_linear(encoder, shown, config.linear_fit.ridge, encoder.backbone.input_size, world)


def fit_normalizer(encoder: SharpEncoder, config: RunConfig, world: World) -> None:
    """Fit PHI-S on images of ``dist_train_data_dir``, each process on its share, or take the fit from the cache."""
    if not encoder.normalizer.needs_fit:
        return
    backbone, settings = encoder.backbone, config.normalizer
    mixture = _open_mixture(config.dist_train_data_dir, config)

    def collect() -> FeatureStatistics:
        return collect_statistics(encoder, mixture, settings.num_samples, settings.batch_size, config, world)

    if not settings.cache or world.size > 1 or mixture.has_streams:
        # With several processes all must take part, whatever each one's disk holds; streams have no fingerprint.
        encoder.normalizer.fit(collect())
        copy_from_main(encoder.normalizer.buffers(), world)
        return
    key = StatisticsKey(
        backbone=backbone.name,
        weights_sha256=backbone.weights_hash(),
        input_size=backbone.input_size,
        data=data_fingerprint(mixture, settings.num_samples),
        samples=settings.num_samples,
        seed=config.seed,
    )
    fit_with_cache(encoder.normalizer, key, collect)


@torch.no_grad()
def collect_statistics(
    encoder: SharpEncoder, mixture: ImageMixture, samples: int, batch_size: int, config: RunConfig, world: World
) -> FeatureStatistics:
    """Streaming statistics of the backbone's features over ``samples`` random crops, merged over all processes."""
    backbone = encoder.backbone
    dataset = ViewDataset(mixture, backbone.input_size, ViewConfig(num_views=1), config.seed)
    statistics = FeatureStatistics(backbone.embed_dim)
    for views, _ in _first_samples(dataset, samples, batch_size, config, world)[1]:
        images = base_view(views)[0].to(world.device)
        statistics.update(backbone(encoder.input_conditioner(images)).features)
    return merge_statistics(statistics, world)


def _first_samples(
    dataset: ViewDataset, samples: int, batch_size: int, config: RunConfig, world: World
) -> tuple[int, Iterator[ViewBatch]]:
    """This process's share of the first samples (or a few more), in batches, and how many of these there are."""
    steps = -(-samples // (batch_size * world.size))
    sampler = StepSampler(0, steps, batch_size, world.rank, world.size)
    return steps, load_views(dataset, sampler, config.num_workers)


def data_fingerprint(mixture: ImageMixture, samples: int) -> str:
    """A tag for the first samples of a mixture without streams: the content of their files, not only their names."""
    digests: dict[tuple[int, int], bytes] = {}
    whole = hashlib.sha256(b"" if mixture.keep == ImageFilter() else repr(mixture.keep).encode())
    for n in range(samples):
        place = mixture.locate(n)
        if place not in digests:
            source = mixture.sources[place[0]]
            assert isinstance(source, ImageSource)
            try:
                content = source.read(place[1])
            except DataError:
                content = b""  # passed over in the statistics, too
            digests[place] = hashlib.sha256(content).digest()
        whole.update(digests[place])
    return whole.hexdigest()[:16]


def _read_earlier(last: Path, config: RunConfig) -> dict[str, Any] | None:
    """The checkpoint to go on from; None for a new run. CheckpointError for that of a different run."""
    if not last.exists():
        return None
    if not config.resume:
        raise ConfigError(
            f"{last} exists and resume=false would overwrite it; choose another output_base, or move it away"
        )
    # A setting that is younger than the checkpoint had its default's effect then.
    content = read_checkpoint(last)
    with restoring(last):
        saved = flatten(dataclasses.asdict(RunConfig())) | flatten(content["config"] or {})
    present = flatten(public_form(config))
    different = [
        f"{key} {present[key]!r} instead of {saved.get(key)!r}"
        for key in present
        if key not in FREE_TO_CHANGE and present[key] != saved.get(key)
    ]
    if different:
        problem = f"{last} was trained with another configuration: {'; '.join(different)}"
        if not config.force_resume:
            raise CheckpointError(
                f"cannot resume: {problem}. Choose another output_base, move it away, or go on with force_resume=true"
            )
        logger.warning("force_resume: %s", problem)
        if content["training"]:
            content["training"]["places"] = {}  # perhaps of other streams
    return content


def _whose() -> str:
    """Which process speaks, where there are several."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return f"process {rank} of {size}: " if size != "1" else ""


if __name__ == "__main__":
    sys.exit(main())
