"""What can be chosen of a backbone in its name, ``hf:MODEL?layer=9&facet=key``, or as arguments of ``create_backbone``.

Three options are for every backbone and handled by :func:`featsharp.backbones.create_backbone`: ``dtype`` (autocast
type), ``compile`` (true) and ``other_sizes`` ("resize" or "tile": what a backbone of one size does with other images).
The rest goes to the adapter of the library, which says which of them it has.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

from featsharp.backbones.registration import split_options
from featsharp.errors import ConfigError, unknown_name

Facet = Literal["token", "query", "key", "value"]
Summary = Literal["default", "cls", "pool", "projected", "mean", "none"]

# Handled for every backbone alike, before an adapter sees the name.
COMMON = ("dtype", "compile", "other_sizes")
# What adapters may have; each accepts those it names, and options of its own.
CHOICES = ("layer", "facet", "project", "summary", "pretrained", "img_size", "weights")

# Signs that paths may have and that mean something in a name.
_ESCAPES = str.maketrans({"%": "%25", "&": "%26", "+": "%2B"})


@dataclass(frozen=True)
class Choices:
    """What the name of a backbone asks for.

    Attributes:
        layers: Blocks whose output is taken, counted from 0, negative from the end, concatenated on the channel axis in
            this order; None: the last one, as the model itself ends.
        facet: "token" (after the model's final norm), or the "query", "key" or "value" of the attention in those blocks
            ("Deep ViT Features as Dense Visual Descriptors", arXiv 2112.05814; LiFT uses keys).
        project: Whether patch tokens go through the head that aligns the class token with text.
        summary: "default" (what the family is known for), "cls", "pool" (the model's pooling head), "projected"
            (aligned with text), "mean" (of patch tokens) or "none".
        pretrained: False for seeded random weights.
        img_size: (h, w) in pixels to build the model for; None: its own.
        weights: A local file or directory with the weights, in the library's own format; None: the library finds them.
        extra: Options of the adapter's own.
    """

    layers: tuple[int, ...] | None = None
    facet: Facet = "token"
    project: bool = False
    summary: Summary = "default"
    pretrained: bool = True
    img_size: tuple[int, int] | None = None
    weights: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)


def parse_choices(spec: str, supported: Collection[str], extra: Collection[str] = ()) -> tuple[str, Choices]:
    """Take ``MODEL?key=value&key=value`` (without the prefix) apart.

    Args:
        spec: The name; :data:`COMMON` options are passed over.
        supported: Those of :data:`CHOICES` that the adapter has.
        extra: Options of its own, kept as text.

    Raises:
        ConfigError: For an option that is unknown or that this adapter does not have, or a value that it cannot have.
    """
    model, options = split_options(spec, [*CHOICES, *COMMON, *extra])
    for key in options:
        if key in CHOICES and key not in supported:
            own = [*(c for c in CHOICES if c in supported), *extra]
            raise ConfigError(f"backbone {model!r} has no option {key!r}; it has {', '.join([*own, *COMMON])}")
    return model, Choices(
        layers=_layers(options.get("layer")),
        facet=_one_of("facet", options.get("facet", "token"), get_args(Facet)),
        project=parse_flag("project", options.get("project", "false")),
        summary=_one_of("summary", options.get("summary", "default"), get_args(Summary)),
        pretrained=parse_flag("pretrained", options.get("pretrained", "true")),
        img_size=None if "img_size" not in options else parse_size("img_size", options["img_size"]),
        weights=options.get("weights"),
        extra={key: value for key, value in options.items() if key in extra},
    )


def with_options(name: str, options: Mapping[str, Any]) -> str:
    """The name with further options; those that are None are left out, sequences are written with commas, and the signs
    ``& + %``, which paths may have, as ``%26 %2B %25``.

    >>> with_options("hf:x?facet=key", {"layer": [3, -1], "pretrained": False, "weights": None})
    'hf:x?facet=key&layer=3,-1&pretrained=false'
    """
    texts = [f"{key}={_text(value).translate(_ESCAPES)}" for key, value in options.items() if value is not None]
    if not texts:
        return name
    return f"{name}{'&' if '?' in name else '?'}{'&'.join(texts)}"


def parse_flag(option: str, text: str) -> bool:
    """Raises ConfigError for anything but true and false."""
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"option {option} is true or false; got {text!r}")
    return text.lower() == "true"


def parse_size(option: str, text: str) -> tuple[int, int]:
    """``448``, ``448x224`` or ``448,224`` (a tuple, written out) to (h, w); raises ConfigError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)(?:[x,]([1-9]\d*))?", text)
    if match is None:
        raise ConfigError(f"option {option} is a side in pixels or HEIGHTxWIDTH, such as 448 or 448x224; got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def chosen_blocks(blocks: Sequence[nn.Module], layers: tuple[int, ...] | None, name: str) -> list[int]:
    """Numbers from 0 of the blocks that ``layers`` means, the last for None; ConfigError for one that is not there."""
    count = len(blocks)
    for layer in layers or ():
        if not -count <= layer < count:
            raise ConfigError(f"backbone {name!r} has {count} blocks, 0 to {count - 1}; got layer={layer}")
    return [count - 1] if layers is None else [layer % count for layer in layers]


@contextmanager
def captured(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within this context, what each of ``modules`` returns is put into the list, in the order in which they run."""
    outputs: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise ConfigError(f"option layer is a block number or several with commas, such as 9 or 3,6,-1; got {text!r}")
    return tuple(map(int, text.split(",")))


def _one_of(option: str, text: str, allowed: Sequence[str]) -> Any:
    if text not in allowed:
        raise unknown_name(f"{option} of a backbone", text, allowed)
    return text


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)
