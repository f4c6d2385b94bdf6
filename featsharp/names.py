"""Parsing of names, as command lines, configurations and checkpoints write them.

=========  ==============================  =============================================================
backbone   ``MODEL?key=value&key=value``   ``dinov2-l``, ``timm:vit_base_patch16_224.dino?layer=-2``
upsampler  ``NAME[-FACTORx][?key=value]``  ``tile-1.5x``, ``views-2x?passes=4``, ``my_module:my_function-2x``
labelled   ``[LABEL=]NAME``                ``ours=runs/last.pth``
=========  ==============================  =============================================================

In Python the parts are arguments: ``create_backbone("dinov2-l", layer=-2)``, ``create_encoder(b, "tile", 1.5)``.
Their options are stored beside the names as values of JSON: :func:`plain_value`.
"""

import json
import os
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from featsharp.errors import ConfigError

if TYPE_CHECKING:
    import torch

CHECKPOINT_ENDINGS = (".pth", ".pt", ".safetensors")
_UPSAMPLER = re.compile(r"(?P<name>[\w.:-]*\w)-(?P<factor>-?\d+(\.\d+)?)x")
# Characters of paths that have a meaning among the options of a backbone.
_ESCAPES = str.maketrans({"%": "%25", "&": "%26", "+": "%2B"})


@dataclass(frozen=True)
class BackboneName:
    """A backbone: a short name or ``prefix:model``, and its options as text.

    >>> str(parse_backbone("hf:x?facet=key").with_options(layer=[3, -1], pretrained=False, weights=None))
    'hf:x?facet=key&layer=3,-1&pretrained=false'
    """

    model: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """Text before the model's first colon, "" without one."""
        return self.model.partition(":")[0] if ":" in self.model else ""

    def with_options(self, **options: Any) -> "BackboneName":
        """Add options to the name; those that are None are left out.

        Sequences are written with commas, a ``torch.dtype`` by its name, True and False in lower case.

        Raises:
            ConfigError: For an option that the name has already.
        """
        texts = {key: _option_text(value) for key, value in options.items() if value is not None}
        for key in texts:
            if key in self.options:
                raise ConfigError(f"option {key} of backbone {str(self)!r} is given twice; give it once")
        return BackboneName(self.model, {**self.options, **texts})

    def __str__(self) -> str:
        """Format the name as it is stored, with ``& + %`` in values as ``%26 %2B %25``."""
        query = "&".join(f"{key}={value.translate(_ESCAPES)}" for key, value in self.options.items())
        return f"{self.model}?{query}" if query else self.model


def parse_backbone(text: str) -> BackboneName:
    """Parse ``MODEL?key=value&key=value``.

    Raises:
        ConfigError: For a repeated key, or options that are not ``key=value``.
    """
    return BackboneName(*_split_options(text))


class UpsamplerName(NamedTuple):
    """An upsampler: its name, its factor, None where none is given, and its options, values of JSON or text."""

    name: str
    factor: float | None = None
    options: Mapping[str, Any] = {}

    @property
    def curve(self) -> str:
        """Name with the options, without the factor: "views?passes=4"."""
        return str(BackboneName(self.name, {key: write_value(value) for key, value in self.options.items()}))


def parse_upsampler(text: str, known: Container[str] = ()) -> UpsamplerName:
    """Parse ``NAME[-FACTORx][?key=value&key=value]``.

    Args:
        text: The name as the user wrote it.
        known: Names that stay whole, although they end like a factor.

    Raises:
        ConfigError: As :func:`parse_backbone`.

    >>> parse_upsampler("tile-1.5x")
    UpsamplerName(name='tile', factor=1.5, options={})
    >>> parse_upsampler("views?passes=4&views=hr-dv2").options
    {'passes': 4, 'views': 'hr-dv2'}
    """
    name, texts = _split_options(text)
    options = {key: _read_value(value) for key, value in texts.items()}
    match = None if name in known else _UPSAMPLER.fullmatch(name)
    factor = float(match["factor"]) if match else None
    return UpsamplerName(match["name"] if match else name, factor, options)


def is_function_name(name: str) -> bool:
    """Return whether a name is that of a function of the user, ``module:function``."""
    return ":" in name


def split_label(text: str) -> tuple[str, str]:
    """Split ``LABEL=NAME``; the label is "" without "=", or where that belongs to a path or an option."""
    label, separator, name = text.partition("=")
    if not separator or "?" in label or "/" in label or "\\" in label or os.path.isfile(text):
        return "", text
    return readable(label), name


def label_encoders(texts: Sequence[str]) -> dict[str, str]:
    """Label encoders: by the label of ``LABEL=NAME``, else by the name.

    Of a file that is the shortest end of its path, without suffix, that no other file has.

    Raises:
        ConfigError: For two of one label.

    >>> label_encoders(["bilinear-2x", "runs/a/last.pth", "runs/b/last.pth", "ours=c.pth"])
    {'bilinear-2x': 'bilinear-2x', 'a/last': 'runs/a/last.pth', 'b/last': 'runs/b/last.pth', 'ours': 'c.pth'}
    """
    pairs = [split_label(text) for text in texts]
    files = [PurePath(name).with_suffix("").parts if not label and _is_file(name) else () for label, name in pairs]
    labelled: dict[str, str] = {}
    for index, (label, name) in enumerate(pairs):
        others = files[:index] + files[index + 1 :]
        label = label or readable(_shortest_end(files[index], others) if files[index] else name)
        if label in labelled:
            raise ConfigError(f"two encoders are called {label!r}; name them apart: LABEL={name}")
        labelled[label] = name
    return labelled


def _is_file(name: str) -> bool:
    return name.endswith(CHECKPOINT_ENDINGS) or os.path.isfile(name)


def _shortest_end(parts: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    """Return the fewest last parts of a path that distinguish it from the others; all where none do."""
    count = next((n for n in range(1, len(parts)) if all(parts[-n:] != other[-n:] for other in others)), len(parts))
    return PurePath(*parts[-count:]).as_posix()


def readable(text: str) -> str:
    r"""Escape the bytes of file names that are no text, for figures and files in UTF-8; other text is left alone.

    >>> readable("caf\udce9 é")
    'caf\\udce9 é'
    """
    return text.encode("utf-8", "backslashreplace").decode()


def plain_value(value: Any) -> Any:
    """Convert NumPy's numbers and arrays, tensors, tuples, ranges and mappings to values of JSON; keep others."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | list | range):
        return [plain_value(one) for one in value]
    if isinstance(value, Mapping):
        return {key: plain_value(one) for key, one in value.items()}
    return value


def dtype_name(dtype: "torch.dtype") -> str:
    """Name a type without its library: "float16"."""
    return str(dtype).removeprefix("torch.")


def _split_options(text: str) -> tuple[str, dict[str, str]]:
    """Split ``NAME?key=value&key=value`` into the name and the options."""
    name, _, query = text.partition("?")
    try:
        # A plus is a plus, in paths above all, not a space.
        pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise ConfigError(f"options are written ?key=value&key=value; got {text!r}") from None
    if len(dict(pairs)) < len(pairs):
        raise ConfigError(f"an option is given twice in {text!r}; give it once")
    return name, dict(pairs)


def write_value(value: Any) -> str:
    """Write a value of JSON so that the parser of options reads it again; text as it is where that is enough."""
    return value if isinstance(value, str) and _read_value(value) == value else json.dumps(value)


def _read_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _option_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return dtype_name(value) if type(value).__name__ == "dtype" else str(value)
