"""The contract of writers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class VizWriter:
    """Receiver of the scalars and pictures of a run. Subclasses override some methods, or classes have them all.

    Only the main process has one. An exception that a writer raises is logged as a warning and ends the reporting to
    it, never the run.
    """

    def config(self, config: Mapping[str, Any]) -> None:
        """The composed configuration of the run, nested, in plain values; once, before anything else."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number, for example "loss/total". Steps never fall but at the start of a resumed run."""

    def image(self, name: str, image: Tensor, step: int) -> None:
        """One picture, float [3, H, W] in [0, 1], on any device."""

    def close(self) -> None:
        """Flush and release everything; called once, also when the run failed."""


class NullWriter(VizWriter):
    """Reports to nobody."""
