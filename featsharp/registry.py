"""A named table of factories, so that adding a backbone, an upsampler or a task is one decorator.

:func:`import_named` imports objects from users' modules, the only way in which a configuration imports code.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, TypeVar

from featsharp.errors import ConfigError, unknown_name

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered factory: ``description`` is the line that ``featsharp ls`` prints."""

    name: str
    factory: Callable[..., T]
    description: str


class Registry(dict[str, Entry[T]]):
    """Entries by name; the error for an unknown name gives the nearest ones. ``kind`` is the noun for an entry."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str, description: str) -> Callable[[F], F]:
        """Make a decorator that registers a factory under ``name``."""

        def add(factory: F) -> F:
            if name in self:
                raise AssertionError(f"{self.kind} {name!r} is registered twice")
            self[name] = Entry(name, factory, description)
            return factory

        return add

    def __missing__(self, name: str) -> Entry[T]:
        raise unknown_name(self.kind, name, self)

    def entries(self) -> list[Entry[T]]:
        """List all entries, by name."""
        return [self[name] for name in sorted(self)]

    def names(self) -> list[str]:
        """List all names, sorted."""
        return sorted(self)


def import_named(text: str, option: str, kind: str) -> object:
    """Import the object ``"module:name"``; the name may have dots.

    Args:
        text: As the user wrote it.
        option: Where the user wrote it, for messages.
        kind: "function" or "class", for messages.

    Raises:
        ConfigError: When the text is not of this form, or the module or the object in it is absent.
    """
    module, _, attribute = text.partition(":")
    if not module or not attribute or ":" in attribute:
        raise ConfigError(f"{option} names a {kind} as 'my_module:my_{kind}'; got {text!r}")
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a foreign module may raise anything; the message has to say where it was named
        raise ConfigError(
            f"{option}={text!r}: module {module!r} cannot be imported ({type(error).__name__}: {error}); install it, "
            "or add its folder to PYTHONPATH"
        ) from error
    try:
        return reduce(getattr, attribute.split("."), imported)
    except AttributeError:
        raise unknown_name(
            f"{kind} in {option}={text!r}:",
            attribute,
            [key for key, value in vars(imported).items() if callable(value) and not key.startswith("_")],
        ) from None


def load_function(function: object, option: str) -> Callable[..., Any]:
    """Return the function that an option gives or names.

    Args:
        function: A callable, or text as for :func:`import_named`.
        option: Its name, for messages.

    Raises:
        ConfigError: When it is neither, or the import fails.
    """
    if callable(function) and not isinstance(function, type):
        return function
    if not isinstance(function, str) or ":" not in function:
        raise ConfigError(
            f"option {option} is a function, or text that names one, such as 'my_module:my_function'; got {function!r}"
        )
    named = import_named(function, f"option {option}", "function")
    if not callable(named) or isinstance(named, type):
        what = "a class; name a function or an object that can be called" if isinstance(named, type) else "no function"
        raise ConfigError(f"option {option}={function!r}: {function.partition(':')[2]} is {what}")
    return named
