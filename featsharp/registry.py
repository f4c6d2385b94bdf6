"""A named table of factories, so that adding a backbone, an upsampler or a task is one decorator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from featsharp.errors import unknown_name

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered factory: ``description`` is the line that ``featsharp ls`` prints."""

    name: str
    factory: Callable[..., T]
    description: str


class Registry(Generic[T]):
    """Maps a name to a factory and knows the nearest name to a mistyped one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, description: str) -> Callable[[F], F]:
        """Decorator: make ``name`` build what the decorated callable returns."""

        def add(factory: F) -> F:
            if name in self._entries:
                raise AssertionError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, factory, description)
            return factory

        return add

    def __getitem__(self, name: str) -> Entry[T]:
        """The entry of ``name``; raises ConfigError with the nearest names when there is none."""
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def entries(self) -> list[Entry[T]]:
        """All entries, by name."""
        return [self._entries[name] for name in sorted(self._entries)]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)
