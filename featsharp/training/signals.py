"""Handling of SIGTERM, which schedulers send before they take a machine away."""

import signal
import threading
from types import FrameType
from typing import Any


class Terminated(Exception):
    """End of a run by SIGTERM, after saving."""


class TermSignal:
    """Context that records SIGTERM instead of ending the process; only in the main thread."""

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def __enter__(self) -> "TermSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._record)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.came = True
