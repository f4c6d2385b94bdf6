"""Upsamplers: low-resolution features and an image in, high-resolution features out.

Adding one is a module with a ``@register_upsampler`` class and a line of import here.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, Protocol

from featsharp.errors import unknown_name
from featsharp.upsamplers import featsharp, featup, interpolate, jafar, tile  # noqa: F401  (registers them)
from featsharp.upsamplers.base import Encode, GuidedUpsampler, UpsampleFeatures, Upsampler
from featsharp.upsamplers.registration import UPSAMPLERS, register_upsampler

__all__ = [
    "UPSAMPLERS",
    "Encode",
    "GuidedUpsampler",
    "UpsampleFeatures",
    "Upsampler",
    "create_upsampler",
    "list_upsamplers",
    "register_upsampler",
]


class HasEmbedDim(Protocol):
    """All that an upsampler needs to know of a backbone."""

    embed_dim: int


def create_upsampler(
    name: str, backbone: HasEmbedDim, factor: int, *, options: Mapping[str, Any] | None = None
) -> Upsampler:
    """Build an untrained upsampler for a backbone.

    Args:
        name: One of :func:`list_upsamplers`.
        backbone: Anything with ``embed_dim``.
        factor: Gain in each direction, a whole number.
        options: Keyword arguments of the upsampler's class, for example ``{"widths": "published"}``.

    Raises:
        ConfigError: For an unknown name or an option that this upsampler does not have.
    """
    factory = UPSAMPLERS[name].factory
    allowed = [p.name for p in signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options or {}:
        if option not in allowed:
            raise unknown_name(f"option of upsampler {name!r}:", option, allowed)
    return factory(backbone.embed_dim, factor, **(options or {}))


def list_upsamplers() -> list[str]:
    """Names of all upsamplers."""
    return UPSAMPLERS.names()
