"""Encoders of figures: their flags, loading, and the feature maps of one image by all of them."""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from featsharp import settings
from featsharp.errors import ConfigError
from featsharp.names import split_label
from featsharp.settings import DEFAULT_BACKBONE, add_backbone, add_device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from featsharp.backbones.base import Backbone
    from featsharp.builder import SharpEncoder

LOW_RES = "low resolution"
# Encoders by label, those of one backbone together.
Encoders = dict[str, "SharpEncoder"]


def add_encoders(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name encoders of a figure."""
    settings.add_encoders(parser)
    add_backbone(parser, f"default: those of the checkpoints, else {DEFAULT_BACKBONE}", nargs="+", metavar="NAME")
    add_device(parser)
    parser.add_argument(
        "--real",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add the backbone run on the enlarged image, where it takes other sizes than its own",
    )


def load_encoders(arguments: argparse.Namespace) -> dict[str, Encoders]:
    """Load the encoders of a command, by backbone: training-free ones, then checkpoints.

    Training-free upsamplers are built for every --backbone, or for those of the checkpoints. Checkpoints of several
    backbones may have one label: they share a column.

    Raises:
        ConfigError: For a backbone without encoders, and two encoders of one label.
    """
    from featsharp.backbones import create_backbone
    from featsharp.builder import SharpEncoder
    from featsharp.device import find_device
    from featsharp.implicit import load_encoder

    names: list[str] = arguments.backbone or []
    wanted = names[0] if len(names) == 1 else None
    device = find_device(arguments.device)
    backbones: dict[str, Backbone] = {}
    trained: defaultdict[str, Encoders] = defaultdict(dict)
    for text in arguments.checkpoint or []:
        label, path = split_label(text)
        loaded = load_encoder(path, featurizer=wanted, allow_functions=arguments.allow_functions)
        backbone = backbones.setdefault(loaded.backbone.name, loaded.backbone)
        encoder = SharpEncoder(backbone, loaded.upsampler, loaded.normalizer, loaded.bias_buffer).eval()
        encoder.recipe = loaded.recipe
        _add(trained[encoder.backbone.name], label, encoder)
    encoders: dict[str, Encoders] = {}
    for name in dict.fromkeys([*names, *trained] or [DEFAULT_BACKBONE]):
        backbone = backbones.get(name) or create_backbone(name)
        encoders[name] = {}
        for text in arguments.upsampler or []:
            label, path = split_label(text)
            _add(encoders[name], label, load_encoder(path, featurizer=backbone))
        for label, encoder in trained.get(name, {}).items():
            _add(encoders[name], label, encoder)
        if not encoders[name]:
            raise ConfigError(f"nothing to draw for backbone {name}; give --checkpoint FILE or --upsampler bilinear-2x")
    for some in encoders.values():
        for encoder in some.values():
            encoder.to(device)
    return encoders


def feature_maps(
    image: "Image", encoders: "Mapping[str, SharpEncoder]", *, real: bool = False, factor: float | None = None
) -> "dict[str, Tensor]":
    """Compute feature maps of one image, all in one space: low resolution, the encoders, the backbone itself.

    The space is the backbone's, or that of the first encoder whose normalizer has no inverse (LayerNorm).

    All encoders share the low-resolution pass, which has the image's aspect ratio and about the area of the backbone's
    native size (exactly that size for a backbone that takes no other), and get the image at the largest factor.

    Args:
        image: RGB picture.
        encoders: By caption, all with one backbone.
        real: Whether to add the backbone itself on the enlarged image. Left out where it takes one size only.
        factor: Of the enlarged image; None: the largest of the encoders.

    Returns:
        By caption, [1, C, h, w] each, float32, at their resolution.

    Raises:
        ConfigError: For no encoders.
    """
    import torch

    from featsharp.data.images import image_to_tensor
    from featsharp.ops.resize import resize

    if not encoders:
        raise ConfigError("nothing to draw; give at least one encoder")
    first = next(iter(encoders.values()))
    backbone = first.backbone
    factor = factor or max(encoder.factor for encoder in encoders.values())
    low_res_size = first.native_low_res_size((image.height, image.width))
    size = (round(factor * low_res_size[0]), round(factor * low_res_size[1]))
    with torch.inference_mode():
        whitened = first.input_conditioner(resize(image_to_tensor(image)[None], size).to(first.device))
        to_space = next((e.normalizer for e in encoders.values() if not e.normalizer.invertible), torch.nn.Identity())
        maps = {LOW_RES: to_space(backbone(resize(whitened, low_res_size)).features.float())}
        for caption, encoder in encoders.items():
            invertible = encoder.normalizer.invertible
            out = encoder(whitened, denormalize=invertible, low_res_size=low_res_size)
            # Of several maps (S2) the last one, of the largest scale.
            features = out.high_res[:, -encoder.embed_dim :].float()
            maps[caption] = to_space(features) if invertible else features
        if real and backbone.flexible:
            enlarged = resize(whitened, backbone.fit_size(*size))
            maps[real_caption(factor)] = to_space(backbone(enlarged).features.float())
    return maps


def real_caption(factor: float) -> str:
    """Format the caption of the backbone itself on the enlarged image."""
    return f"backbone at {factor:g}x"


def _add(encoders: Encoders, label: str, encoder: "SharpEncoder") -> None:
    label = label or encoder.caption
    if label in encoders:
        raise ConfigError(f"two encoders are called {label!r}; name them: LABEL=FILE")
    encoders[label] = encoder
