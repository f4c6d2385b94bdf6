"""Frozen vision encoders by name: ``create_backbone("vits14-focus")``, or any module through ``from_callable``."""

import torch

from featsharp.backbones import (  # noqa: F401  (imported to register)
    from_hub,
    from_open_clip,
    from_timm,
    from_transformers,
    toy,
    vits14_focus,
)
from featsharp.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneOutput
from featsharp.backbones.common import apply_common, feature_options, split_common
from featsharp.backbones.from_callable import from_callable
from featsharp.backbones.names import ALIASES, resolve_alias
from featsharp.backbones.options import COMMON, with_options
from featsharp.backbones.registration import BACKBONES, PREFIXES, register_backbone, register_prefix
from featsharp.errors import ConfigError, unknown_name

__all__ = [
    "ALIASES",
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


def create_backbone(name: str | Backbone, *, autocast_dtype: torch.dtype | None = None, **options: object) -> Backbone:
    """Build a frozen backbone; the same name gives the same weights, and the global random state is not touched.

    Args:
        name: A name of :func:`list_backbones`; ``timm:MODEL[.TAG]``, ``hf:ORG/MODEL``, ``open_clip:MODEL/TAG`` or
            ``hub:OWNER/REPO/ENTRY``, a local file or directory in their place; with options ``?layer=9&facet=key``. Or
            a Backbone, which is returned itself.
        autocast_dtype: Run the encoder under autocast to bfloat16 or float16; None leaves what the backbone has.
        options: As in the name: ``create_backbone("dinov2-s", layer=9, facet="key")``. See
            :class:`featsharp.backbones.options.Choices` for those of the adapters, and for every backbone:

            - ``dtype``: as ``autocast_dtype``, "float32", "bfloat16" or "float16".
            - ``compile``: True compiles the encoder with ``torch.compile``.
            - ``other_sizes``: what a backbone of one size does with images of another: "resize" (the default) lets the
              caller resize them, "tile" covers them with windows of its size.

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
    if isinstance(name, Backbone):
        if options:
            raise ConfigError(f"a Backbone brings its own options; leave out {', '.join(options)}")
        backbone = name
    else:
        backbone = _build(with_options(name, options) if isinstance(name, str) else name)
    if autocast_dtype is not None:
        backbone.autocast_dtype = autocast_dtype
    return backbone


def list_backbones() -> list[str]:
    """All short names, sorted. ``timm:MODEL`` and its like are beside these."""
    return sorted([*BACKBONES.names(), *ALIASES])


def _build(name: str) -> Backbone:
    if not isinstance(name, str):
        raise ConfigError(
            f"a backbone is a name or a Backbone; got {type(name).__name__}; wrap a module of your own with "
            f"featsharp.backbones.from_callable(module)"
        )
    bare, common = split_common(name)
    target = resolve_alias(bare) if bare.partition("?")[0] in ALIASES else bare
    backbone = apply_common(_build_target(target), common)
    backbone.name, backbone.feature_options = name, feature_options(target)
    return backbone


def _build_target(name: str) -> Backbone:
    """The backbone of a name that is no short one, without the options that every backbone has."""
    model, mark, _ = name.partition("?")
    prefix, colon, _ = model.partition(":")
    if colon:
        if prefix not in PREFIXES:
            raise unknown_name("backbone prefix", f"{prefix}:", [f"{known}:" for known in PREFIXES.names()])
        return PREFIXES[prefix].factory(name)
    if model not in BACKBONES:
        forms = [entry.description.split()[0] for entry in PREFIXES.entries()]
        raise unknown_name("backbone", model, [*list_backbones(), *forms])
    if mark:
        raise ConfigError(f"backbone {model!r} has no options but {', '.join(COMMON)}; got {name!r}")
    return BACKBONES[model].factory()
