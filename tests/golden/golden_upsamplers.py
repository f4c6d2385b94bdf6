"""Recorded runs of upsamplers, shipped weights and normalizers."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from golden_base import Values, add, disturb, drawn, smooth_images, state_of
from torch import Tensor

import featsharp
from featsharp import create_backbone, create_encoder, load_from_file
from featsharp.normalizers import FeatureStatistics, create_normalizer, list_normalizers


def nearest(image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    """A function of the user's own as an upsampler."""
    return F.interpolate(features, size, mode="nearest")


def enlarge(images: Tensor) -> Tensor:
    """A super-resolution of sorts."""
    return F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)


ANY, WHOLE, POWERS, ONE = (2, 1.5, 3), (2, 3), (2, 4), (1,)
FACTORS = {
    "carafe": WHOLE,
    "featsharp-progressive": WHOLE,
    "identity": ONE,
    "lift": POWERS,
    "s2-pooled": ONE,
    "sapa": WHOLE,
}  # all others: ANY
NEEDED = {"custom": {"function": nearest}, "super-resolution": {"enlarge": enlarge}}
VARIANTS = {
    "featup, its own flavour": ("featup", {"flavour": "featup"}),
    "featup, published start": ("featup", {"start": "published"}),
    "featsharp, published": ("featsharp", {"start": "published", "widths": "published"}),
    "featsharp, jafar": ("featsharp", {"inputs": ["jafar", "tiles"], "layer_norm": False}),
    "featsharp, all inputs": ("featsharp", {"inputs": ["resfu", "jbu", "bilinear", "rgb", "jafar", "tiles"]}),
    "featsharp, no tiles": ("featsharp", {"inputs": ["bilinear", "jbu"]}),
    "featsharp, no attention": ("featsharp", {"attention": False}),
    "featsharp, no SwiGLU": ("featsharp", {"ffn": False, "start": "published"}),
    "featsharp, linear": (
        "featsharp",
        {"inputs": ["bilinear", "tiles", "details"], "attention": False, "ffn": False},
    ),
    "featsharp, details": ("featsharp", {"inputs": ["bilinear", "details", "tiles"]}),
    "featsharp, RoPE": ("featsharp", {"position": "rope"}),
    "featsharp, xPos": ("featsharp", {"position": "xpos", "window": 5}),
    "featsharp-progressive, published": ("featsharp-progressive", {"start": "published"}),
}
# A little more than the least that works for the images below.
LIMITS = {
    "anyup": "300MiB",
    "bilinear": "22MiB",
    "featsharp": "22MiB",
    "featup": "22MiB",
    "identity": "22MiB",
    "jafar": "90MiB",
    "tile": "20MiB",
}


def sharpen(
    name: str, backbone: str, factor: float, options: Mapping[str, Any], folder: Path, **settings: Any
) -> Values:
    """Maps of an encoder with disturbed weights, normalised and bias buffer included."""
    encoder = create_encoder(backbone, name, factor, upsampler_options=options)
    disturb(encoder.upsampler)
    images = smooth_images(112, 80)
    with torch.no_grad():
        out = encoder(images, return_summary=encoder.backbone.summary_dim is not None, **settings)
    values: Values = {"low_res": out.low_res, "high_res": out.high_res}
    if out.summary is not None:
        values["summary"] = out.summary
    return values


def sharpen_in_parts(name: str, factor: float, folder: Path) -> Values:
    """Maps of two images under a limit on memory."""
    encoder = create_encoder("toy-vit", name, factor, max_memory=LIMITS[name])
    disturb(encoder.upsampler)
    with torch.no_grad():
        out = encoder(smooth_images(336, 240, 2))
    return {"low_res": out.low_res, "high_res": out.high_res}


def start(name: str, factor: float, options: Mapping[str, Any], folder: Path) -> Values:
    """Names and seeded start of the weights, as a checkpoint holds them."""
    torch.manual_seed(0)
    return state_of(featsharp.create_upsampler(name, create_backbone("toy-vit"), factor, options=options).state_dict())


