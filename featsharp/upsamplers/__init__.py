"""Upsamplers: low-resolution features and an image in, high-resolution features out.

Adding one is a module with a ``@register_upsampler`` class and a line of import here.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from featsharp.names import resolve_upsampler
from featsharp.upsamplers import (  # noqa: F401  (registers them)
    anyup,
    carafe,
    custom,
    featsharp,
    featup,
    interpolate,
    jafar,
    larger_input,
    lift,
    resfu,
    resize_conv,
    s2,
    sapa,
    stride,
    tile,
)
from featsharp.upsamplers.base import Encode, GuidedUpsampler, UpsampleFeatures, Upsampler
from featsharp.upsamplers.custom import from_function
from featsharp.upsamplers.registration import (
    UPSAMPLERS,
    build_upsampler,
    options_of_upsampler,
    register_upsampler,
)

__all__ = [
    "UPSAMPLERS",
    "Encode",
    "GuidedUpsampler",
    "UpsampleFeatures",
    "Upsampler",
    "create_upsampler",
    "from_function",
    "list_upsamplers",
    "register_upsampler",
]


class HasEmbedDim(Protocol):
    """All that an upsampler needs to know of a backbone."""

    embed_dim: int


def create_upsampler(
    name: str, backbone: HasEmbedDim, factor: float | None = None, *, options: Mapping[str, Any] | None = None
) -> Upsampler:
    """Build an untrained upsampler for a backbone.

    Args:
        name: One of :func:`list_upsamplers`, also with its factor: "bilinear-2x".
        backbone: Anything with ``embed_dim``.
        factor: Gain in each direction, at least 1, where the name does not give it; which ones a method
            allows is its ``factors``.
        options: Keyword arguments of the upsampler's class, for example ``{"widths": "published"}``.

    Raises:
        ConfigError: For an unknown name, an option that this upsampler does not have, or a factor that it cannot have.
    """
    name, factor = resolve_upsampler(name, factor, UPSAMPLERS)
    # Whoever undoes the whitening needs the backbone's own.
    wanted = {"mean", "std"}.intersection(options_of_upsampler(name))
    known = {key: getattr(backbone, key) for key in wanted if hasattr(backbone, key)}
    return build_upsampler(name, backbone.embed_dim, factor, known | dict(options or {}))


def list_upsamplers() -> list[str]:
    """Names of all upsamplers."""
    return UPSAMPLERS.names()
