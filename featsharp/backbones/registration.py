"""Where backbones get their names: the registry, the ``prefix:`` forms, and what their factories share.

Modules that register import torch only; the library behind a backbone is imported when one is built.
"""

import importlib
from collections.abc import Callable, Collection
from types import ModuleType
from typing import TypeVar
from urllib.parse import parse_qsl

from featsharp.backbones.base import Backbone
from featsharp.errors import ConfigError, MissingDependencyError, unknown_name
from featsharp.registry import Registry

BACKBONES: Registry[Backbone] = Registry("backbone")
PREFIXES: Registry[Backbone] = Registry("backbone prefix")

NoArguments = TypeVar("NoArguments", bound=Callable[[], Backbone])
OneSpec = TypeVar("OneSpec", bound=Callable[[str], Backbone])


def register_backbone(name: str, description: str) -> Callable[[NoArguments], NoArguments]:
    """Decorator: make ``create_backbone(name)`` call the decorated factory, which takes no argument.

    Args:
        name: What users write.
        description: One line for ``featsharp ls``.
    """
    return BACKBONES.register(name, description)


def register_prefix(prefix: str, description: str) -> Callable[[OneSpec], OneSpec]:
    """Decorator: make ``create_backbone("prefix:REST")`` call the decorated factory with ``"prefix:REST"``.

    Args:
        prefix: The part before the colon.
        description: One line that shows the whole form, such as ``timm:MODEL[.TAG]``.
    """
    return PREFIXES.register(prefix, description)


def split_options(spec: str, allowed: Collection[str]) -> tuple[str, dict[str, str]]:
    """Take ``MODEL?key=value&key=value`` apart.

    Raises:
        ConfigError: For a key outside ``allowed``, a repeated key, or text that is not ``key=value``.

    >>> split_options("vit_tiny?img_size=448", ["img_size"])
    ('vit_tiny', {'img_size': '448'})
    """
    model, mark, query = spec.partition("?")
    try:
        # A plus is a plus, in paths above all, not a space.
        pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=True) if mark else []
    except ValueError:
        raise ConfigError(f"options of a backbone are written ?key=value&key=value; got {spec!r}") from None
    options = dict(pairs)
    for key in options:
        if key not in allowed:
            raise unknown_name(f"option of backbone {model!r}:", key, allowed)
    if len(options) < len(pairs):
        raise ConfigError(f"an option is given twice in {spec!r}; give it once")
    return model, options


def import_optional(module: str, purpose: str, install: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependencyError: When it cannot be imported; ``install`` is the command that the message gives.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{purpose} needs {module} ({error}); run: {install}") from error