# Methods of before the move; later ones have an oracle of their own (views: tests/ops/test_reconstruct.py) or a record
# of their own (tests/upsamplers/test_peers.py).
LATER = ("learned-views", "loftup", "naf", "uplift", "views")
RECORDED = [name for name in featsharp.list_upsamplers() if name not in LATER]
for _name in RECORDED:
    _options = NEEDED.get(_name, {})
    for _factor in FACTORS.get(_name, ANY):
        add(f"upsampler/{_name}-{_factor:g}x/toy-vit", sharpen, _name, "toy-vit", _factor, _options)
    if _name != "stride":  # needs patches that do not overlap
        _factor = FACTORS.get(_name, ANY)[0]
        add(f"upsampler/{_name}-{_factor:g}x/toy-cnn", sharpen, _name, "toy-cnn", _factor, _options)
    if _name not in FACTORS:
        _run = functools.partial(sharpen, output_size=(31, 27))
        add(f"upsampler/{_name} to 31x27/toy-vit", _run, _name, "toy-vit", 2, _options)
    add(f"start/{_name}", start, _name, FACTORS.get(_name, ANY)[0], _options)
for _label, (_name, _options) in VARIANTS.items():
    add(f"upsampler/{_label}/toy-vit", sharpen, _name, "toy-vit", 2, _options)
    add(f"start/{_label}", start, _name, 2, _options)
for _name in LIMITS:  # how a map is cut is a matter of the planner, and shows in the last bits
    add(
        f"parts/{_name}",
        sharpen_in_parts,
        _name,
        FACTORS.get(_name, ANY)[0],
        exact=False,
        slow=_name in ("anyup", "jafar"),
    )


def shipped(folder: Path, **settings: Any) -> Values:
    """The weights that come with the package."""
    encoder = load_from_file("vits14-focus/featsharp-2x@1", **settings)
    with torch.no_grad():
        out = encoder(smooth_images(140, 196), return_summary=True, denormalize=True)
        normalised = encoder(smooth_images(112, 84))
    return {
        "low_res": out.low_res,
        "high_res": out.high_res,
        "summary": out.summary,
        "normalised": normalised.high_res,
    }


add("shipped/vits14-focus/featsharp-2x", shipped)
add("shipped/vits14-focus/featsharp-2x in parts", functools.partial(shipped, max_memory="48MiB"), exact=False)


# Normalizers


def normalise(name: str, folder: Path) -> Values:
    """Fit to features of unequal and correlated channels; then there and back."""
    normalizer = create_normalizer(name, 32)
    if normalizer.needs_fit:
        statistics = FeatureStatistics(32)
        for batch in range(3):
            statistics.update(channels(f"batch {batch}", 4))
        normalizer.fit(statistics)
    maps = channels("maps", 2)
    normalised = normalizer(maps)
    values = {"normalised": normalised} | state_of(normalizer.state_dict())
    return values | {"denormalised": normalizer.denormalize(normalised)} if normalizer.invertible else values


def channels(name: str, count: int) -> Tensor:
    """Feature maps [count, 32, 7, 9]."""
    mix = drawn("mix", 32, 32) * torch.linspace(0.1, 3, 32)[:, None]
    return torch.einsum("cd,bdhw->bchw", mix, drawn(name, count, 32, 7, 9)) + 2 * drawn("mean", 32, 1, 1)


def normalised_encoder(folder: Path) -> Values:
    """An encoder with PHI-S and a bias buffer, in normalised space and in that of the backbone."""
    encoder = create_encoder("toy-vit", "tile", 2, normalizer="phi-s", bias_buffer=True)
    statistics = FeatureStatistics(32)
    with torch.no_grad():
        statistics.update(encoder.backbone(smooth_images(64, 64, 6)).features)
        encoder.normalizer.fit(statistics)
        for name, weight in encoder.bias_buffer.named_parameters():
            weight.copy_(0.1 * drawn(name, *weight.shape))
        images = smooth_images(112, 80)
        return {"normalised": encoder(images).high_res, "own space": encoder(images, denormalize=True).high_res}


for _entry in list_normalizers():
    add(f"normalizer/{_entry.name}", normalise, _entry.name)
add("normalizer/in an encoder", normalised_encoder)
