"""The table of upsamplers: a name, a factory (embed_dim, factor, **options) and a line for ``featsharp ls``."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from featsharp.device import usual_defaults
from featsharp.errors import ConfigError, unknown_name
from featsharp.names import is_function_name, parse_upsampler, plain_value
from featsharp.registry import Registry
from featsharp.upsamplers.base import Upsampler

UPSAMPLERS: Registry[Upsampler] = Registry("upsampler")
register_upsampler = UPSAMPLERS.register


class HasEmbedDim(Protocol):
    """Any object with a number of channels, such as a backbone."""

    embed_dim: int


def create_upsampler(
    name: str, backbone: HasEmbedDim, factor: float | None = None, *, options: Mapping[str, Any] | None = None
) -> Upsampler:
    """Build an untrained upsampler for a backbone.

    Args:
        name: One of :func:`list_upsamplers`, also with its factor and options: "views-2x?passes=4".
        backbone: Anything with ``embed_dim``.
        factor: In each direction, at least 1, one of the method's ``factors``; None: that of the name, else
            :func:`default_factor`.
        options: Keyword arguments of the upsampler's class, for example ``{"widths": "published"}``.

    Raises:
        ConfigError: For an unknown name, an option that this upsampler does not have, a factor that it cannot have, or
            one that differs from the name's.
    """
    name, factor, options = resolve_upsampler(name, factor, options)
    facts = {key: getattr(backbone, key) for key in read_trait(name, "backbone_facts") if hasattr(backbone, key)}
    return build_upsampler(name, backbone.embed_dim, factor, facts | options)


class ResolvedUpsampler(NamedTuple):
    """All that :func:`build_upsampler` needs beside the channels."""

    name: str
    factor: float
    options: dict[str, Any]


def resolve_upsampler(
    text: str, factor: float | None = None, options: Mapping[str, Any] | None = None, *, functions: bool = False
) -> ResolvedUpsampler:
    """Resolve ``NAME[-FACTORx][?key=value]`` and a factor and options beside it.

    Args:
        text: The name as the user wrote it.
        factor: Given beside it.
        options: Given beside it.
        functions: Whether ``module:function``, which runs code, is a name: of "custom" with that option.

    Raises:
        ConfigError: For two different factors, or none and an unknown name, and for an option that is given twice.
    """
    name, named, written = parse_upsampler(text, UPSAMPLERS)
    if functions and is_function_name(name):
        name, written = "custom", {**written, "function": name}
    if named is not None and factor is not None and named != factor:
        raise ConfigError(f"{text!r} has factor {named:g}, but factor={factor:g} is given too; leave one of them out")
    for key in options or {}:
        if key in written:
            raise ConfigError(f"option {key} of upsampler {text!r} is given twice; give it once")
    factor = named if factor is None else factor
    return ResolvedUpsampler(name, default_factor(name) if factor is None else factor, {**written, **(options or {})})


def default_factor(name: str) -> int:
    """Return the factor of an upsampler where the user gives none: 2, or 1 for methods that have no other."""
    return 1 if read_trait(name, "factors") == "one" else 2


@torch.inference_mode(False)  # tensors made in inference mode could never be trained
def build_upsampler(name: str, embed_dim: int, factor: float, options: Mapping[str, Any]) -> Upsampler:
    """Build an upsampler by name; raises ConfigError for a name or an option that does not exist."""
    try:
        with usual_defaults() as device:
            upsampler = UPSAMPLERS[name].factory(embed_dim, factor, **plain_value(options))
        return upsampler.to(device)
    except TypeError as error:  # an option that does not exist, or of another type than it should be
        allowed = (*read_trait(name, "options"), *read_trait(name, "backbone_facts"))
        unknown = [option for option in options if option not in allowed and repr(option) in str(error)]
        if unknown and allowed:
            raise unknown_name(f"option of upsampler {name!r}:", unknown[0], allowed) from error
        raise ConfigError(f"upsampler {name!r} cannot be built with {dict(options)}: {error}") from error


def read_trait(name: str, trait: str) -> Any:
    """Read a class attribute of :class:`Upsampler` before one is built; its default for factories that are no class."""
    return getattr(UPSAMPLERS[name].factory, trait, getattr(Upsampler, trait))
