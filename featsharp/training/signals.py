"""Ending a run from outside: SIGTERM, which schedulers send before they take a machine away."""

import signal
import threading
from types import FrameType
from typing import Any


class Terminated(Exception):
    """The run was asked to end by SIGTERM, and did so after saving."""


class TermSignal:
    """Notes SIGTERM instead of dying of it, within a ``with`` block of the main thread; elsewhere it never comes."""

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def __enter__(self) -> "TermSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
