"""Options of a backbone: arguments of ``create_backbone``, or ``?key=value`` in a name; one table has their values."""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from featsharp.errors import ConfigError, unknown_name
from featsharp.layers.input_conditioner import Whitening, three_numbers

Facet = Literal["token", "query", "key", "value"]
Summary = Literal["default", "cls", "pool", "projected", "mean", "none"]

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Those of every backbone, whatever its library.
COMMON = ("dtype", "compile", "other_sizes")
# Those that choose other features of the same weights; a checkpoint keeps them.
FEATURES = ("layer", "facet", "project", "summary")


@dataclass(frozen=True)
class Options:
    """Options of a backbone, parsed; a family of models has some of them (:data:`featsharp.backbones.models.FAMILIES`).

    Attributes:
        layer: Blocks whose output is taken, counted from 0, negative from the end, concatenated on the channel axis in
            this order; None: the last one, as the model itself ends. Stages of convolutional networks.
        facet: "token" (after the model's final norm), or the "query", "key" or "value" of the attention in those blocks
            ("Deep ViT Features as Dense Visual Descriptors", arXiv 2112.05814; LiFT uses keys).
        project: Whether patch tokens go through the head that aligns the class token with text.
        summary: "default" (what the family is known for), "cls", "pool" (the model's pooling head), "projected"
            (aligned with text), "mean" (of patch tokens) or "none".
        pretrained: False for seeded random weights.
        img_size: Native (h, w) in pixels; None: the model's own.
        weights: A local file or directory with the weights, in the library's own format, ``~`` expanded; None: the
            library finds them.
        mean, std: Whitening in place of the model's, three channels.
        trust: Whether code that comes with the model may run.
        version, adaptor_names: Arguments of a torch.hub entry (RADIO).
        dtype: Autocast type of the encoder; None: no autocast.
        compile: Whether the encoder is compiled with ``torch.compile``.
        other_sizes: "resize" or "tile": what a backbone of one size does with images of another.
    """

    layer: tuple[int, ...] | None = None
    facet: Facet = "token"
    project: bool = False
    summary: Summary = "default"
    pretrained: bool = True
    img_size: tuple[int, int] | None = None
    weights: str | None = None
    mean: Whitening | None = None
    std: Whitening | None = None
    trust: bool = False
    version: str | None = None
    adaptor_names: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    compile: bool = False
    other_sizes: Literal["resize", "tile"] = "resize"

    @property
    def inner(self) -> bool:
        """True where features are taken from inside the model instead of its end."""
        return self.layer is not None or self.facet != "token"


DEFAULTS = Options()


def parse_options(model: str, texts: Mapping[str, str], supported: Collection[str] = ()) -> Options:
    """Options of a name as values.

    Args:
        model: The backbone, for messages.
        texts: Text by option.
        supported: Options that this backbone has besides :data:`COMMON`.

    Raises:
        ConfigError: For an option that is unknown or that this backbone does not have, a value that it cannot have, or
            ``weights`` beside ``pretrained=false``.
    """
    allowed = [*(key for key in OPTIONS if key in supported), *COMMON]
    for key in texts:
        if key not in OPTIONS:
            raise unknown_name(f"option of backbone {model!r}:", key, allowed)
        if key not in allowed:
            raise ConfigError(f"backbone {model!r} has no option {key!r}; it has {', '.join(allowed)}")
    options = Options(**{key: OPTIONS[key](key, text) for key, text in texts.items()})
    if options.weights is not None and not options.pretrained:
        raise ConfigError(f"pretrained=false takes random weights for {model!r}; leave out it or weights")
    return options


def parse_whitening(option: str, values: Any) -> Whitening:
    """Mean or standard deviation of the three channels.

    Args:
        option: "mean" or "std", or a name that ends with one of them, for the message.
        values: Text with commas, as in the name of a backbone, or numbers, as a JSON file holds them; one number is for
            all channels.

    Raises:
        ConfigError: For another count, numbers that are not finite, and a standard deviation that is not above zero.
    """
    parts = values.split(",") if isinstance(values, str) else values
    parts = parts if isinstance(parts, list | tuple) else [parts]
    positive = option.endswith("std")
    numbers = three_numbers(3 * parts if len(parts) == 1 else parts, positive=positive)
    if numbers is None:
        raise ConfigError(
            f"option {option} is a number or three with commas, finite{' and above 0' if positive else ''}, such as "
            f"0.5,0.5,0.5; got {values!r}"
        )
    return numbers


def _parse_flag(option: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"option {option} is true or false; got {text!r}")
    return text.lower() == "true"


def _parse_size(option: str, text: str) -> tuple[int, int]:
    """``448``, ``448x224`` or ``448,224`` (a tuple, written out) to (h, w)."""
    match = re.fullmatch(r"([1-9]\d*)(?:[x,]([1-9]\d*))?", text)
    if match is None:
        raise ConfigError(f"option {option} is a side in pixels or HEIGHTxWIDTH, such as 448 or 448x224; got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _parse_layer(option: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise ConfigError(f"option layer is a block number or several with commas, such as 9 or 3,6,-1; got {text!r}")
    return tuple(map(int, text.split(",")))


def _parse_one_of(allowed: Sequence[str]) -> Callable[[str, str], str]:
    def parse(option: str, text: str) -> str:
        if text not in allowed:
            raise unknown_name(f"{option} of a backbone", text, allowed)
        return text

    return parse


def _parse_dtype(option: str, text: str) -> torch.dtype | None:
    return DTYPES[_parse_one_of(list(DTYPES))(option, text)]


# Every option, with the function (option, text) -> value that knows its values.
OPTIONS: dict[str, Callable[[str, str], Any]] = {
    "layer": _parse_layer,
    "facet": _parse_one_of(get_args(Facet)),
    "project": _parse_flag,
    "summary": _parse_one_of(get_args(Summary)),
    "pretrained": _parse_flag,
    "img_size": _parse_size,
    "weights": lambda option, text: os.path.expanduser(text),
    "mean": parse_whitening,
    "std": parse_whitening,
    "trust": _parse_flag,
    "version": lambda option, text: text,
    "adaptor_names": lambda option, text: tuple(text.split(",")),
    "dtype": _parse_dtype,
    "compile": _parse_flag,
    "other_sizes": _parse_one_of(("resize", "tile")),
}
