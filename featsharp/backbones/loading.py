"""Optional packages, foreign weights and foreign errors, as every family of models needs them."""

import importlib
from collections.abc import Collection, Mapping
from types import ModuleType

from torch import Tensor, nn

from featsharp.errors import CheckpointError, MissingDependencyError


def import_optional(module: str, purpose: str, install: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependencyError: When it cannot be imported; ``install`` is the command that the message gives.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{purpose} needs {module} ({error}); run: {install}") from error


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` into ``module``, which it has to fill exactly.

    Args:
        module: The module whose weights are replaced.
        state: Names and tensors.
        source: Beginning of the message, such as "w.pt is not a checkpoint of model x".

    Raises:
        CheckpointError: With the names that are missing, that the module does not have, or of another shape.
    """
    wanted = module.state_dict()
    wrong = {
        "missing": wanted.keys() - state.keys(),
        "not in the model": state.keys() - wanted.keys(),
        "of another shape": {key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape},
    }
    if any(wrong.values()):
        lists = "; ".join(f"{what}: {shorten(sorted(keys))}" for what, keys in wrong.items() if keys)
        raise CheckpointError(f"{source}; {lists}")
    module.load_state_dict(state, strict=True)


def first_line(error: BaseException) -> str:
    """First line of a foreign error, for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def shorten(texts: Collection[str], separator: str = ", ", shown: int = 5) -> str:
    """The first of many texts in one line, with how many more there are."""
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return separator.join(list(texts)[:shown]) + more if texts else "none"
