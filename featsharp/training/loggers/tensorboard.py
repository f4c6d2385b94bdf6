"""TensorBoard (extra ``train``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from featsharp.errors import MissingDependencyError
from featsharp.training.loggers.base import VizWriter


class TensorBoardWriter(VizWriter):
    """Event files in ``folder``; the configuration is a text.

    Steps after ``step``, from which the run resumes, are no longer shown.

    Raises:
        MissingDependencyError: Without tensorboard.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError('viz.type=tensorboard needs: pip install "featsharp[train]"') from error
        self._step = step
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def config(self, config: Mapping[str, Any]) -> None:
        from omegaconf import OmegaConf

        lines = OmegaConf.to_yaml(OmegaConf.create(dict(config))).splitlines()
        # TensorBoard shows Markdown, where text indented by four is preformatted.
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), self._step)

    def scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        self._writer.add_image(name, image.clamp(0, 1), step)

    def close(self) -> None:
        self._writer.close()
