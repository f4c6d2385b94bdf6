"""Train an upsampler for a backbone, without labels.

    python -m featsharp.train +model=vits14-focus +upsampler=featsharp-2x train_data_dir=photos num_training_steps=500
    torchrun --nproc-per-node=8 -m featsharp.train +model=siglip2 +upsampler=featsharp-4x train_data_dir=shards

``featsharp train -h`` describes arguments and results.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    from featsharp.training.setup import build, fit_before_training, start_run
    from featsharp.training.trainer import Trainer
    from featsharp.validation import ValidationSamples

    with start_run(config) as run:
        parts = build(config, run.world)
        validate = ValidationSamples(config.val_data_dir, config.viz.num_images) if run.world.is_main else None
        skipped: list[tuple[str, str]] = []
        if run.earlier is None:
            run.open_writer()
            skipped = fit_before_training(parts, config, run.world)
        trainer = Trainer(
            parts.encoder,
            parts.objective,
            parts.dataset,
            config,
            run.folder,
            run.world,
            validate=validate,
            skipped=skipped,
        )
        run.train(trainer)
    return trainer


if __name__ == "__main__":
    sys.exit(main())
