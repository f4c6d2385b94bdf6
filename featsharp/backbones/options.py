"""What can be chosen of a backbone in its name, ``hf:MODEL?layer=9&facet=key``, or as arguments of ``create_backbone``.

Three options are for every backbone and handled by :func:`featsharp.backbones.create_backbone`: ``dtype`` (autocast
type), ``compile`` (true) and ``other_sizes`` ("resize" or "tile": what a backbone of one size does with other images).
The rest goes to the adapter of the library, which says which of them it has.
"""

import math
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
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
        weights: A local file or directory with the weights, in the library's own format, ``~`` expanded; None: the
            library finds them.
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
        ConfigError: For an option that is unknown or that this adapter does not have, a value that it cannot have, or
            ``weights`` beside ``pretrained=false``.
    """
    model, options = split_options(spec, [*CHOICES, *COMMON, *extra])
    for key in options:
        if key in CHOICES and key not in supported:
            own = [*(c for c in CHOICES if c in supported), *extra]
            raise ConfigError(f"backbone {model!r} has no option {key!r}; it has {', '.join([*own, *COMMON])}")
    pretrained, weights = parse_flag("pretrained", options.get("pretrained", "true")), options.get("weights")
    if weights is not None and not pretrained:
        raise ConfigError(f"pretrained=false takes random weights for {model!r}; leave out it or weights")
    return model, Choices(
        layers=_layers(options.get("layer")),
        facet=_one_of("facet", options.get("facet", "token"), get_args(Facet)),
        project=parse_flag("project", options.get("project", "false")),
        summary=_one_of("summary", options.get("summary", "default"), get_args(Summary)),
        pretrained=pretrained,
        img_size=None if "img_size" not in options else parse_size("img_size", options["img_size"]),
        weights=None if weights is None else os.path.expanduser(weights),
        extra={key: value for key, value in options.items() if key in extra},
    )


def with_options(name: str, options: Mapping[str, Any]) -> str:
    """The name with further options; those that are None are left out, sequences are written with commas,
    a torch.dtype by its name, and the signs ``& + %``, which paths may have, as ``%26 %2B %25``.

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


def parse_whitening(option: str, values: Any, *, single: bool = False) -> tuple[float, float, float]:
    """Mean or standard deviation of the three channels.

    Args:
        option: "mean" or "std", or a name that ends with one of them, for the message.
        values: Text with commas, as in the name of a backbone, or numbers, as a JSON file holds them.
        single: Take one number for all channels too.

    Raises:
        ConfigError: For another count, numbers that are not finite, and a standard deviation that is not above zero.
    """
    parts = values.split(",") if isinstance(values, str) else values
    try:
        numbers = [float(part) for part in (parts if isinstance(parts, list | tuple) else [parts])]
    except (TypeError, ValueError):
        numbers = []
    if single and len(numbers) == 1:
        numbers *= 3
    positive = option.endswith("std")
    if len(numbers) != 3 or not all(math.isfinite(n) and (n > 0 or not positive) for n in numbers):
        raise ConfigError(
            f"option {option} is {'a number or three' if single else 'three numbers'} with commas, finite"
            f"{' and above 0' if positive else ''}, such as 0.5,0.5,0.5; got {values!r}"
        )
    return numbers[0], numbers[1], numbers[2]


def chosen_blocks(blocks: Sequence[nn.Module], layers: tuple[int, ...] | None, name: str) -> list[int]:
    """Numbers from 0 of the blocks that ``layers`` means, the last for None; ConfigError for one that is not there."""
    count = len(blocks)
    for layer in layers or ():
        if not -count <= layer < count:
            raise ConfigError(f"backbone {name!r} has {count} blocks, 0 to {count - 1}; got layer={layer}")
    return [count - 1] if layers is None else [layer % count for layer in layers]


@contextmanager
def captured(modules: Sequence[nn.Module], *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Within this context, what each of ``modules`` returns is put into the list, in the order in which they run.

    A hook sees the calls of all threads; only those of the thread that entered the context are kept, so that several
    can use one model at a time. The context works inside of what torch.compile compiles.

    Args:
        modules: What is watched.
        inputs: Keep the first positional argument of each in place of what it returns.
    """
    found: list[Tensor] = []
    here = _this_thread()

    def keep(tensor: Tensor) -> None:
        if here is None or _this_thread() in (here, None):
            found.append(tensor)

    if inputs:
        hooks = [module.register_forward_pre_hook(lambda module, given: keep(given[0])) for module in modules]
    else:
        hooks = [module.register_forward_hook(lambda module, given, output: keep(output)) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _this_thread() -> int | None:
    """A number of the calling thread; none while torch.compile traces, which cannot follow it and is one thread."""
    return None if torch.compiler.is_compiling() else threading.get_ident()


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
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)
