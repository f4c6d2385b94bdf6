"""Train an upsampler for a backbone, without labels.

    python -m featsharp.train +model=vits14-focus +upsampler=featsharp-2x train_data_dir=photos num_training_steps=500
    torchrun --nproc-per-node=8 -m featsharp.train +model=siglip2 +upsampler=featsharp-4x train_data_dir=shards

``featsharp train -h`` describes arguments and results.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from featsharp.errors import ConfigError
from featsharp.files import check_writable
from featsharp.training.command import run_command

if TYPE_CHECKING:
    from featsharp.training.config import RunConfig
    from featsharp.training.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Train by command-line arguments; returns the exit status, see :func:`featsharp.training.command.run_command`."""
    return run_command("train", __doc__ or "", _compose, train, arguments)


def _compose(overrides: Sequence[str]) -> "RunConfig":
    from featsharp.configs.compose import compose

    return compose(overrides)


def train(config: "RunConfig") -> "Trainer":
    """Run a training to its end; returns the finished trainer.

    Raises:
        Terminated: On SIGTERM, after everything is saved.
    """
    from featsharp.device import deterministic_algorithms
    from featsharp.training.distributed import object_from_main, start_world
    from featsharp.training.resume import read_earlier
    from featsharp.training.setup import build, expand_path, fit_before_training, open_writer
    from featsharp.training.trainer import LAST, Trainer
    from featsharp.validation import ValidationSamples

    if config.train_data_dir is None:
        raise ConfigError("which images? Set train_data_dir=FOLDER (images or tars), or the variable FEATSHARP_DATA")
    folder = expand_path(config.output_root)
    with contextlib.ExitStack() as stack:
        if config.deterministic:
            stack.enter_context(deterministic_algorithms())
        world = start_world(config.device, config.distributed_timeout)
        object_from_main(lambda: check_writable(folder), world)
        earlier = object_from_main(lambda: read_earlier(folder / LAST, config), world)
        parts = build(config, world)
        validate = ValidationSamples(config.val_data_dir, config.viz.num_images) if world.is_main else None
        skipped: list[tuple[str, str]] = []
        if earlier is None:
            writer = stack.enter_context(open_writer(config, folder, world))
            skipped = fit_before_training(parts, config, world)
        trainer = Trainer(
            parts.encoder, parts.objective, parts.dataset, config, folder, world, validate=validate, skipped=skipped
        )
        if earlier is not None:
            trainer.restore(earlier, folder / LAST)
            writer = stack.enter_context(open_writer(config, folder, world, trainer.step))
        del earlier
        trainer.run(writer)
    return trainer


if __name__ == "__main__":
    sys.exit(main())
