"""The contract of writers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class VizWriter:
    """Writer of the scalars and pictures of a run. Subclasses override some methods; other classes have all of them.

    Only the main process has one. An exception that a writer raises is logged as a warning, and the writer is dropped.
    """

    def config(self, config: Mapping[str, Any]) -> None:
        """Write the composed configuration of the run, nested plain values; called once, first."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """Write a number, for example "loss/total". Steps only decrease at the start of a resumed run."""

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Write a picture, float [3, H, W] in [0, 1], on any device."""

    def close(self) -> None:
        """Flush and release everything; called once, also when the run failed."""


class NullWriter(VizWriter):
    """Writer that discards everything."""
