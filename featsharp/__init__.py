"""Sharp feature maps from any vision foundation model.

Importing this package imports nothing else, not even torch: the public names below load their module when first used.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from featsharp import _moved

if TYPE_CHECKING:
    from featsharp.backbones import create_backbone, from_callable, list_backbones, register_backbone
    from featsharp.builder import SharpEncoder, create_encoder, load_from_file, save_checkpoint
    from featsharp.published import load_published
    from featsharp.upsamplers import create_upsampler, list_upsamplers, register_upsampler
    from featsharp.upsamplers.base import UpsampleFeatures
    from featsharp.upsamplers.layer import UpsampleLayer

__version__ = "0.2.0"

__all__ = [
    "SharpEncoder",
    "UpsampleFeatures",
    "UpsampleLayer",
    "__version__",
    "create_backbone",
    "create_encoder",
    "create_upsampler",
    "from_callable",
    "list_backbones",
    "list_upsamplers",
    "load_from_file",
    "load_published",
    "register_backbone",
    "register_upsampler",
    "save_checkpoint",
]

_moved.install()
logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library leaves it to the application to show logs

_HOMES = {
    "SharpEncoder": "featsharp.builder",
    "UpsampleFeatures": "featsharp.upsamplers.base",
    "UpsampleLayer": "featsharp.upsamplers.layer",
    "create_backbone": "featsharp.backbones",
    "create_encoder": "featsharp.builder",
    "create_upsampler": "featsharp.upsamplers",
    "from_callable": "featsharp.backbones",
    "list_backbones": "featsharp.backbones",
    "list_upsamplers": "featsharp.upsamplers",
    "load_from_file": "featsharp.builder",
    "load_published": "featsharp.published",
    "register_backbone": "featsharp.backbones",
    "register_upsampler": "featsharp.upsamplers",
    "save_checkpoint": "featsharp.builder",
}


if not TYPE_CHECKING:  # type checkers would otherwise accept mistyped names

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
