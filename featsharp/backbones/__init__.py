"""Frozen vision encoders by name: ``create_backbone("vits14-focus")``, or any module through ``from_callable``."""

import torch

from featsharp.backbones import timm_vit, toy, vits14_focus  # noqa: F401  (imported to register)
from featsharp.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneOutput
from featsharp.backbones.from_callable import from_callable
from featsharp.backbones.registration import BACKBONES, PREFIXES, register_backbone, register_prefix
from featsharp.errors import ConfigError, unknown_name

__all__ = [
    "BACKBONES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PREFIXES",
    "Backbone",
    "BackboneOutput",
    "create_backbone",
    "from_callable",
    "list_backbones",
    "register_backbone",
    "register_prefix",
]

AUTOCAST_DTYPES = (None, torch.bfloat16, torch.float16)


def create_backbone(name: str | Backbone, *, autocast_dtype: torch.dtype | None = None) -> Backbone:
    """Build a frozen backbone; the same name gives the same weights, and the global random state is not touched.

    Args:
        name: A name of :func:`list_backbones`, ``timm:MODEL[.TAG]`` with optional ``?pretrained=false&img_size=448``,
            or a Backbone, which is returned itself.
        autocast_dtype: Run the encoder under autocast to bfloat16 or float16; None leaves what the backbone has.

    Returns:
        The backbone, on the CPU if it was built here.

    Raises:
        ConfigError: For an unknown name or option, or an ``autocast_dtype`` that is none of the three.
        MissingDependencyError: When a package or weights that this backbone needs are absent.

    >>> backbone = create_backbone("toy-vit")
    >>> backbone(torch.zeros(1, 3, 64, 96)).features.shape
    torch.Size([1, 32, 8, 12])
    """
    if autocast_dtype not in AUTOCAST_DTYPES:
        raise ConfigError(f"autocast_dtype is None, torch.bfloat16 or torch.float16; got {autocast_dtype}")
    backbone = name if isinstance(name, Backbone) else _build(name)
    if autocast_dtype is not None:
        backbone.autocast_dtype = autocast_dtype
    return backbone


def list_backbones() -> list[str]:
    """The registered names, sorted. ``timm:MODEL`` names are beside these; ``timm.list_models()`` lists them."""
    return BACKBONES.names()


def _build(name: str) -> Backbone:
    if not isinstance(name, str):
        raise ConfigError(
            f"a backbone is a name or a Backbone; got {type(name).__name__}; wrap a module of your own with "
            f"featsharp.backbones.from_callable(module)"
        )
    prefix, colon, _ = name.partition(":")
    if colon:
        if prefix not in PREFIXES:
            raise unknown_name("backbone prefix", f"{prefix}:", [f"{known}:" for known in PREFIXES.names()])
        return PREFIXES[prefix].factory(name)
    if name not in BACKBONES:
        forms = [entry.description.split()[0] for entry in PREFIXES.entries()]
        raise unknown_name("backbone", name, [*BACKBONES.names(), *forms])
    return BACKBONES[name].factory()
