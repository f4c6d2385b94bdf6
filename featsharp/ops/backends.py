"""Backends: several implementations of one operation, of which the fastest that can run is chosen.

A backend may be faster, never different: the tests hold each one to the reference of its operation. One that the caller
names and that cannot run is an error with the reason; the choice made for a caller who names none is logged once.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from featsharp.errors import ConfigError, unknown_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """Facts about the arguments that the choice of a backend may depend on, never their values."""

    device: str  # "cpu", "cuda" ...
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Attributes:
        op: Name of the operation.
        name: Name of the backend, unique within the operation.
        summary: One line for ``featsharp doctor``.
        module: Where its ``forward``, ``backward`` and ``scratch_bytes`` are; imported on first use.
        can_run: None where the backend can run a problem, otherwise the reason why not, as a sentence's end:
            "needs ...; got ...".
        automatic: Whether it may be chosen without being named; not before it has run on its hardware.
    """

    op: str
    name: str
    summary: str
    module: str
    can_run: Callable[[Problem], str | None]
    automatic: bool = True

    def load(self) -> Any:
        """The module with the functions of this backend."""
        return importlib.import_module(self.module)


_backends: dict[str, list[Backend]] = {}
_forced: list[str] = []


def register_backends(*backends: Backend) -> None:
    """Register backends, the fastest of each operation first."""
    for backend in backends:
        _backends.setdefault(backend.op, []).append(backend)


def list_backends(op: str | None = None) -> list[Backend]:
    """All backends, or those of one operation, the fastest first."""
    return [backend for name, group in _backends.items() if op in (None, name) for backend in group]


def wanted_backend(name: str | None) -> str | None:
    """Return the named backend, else that of the surrounding :func:`use_backend`, else None for any."""
    return name or (_forced[-1] if _forced else None)


def choose_backend(op: str, problem: Problem, name: str | None = None) -> Backend:
    """Choose the named backend, or the fastest one that can run.

    Raises:
        ConfigError: When the named backend is unknown or cannot run, or none can.
    """
    group = _backends[op]
    if name is None:
        for backend in group:
            if backend.automatic and backend.can_run(problem) is None:
                _log_choice(op, backend.name, problem.device)
                return backend
        reasons = "; ".join(f"{backend.name} {backend.can_run(problem)}" for backend in group)
        raise ConfigError(f"no backend of {op} can run here: {reasons}")
    for backend in group:
        if backend.name == name:
            reason = backend.can_run(problem)
            if reason is not None:
                raise ConfigError(f"the backend {name!r} of {op} {reason}; backend=None takes one that can run")
            return backend
    raise unknown_name(f"backend of {op}", name, [backend.name for backend in group])


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use the backend ``name`` for every operation of this context whose caller names none.

    For comparisons. The setting is global to the process, and code compiled by torch keeps what it was compiled with.

    Example:
        >>> with use_backend("reference"):
        ...     out = encoder(images)  # doctest: +SKIP
    """
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _log_choice(op: str, name: str, device: str) -> None:
    logger.debug("%s on %s: backend %s", op, device, name)
