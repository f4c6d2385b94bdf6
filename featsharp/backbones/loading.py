"""Packages, weights, sizes and errors of foreign libraries, as every family of models needs them."""

import importlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from featsharp.backbones.base import Backbone
from featsharp.checkpoint import describe_mismatch
from featsharp.errors import CheckpointError, ConfigError, MissingDependencyError, first_line
from featsharp.files import list_files

Made = TypeVar("Made")

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def import_optional(module: str, purpose: str, install: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependencyError: When it cannot be imported; ``install`` is the command that the message gives.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{purpose} needs {module} ({error}); run: {install}") from error


def check_version(library: Any, name: str, since: tuple[int, int] | None) -> None:
    """Raise MissingDependencyError for a backbone that came with a later version of its library, ``since``."""
    if since and tuple(int(part) for part in library.__version__.split(".")[:2]) < since:
        raise MissingDependencyError(
            f"backbone {name!r} needs {library.__name__} {'.'.join(map(str, since))} or newer; this is "
            f"{library.__version__}; run: pip install --upgrade {library.__name__}"
        )


@contextmanager
def seeded_weights() -> Iterator[None]:
    """Draw the same random weights at every call and leave the global random state as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def call_leaving_out(call: Callable[..., Made], optional: Collection[str], **arguments: Any) -> Made:
    """Call with ``arguments``, without those of ``optional`` that the function does not take."""
    try:
        return call(**arguments)
    except TypeError as error:
        unknown = {key for key in optional if key in arguments and f"'{key}'" in str(error)}
        if "unexpected keyword" not in str(error) or not unknown:
            raise
    return call_leaving_out(call, optional, **{key: arguments[key] for key in arguments.keys() - unknown})


def find_weights(place: str, names: Sequence[str]) -> Path:
    """The file with weights that ``place`` is, or holds: one of ``names``, else the only one that looks like weights.

    Raises:
        ConfigError: For a directory with none, or with several.
    """
    path = Path(os.path.expanduser(place))  # Path.expanduser raises for an unknown user
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    others = [path / file for file in list_files(path, deep=False) if file.endswith(WEIGHT_SUFFIXES)]
    if len(others) != 1:
        present = ", ".join(file.name for file in others) or "none"
        raise ConfigError(f"{path} needs one file of weights, such as {names[0]}; it has {present}; name the file")
    return others[0]


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` into ``module``, which it has to fill exactly.

    Args:
        module: The module whose weights are replaced.
        state: Names and tensors.
        source: Beginning of the message, such as "w.pt is not a checkpoint of model x".

    Raises:
        CheckpointError: With the names that are missing, that the module does not have, or of another shape.
    """
    if problems := describe_mismatch(state, module.state_dict()):
        raise CheckpointError(f"{source}: it {problems}")
    module.load_state_dict(state, strict=True)


def cannot_fetch(name: str, error: Exception, command: str) -> MissingDependencyError:
    """Make the error for a model whose files are not here; ``command`` fetches them where there is a network."""
    return MissingDependencyError(
        f"the files of backbone {name!r} are not on this machine and cannot be fetched ({first_line(error)}); with a "
        f"network, run once: {command}; or give option weights=FILE; or take random weights: pretrained=false"
    )


def set_native_size(backbone: Backbone, size: tuple[int, int]) -> None:
    """Make ``size``, (h, w) in pixels, the native one; positions are resampled at each call, which is cheap.

    Raises:
        ConfigError: For a size that the backbone does not take.
    """
    if size == backbone.input_size:
        return
    asked = f"img_size={size[0]}x{size[1]}"
    if not backbone.flexible:
        height, width = backbone.input_size
        raise ConfigError(
            f"backbone {backbone.name!r} takes {height}x{width} pixels only; got {asked}. other_sizes=tile covers "
            f"larger images"
        )
    height, width = backbone.fit_size(*(max(side, backbone.patch_size) for side in size))
    if size != (height, width):
        raise ConfigError(
            f"backbone {backbone.name!r} takes whole patches of {backbone.patch_size}; got {asked}, the nearest is "
            f"{height}x{width}"
        )
    backbone.input_size = size


def pair(value: Any) -> tuple[int, int]:
    """A side, or a height and a width, as (h, w)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def whole_patches(size: Any, patch_size: int) -> tuple[int, int]:
    """The largest whole patches within a side or an (h, w), one at least."""
    height, width = pair(size)
    return max(1, height // patch_size) * patch_size, max(1, width // patch_size) * patch_size


def square_patch(name: str, size: Any) -> int:
    """The side of a patch; ConfigError for one that is not square."""
    height, width = pair(size)
    if height != width:
        raise ConfigError(f"backbone {name!r} has {height}x{width} patches; only square ones work")
    return int(height)
