"""The options that every backbone has, whatever its library."""

from collections.abc import Mapping

import torch

from featsharp.backbones.base import Backbone
from featsharp.backbones.names import ALIASES, resolve_alias, split_query
from featsharp.backbones.options import COMMON, parse_flag, with_options
from featsharp.backbones.windowed import WindowedBackbone
from featsharp.errors import unknown_name

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
OTHER_SIZES = ("resize", "tile")
FEATURE_OPTIONS = ("layer", "facet", "project", "summary")


def split_common(name: str) -> tuple[str, dict[str, str]]:
    """The name without the options of :data:`featsharp.backbones.options.COMMON`, and these."""
    bare, _, query = name.partition("?")
    options = split_query(query)
    rest = {key: value for key, value in options.items() if key not in COMMON}
    return with_options(bare, rest), {key: value for key, value in options.items() if key in COMMON}


def feature_options(name: str) -> dict[str, str]:
    """Those options of a name that choose other features of the same weights."""
    return {key: value for key, value in split_query(name.partition("?")[2]).items() if key in FEATURE_OPTIONS}


def runs_code(name: str) -> bool:
    """Whether building a backbone of this name may run code that is in no installed package."""
    if name.partition("?")[0] in ALIASES:
        name = resolve_alias(name)
    return name.startswith("hub:") or "trust" in split_query(name.partition("?")[2])


def apply_common(backbone: Backbone, options: Mapping[str, str]) -> Backbone:
    """The backbone as these options want it; raises ConfigError for a value that an option does not have."""
    dtype, other_sizes = options.get("dtype", "float32"), options.get("other_sizes", "resize")
    if dtype not in DTYPES:
        raise unknown_name("dtype of a backbone", dtype, DTYPES)
    if other_sizes not in OTHER_SIZES:
        raise unknown_name("value of other_sizes:", other_sizes, OTHER_SIZES)
    if other_sizes == "tile":
        backbone = WindowedBackbone(backbone)
    if DTYPES[dtype] is not None:
        backbone.autocast_dtype = DTYPES[dtype]
    if parse_flag("compile", options.get("compile", "false")):
        backbone.compile()
    return backbone
