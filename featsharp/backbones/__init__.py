"""Frozen vision encoders by name: ``create_backbone("vits14-focus")``, or any module through ``from_callable``."""

import logging
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from featsharp.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneOutput
from featsharp.backbones.from_callable import from_callable
from featsharp.backbones.loading import set_native_size
from featsharp.backbones.models import FAMILIES, MODELS, Family, Model
from featsharp.backbones.options import COMMON, FEATURES, OPTIONS, Options, parse_options
from featsharp.device import usual_defaults
from featsharp.errors import ConfigError, unknown_name
from featsharp.names import BackboneName, parse_backbone

__all__ = [
    "FAMILIES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MODELS",
    "Backbone",
    "BackboneOutput",
    "Family",
    "Model",
    "Options",
    "check_name",
    "create_backbone",
    "from_callable",
    "list_backbones",
    "register_backbone",
    "register_family",
    "register_prefix",
    "resolve_backbone",
]

logger = logging.getLogger(__name__)

AUTOCAST_DTYPES = (None, torch.bfloat16, torch.float16)
Factory = TypeVar("Factory", bound=Callable[[], Backbone])
PrefixFactory = TypeVar("PrefixFactory", bound=Callable[[str], Backbone])


def create_backbone(name: str | Backbone, *, autocast_dtype: torch.dtype | None = None, **options: Any) -> Backbone:
    """Build a frozen backbone; the same name gives the same weights, and the global random state is not touched.

    Args:
        name: A name of :func:`list_backbones`; ``timm:MODEL[.TAG]``, ``hf:ORG/MODEL``, ``open_clip:MODEL/TAG`` or
            ``hub:OWNER/REPO/ENTRY``, a local file or directory in their place; with options ``?layer=9&facet=key``. Or
            a Backbone, which is returned itself.
        autocast_dtype: Run the encoder under autocast to bfloat16 or float16; None leaves what the backbone has.
        options: Those of :class:`featsharp.backbones.options.Options`, as in the name:
            ``create_backbone("dinov2-s", layer=9, facet="key")``.

    Returns:
        The backbone; one that was built here is float32 and on torch's default device, which is the CPU unless set.

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
    elif isinstance(name, str):
        with usual_defaults() as device:
            backbone = _build(parse_backbone(name).with_options(**options))
        if device.type != "cpu":
            backbone.to(device)
    else:
        raise ConfigError(
            f"a backbone is a name or a Backbone; got {type(name).__name__}; wrap a module of your own with "
            f"featsharp.backbones.from_callable(module)"
        )
    if autocast_dtype is not None:
        backbone.autocast_dtype = autocast_dtype
    return backbone


def list_backbones() -> list[str]:
    """All short names, sorted. ``timm:MODEL`` and its like are beside these."""
    return sorted(MODELS)


def register_backbone(name: str, description: str) -> Callable[[Factory], Factory]:
    """Decorator: make ``create_backbone(name)`` call the decorated factory, which takes no argument.

    Args:
        name: Name for ``create_backbone``.
        description: One line for ``featsharp ls``.
    """

    def add(factory: Factory) -> Factory:
        if name in MODELS:
            raise AssertionError(f"backbone {name!r} is registered twice")
        MODELS[name] = Model("", description, name, build=factory)
        return factory

    return add


def register_family(prefix: str, family: Family) -> None:
    """Make ``create_backbone("prefix:MODEL?options")`` call ``family.build(name, MODEL, options)``.

    Raises:
        ConfigError: For an option that is none of those of :class:`featsharp.backbones.options.Options`.
    """
    if prefix in FAMILIES:
        raise AssertionError(f"backbone prefix {prefix!r} is registered twice")
    for option in family.options or ():
        if option not in OPTIONS:
            raise unknown_name(f"option of family {prefix!r}:", option, OPTIONS)
    FAMILIES[prefix] = family


def register_prefix(prefix: str, description: str) -> Callable[[PrefixFactory], PrefixFactory]:
    """Decorator: make ``create_backbone("prefix:REST")`` call the decorated factory with ``"prefix:REST"``.

    Deprecated for :func:`register_family`, which parses the options; it goes in version 0.3.

    Args:
        prefix: The part before the colon.
        description: One line for ``featsharp ls``: the form of a name, a space, what it is.
    """
    warnings.warn("register_prefix is now register_family; it goes in version 0.3", DeprecationWarning, stacklevel=2)
    form, _, text = description.partition(" ")

    def add(factory: PrefixFactory) -> PrefixFactory:
        register_family(prefix, Family(lambda name, model, options: factory(name), form, text, options=None))
        return factory

    return add


def resolve_backbone(name: str | BackboneName) -> BackboneName:
    """The name that a short one stands for; options of the short name go before those of the table."""
    parsed = parse_backbone(name) if isinstance(name, str) else name
    model = MODELS.get(parsed.model)
    if model is None or not model.target:
        return parsed
    target = parse_backbone(model.target)
    return BackboneName(target.model, {**target.options, **parsed.options})


def check_name(name: str | BackboneName) -> None:
    """Raise ConfigError for an unknown short name or prefix; models behind a prefix are not looked up."""
    target = resolve_backbone(name)
    if target.prefix and target.prefix not in FAMILIES:
        raise unknown_name("backbone prefix", f"{target.prefix}:", [f"{known}:" for known in sorted(FAMILIES)])
    if not target.prefix and target.model not in MODELS:
        forms = [FAMILIES[prefix].form for prefix in sorted(FAMILIES)]
        raise unknown_name("backbone", target.model, [*list_backbones(), *forms])


def runs_code(name: str) -> bool:
    """Tell whether building a backbone of this name may run code that is in no installed package."""
    target = resolve_backbone(name)
    family = FAMILIES.get(target.prefix)
    return "trust" in target.options or (family is not None and family.runs_code)


def _build(name: BackboneName) -> Backbone:
    check_name(name)
    target = resolve_backbone(name)
    texts: Mapping[str, str] = target.options
    if target.prefix:
        family = FAMILIES[target.prefix]
        model = target.model.partition(":")[2]
        if family.options is None:
            options = parse_options(name.model, {key: text for key, text in texts.items() if key in COMMON})
        else:
            options = parse_options(name.model, texts, family.options)
        label = str(BackboneName(target.model, {key: text for key, text in texts.items() if key not in COMMON}))
        if options.weights is not None and not Path(options.weights).exists():
            raise ConfigError(f"weights of backbone {label!r}: there is no file or directory {options.weights!r}")
        if options.pretrained and options.weights is None:
            _say_licence(target)
        backbone = _load(family.build)(label, model, options)
        if options.img_size is not None:
            set_native_size(backbone, options.img_size)
    else:
        options = parse_options(name.model, texts) if texts else Options()
        backbone = _load(MODELS[target.model].build)()
    if options.other_sizes == "tile":
        from featsharp.backbones.windowed import WindowedBackbone

        backbone = WindowedBackbone(backbone)
    if options.dtype is not None:
        backbone.autocast_dtype = options.dtype
    if options.compile:
        backbone.compile()
    backbone.name = str(name)
    backbone.feature_options = {key: text for key, text in texts.items() if key in FEATURES}
    return backbone


def _say_licence(target: BackboneName) -> None:
    """Log the licence of weights that are about to be downloaded, where the table knows it."""
    from featsharp.backbones.local_weights import has_local_weights

    names = [name for name, model in MODELS.items() if parse_backbone(model.target).model == target.model]
    licence = MODELS[names[0]].licence if names else ""
    if licence and not has_local_weights(names[0]):
        logger.warning("%s: weights of licence %s, which are not on this machine yet", target.model, licence)


def _load(build: str | Callable[..., Backbone]) -> Callable[..., Backbone]:
    """A function, or the one that "module:function" of a table names."""
    if not isinstance(build, str):
        return build
    module, _, function = build.partition(":")
    factory: Callable[..., Backbone] = getattr(import_module(module), function)
    return factory
