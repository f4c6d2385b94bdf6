"""Writers of scalars and pictures of a run. Custom ones implement :class:`VizWriter`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from featsharp.errors import ConfigError, FeatSharpError, unknown_name
from featsharp.registry import import_named
from featsharp.training.loggers.base import NullWriter, VizWriter
from featsharp.training.loggers.tensorboard import TensorBoardWriter
from featsharp.training.loggers.wandb import WandbWriter

__all__ = ["WRITERS", "NullWriter", "VizWriter", "Writers", "get_visualizer", "writer_names"]

logger = logging.getLogger(__name__)

WRITERS = ("tensorboard", "wandb", "none")
METHODS = ("config", "scalar", "image", "close")


class Writers(VizWriter):
    """Several writers as one. One that raises is dropped with a warning, so that the run continues.

    Args:
        makers: Functions that build the writers, by name. Errors that the user can act on (a missing package) are
            raised; others (an unreachable server) drop the writer, too.
    """

    def __init__(self, makers: Mapping[str, Callable[[], VizWriter]]) -> None:
        self._writers: dict[str, VizWriter] = {}
        for name, make in makers.items():
            try:
                self._writers[name] = make()
            except FeatSharpError:
                raise
            except Exception as error:
                _warn(name, error)

    def config(self, config: Mapping[str, Any]) -> None:
        self._call_each(lambda writer: writer.config(config))

    def scalar(self, name: str, value: float, step: int) -> None:
        self._call_each(lambda writer: writer.scalar(name, value, step))

    def image(self, name: str, image: Tensor, step: int) -> None:
        self._call_each(lambda writer: writer.image(name, image, step))

    def close(self) -> None:
        self._call_each(lambda writer: writer.close())
        self._writers.clear()

    def _call_each(self, report: Callable[[VizWriter], None]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                report(writer)
            except Exception as error:  # writers may raise anything
                del self._writers[name]
                _warn(name, error)


def get_visualizer(
    kind: str | Sequence[str],
    folder: Path,
    *,
    entity: str | None = None,
    project: str = "featsharp",
    mode: str | None = None,
    step: int = 0,
) -> Writers:
    """Build the writer that ``viz.type`` names, or all of a list.

    Args:
        kind: "tensorboard", "wandb", "none", a custom ``"module:Class"`` (imported, and called with the folder), or a
            list of these.
        folder: Of the run.
        entity: See :class:`~featsharp.training.loggers.wandb.WandbWriter`.
        project: As ``entity``.
        mode: As ``entity``.
        step: The step that the run resumes from; earlier reports of later steps are discarded.

    Raises:
        ConfigError: For an unknown name, or a class that cannot be imported or is no writer.
        MissingDependencyError: When the package behind a name is not installed.
    """
    makers: dict[str, Callable[[], VizWriter]] = {
        "tensorboard": partial(TensorBoardWriter, folder, step),
        "wandb": partial(WandbWriter, folder, entity=entity, project=project, mode=mode),
    }
    names = [name for name in writer_names(kind) if name != "none"]
    return Writers({name: makers[name] if name in makers else partial(_load_class(name), folder) for name in names})


def writer_names(kind: object) -> list[str]:
    """List the names in ``viz.type``, each once; nothing is imported.

    Raises:
        ConfigError: For an unknown name, or something other than names.
    """
    names = [kind] if isinstance(kind, str) else kind
    if not isinstance(names, Sequence) or not names:
        raise ConfigError(f"viz.type is a name or a list of names, such as [tensorboard,wandb]; got {kind!r}")
    for name in names:
        if name not in WRITERS and not (isinstance(name, str) and ":" in name):
            raise unknown_name("viz.type", str(name), [*WRITERS, "package.module:Class"])
    return list(dict.fromkeys(names))


def _load_class(name: str) -> Callable[[Path], VizWriter]:
    """Import the user's class that ``"module:Class"`` names."""
    loaded: Any = import_named(name, "viz.type", "class")
    missing = [method for method in METHODS if not callable(getattr(loaded, method, None))]
    if not callable(loaded) or missing:
        lacks = f"it lacks {', '.join(missing)}" if missing else "it is no class"
        raise ConfigError(
            f"viz.type={name!r} is no VizWriter: {lacks}; derive it from featsharp.training.loggers.VizWriter"
        )
    return loaded


def _warn(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split())
    logger.warning("nothing more is reported to %s (%s: %s)", name, type(error).__name__, reason)
