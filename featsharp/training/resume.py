"""Resuming a run: checks that its checkpoint and the new run agree."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from featsharp.checkpoint import ENCODER_FILE, FileKind, read_checkpoint, restoring
from featsharp.errors import CheckpointError, ConfigError
from featsharp.training.config import LoopConfig, flatten, public_form, walk_keys

logger = logging.getLogger(__name__)


def read_earlier(last: Path, config: LoopConfig, kind: FileKind = ENCODER_FILE) -> dict[str, Any] | None:
    """Read the checkpoint ``last`` of an earlier run, to resume from; None for a new run.

    Raises:
        ConfigError: With ``resume=false``, which would overwrite it.
        CheckpointError: When it is of a run with another configuration; with ``force_resume`` that is a warning.
    """
    if not last.exists():
        return None
    if not config.resume:
        raise ConfigError(
            f"{last} exists and resume=false would overwrite it; choose another output_base, or move it away"
        )
    content = read_checkpoint(last, kind)
    with restoring(last):
        # Settings that are newer than the checkpoint had the effect of their defaults.
        saved = flatten(dataclasses.asdict(type(config)())) | flatten(content["config"] or {})
    present = flatten(public_form(config))
    free = {name for name, field, _ in walk_keys(config) if field.metadata.get("free", False)}
    different = [
        f"{key} {present[key]!r} instead of {saved.get(key)!r}"
        for key in present
        if key not in free and present[key] != saved.get(key)
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


def check_continuation(
    content: Mapping[str, Any],
    path: Path,
    check_model: Callable[[], None],
    config: LoopConfig,
    processes: int,
    *,
    has_streams: bool,
) -> None:
    """Check that a resumed run continues exactly as the run of a checkpoint would have.

    Args:
        content: Of the checkpoint.
        path: Of the checkpoint, for messages.
        check_model: Raises CheckpointError where the checkpoint is of another backbone.
        config: Of this run; with ``force_resume`` another backbone or number of readers is only a warning.
        processes: Number of processes of this run.
        has_streams: Whether images come from streams, which are divided among readers.

    Raises:
        CheckpointError: When it does not.
    """
    state = content["training"]
    if state is None:
        raise CheckpointError(f"checkpoint {path} holds no training state; start a new run in another folder")
    if state["step"] > config.num_training_steps:
        raise CheckpointError(
            f"checkpoint {path} is at step {state['step']}, beyond num_training_steps={config.num_training_steps}"
        )
    try:
        check_model()
        if state["processes"] != processes:
            raise CheckpointError(
                f"checkpoint {path} is of a run with {state['processes']} processes, this one has {processes}: the "
                "same step would see other images. Start as many"
            )
        readers = count_readers(config, processes)
        if state["readers"] != readers and has_streams:
            raise CheckpointError(
                f"checkpoint {path} is of a run whose shards by URL or pipe had {state['readers']} readers (processes "
                f"times workers), this one has {readers}: they would read other images. Set "
                f"num_workers={state['readers'] // processes}"
            )
    except CheckpointError as error:
        if not config.force_resume:
            raise type(error)(f"{error}; force_resume=true goes on all the same") from error
        logger.warning("force_resume: %s", error)


def count_readers(config: LoopConfig, processes: int) -> int:
    """Count the readers that the samples of all processes are divided among."""
    return processes * max(1, config.num_workers)
