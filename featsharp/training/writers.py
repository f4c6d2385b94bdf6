"""Where scalars and pictures of a run go. A writer of your own implements :class:`VizWriter`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from featsharp.errors import ConfigError, MissingDependencyError

logger = logging.getLogger(__name__)


class VizWriter(Protocol):
    """What training reports to."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number, for example "loss/total"."""

    def image(self, name: str, image: Tensor, step: int) -> None:
        """One picture, [3, H, W] in [0, 1]."""

    def close(self) -> None:
        """Flush and release everything."""


class NullWriter:
    """Reports to nobody."""

    def scalar(self, name: str, value: float, step: int) -> None:
        pass

    def image(self, name: str, image: Tensor, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoardWriter:
    """Event files for TensorBoard in ``folder``. A full disk ends the reporting, not the run."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError('viz.type=tensorboard needs: pip install "featsharp[train]"') from error
        self._writer = SummaryWriter(str(folder))
        self._failed = False

    def scalar(self, name: str, value: float, step: int) -> None:
        self._report(lambda: self._writer.add_scalar(name, value, step))

    def image(self, name: str, image: Tensor, step: int) -> None:
        self._report(lambda: self._writer.add_image(name, image.clamp(0, 1), step))

    def close(self) -> None:
        self._report(self._writer.close)

    def _report(self, write: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            write()
        except OSError as error:
            self._failed = True
            logger.warning("no more TensorBoard events: %s", error)


WRITERS = ("tensorboard", "none")


def get_visualizer(kind: str, folder: Path) -> VizWriter:
    """The writer that ``viz.type`` names."""
    if kind == "tensorboard":
        return TensorBoardWriter(folder)
    if kind == "none":
        return NullWriter()
    raise ConfigError(f"unknown viz.type {kind!r}; use {' or '.join(WRITERS)}")
