"""Upsamplers: low-resolution features and an image in, high-resolution features out.

Adding one is a module with a ``@register_upsampler`` class and a line of import here.
"""

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
    loftup,
    naf,
    resfu,
    resize_conv,
    s2,
    sapa,
    stride,
    tile,
    uplift,
    views,
)
from featsharp.upsamplers.base import Encode, GuidedUpsampler, UpsampleFeatures, Upsampler
from featsharp.upsamplers.custom import from_function
from featsharp.upsamplers.registration import (
    UPSAMPLERS,
    create_upsampler,
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


def list_upsamplers() -> list[str]:
    """List the names of all upsamplers."""
    return UPSAMPLERS.names()
