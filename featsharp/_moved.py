"""Aliases of modules that moved: the old path imports the new module, with a DeprecationWarning, until version 0.3."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Paths that README, docs or examples of version 0.1 imported -> where the module is now.
MOVED = {
    "featsharp.data.mapped": "featsharp.extraction.mapped",
    "featsharp.ops.device": "featsharp.device",
    "featsharp.ops.memory": "featsharp.memory",
    "featsharp.training.writers": "featsharp.training.loggers",
}


class _MovedModules(MetaPathFinder, Loader):
    """Importer of the modules of :data:`MOVED` from their new paths."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        # The level of the import statement, above those of the import machinery, which Python leaves out.
        warnings.warn(f"{spec.name} is now {new}; the old path goes in version 0.3", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the spec of the new path, which the import machinery has overwritten."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make the old paths importable, once per process."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
