"""Weights & Biases (extra ``wandb``)."""

import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featsharp.errors import MissingDependencyError
from featsharp.files import write_file
from featsharp.training.loggers.base import VizWriter
from featsharp.urls import redact_setting

# Saves the run's id beside the checkpoint, so that a resumed training continues the same run.
ID_FILE = "wandb-id.txt"
# Seconds for an answer to the prompt for an account, in a run that may be unattended.
LOGIN_TIMEOUT = 60
# Seconds that a training waits at its end for the rest of the upload, as other processes may be waiting for this one;
# `wandb sync` can send it later.
FINISH_TIMEOUT = 45


class WandbWriter(VizWriter):
    """One run of Weights & Biases, whose files are in ``folder/wandb``.

    Args:
        folder: Of the training run.
        entity: User or team; None: the account's default.
        project: Of the run.
        mode: "online", or "offline", which needs neither network nor account; None: that of WANDB_MODE, or online.

    Raises:
        MissingDependencyError: Without wandb.
    """

    def __init__(
        self, folder: Path, *, entity: str | None = None, project: str = "featsharp", mode: str | None = None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingDependencyError('viz.type=wandb needs: pip install "featsharp[wandb]"') from error
        self._wandb = wandb
        with _public_command_line():
            self._run = wandb.init(
                entity=entity,
                project=project,
                mode=mode,  # type: ignore[arg-type]
                name=str(folder),
                id=_run_id(folder / ID_FILE),
                resume=None if mode == "offline" else "allow",  # wandb would warn offline
                dir=folder,
                settings=wandb.Settings(login_timeout=LOGIN_TIMEOUT, finish_timeout=FINISH_TIMEOUT),
            )
        # wandb's step cannot decrease, as ours does when a run is resumed from its last checkpoint.
        self._run.define_metric("*", step_metric="step")
        self._row: dict[str, Any] = {}

    def config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def scalar(self, name: str, value: float, step: int) -> None:
        self._add(name, value, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        self._add(name, self._wandb.Image(pixels), step)

    def close(self) -> None:
        try:
            self._send()
        finally:
            # In the `finally` of a run that failed, its error is set: the run is then listed as failed.
            self._run.finish(exit_code=int(sys.exc_info()[0] is not None))

    def _add(self, name: str, value: object, step: int) -> None:
        """Add to the row of the step; all of one step is sent as one row."""
        if self._row.get("step") != step:
            self._send()
            self._row["step"] = step
        self._row[name] = value

    def _send(self) -> None:
        row, self._row = self._row, {}
        if row:
            self._run.log(row)


@contextmanager
def _public_command_line() -> Iterator[None]:
    """Hide secrets of URLs in the command line, which wandb records."""
    given = sys.argv
    sys.argv = ["".join(map(redact_setting, re.split("(?<==)", argument, maxsplit=1))) for argument in given]
    try:
        yield
    finally:
        sys.argv = given


def _run_id(file: Path) -> str:
    """Read the id in ``file``, which is created where there is none."""
    if not file.exists():
        write_file(file, secrets.token_hex(4).encode())
    return file.read_text(encoding="utf-8").strip()
