"""What is recorded: seeded runs of upsamplers, backbones, normalizers, training and evaluation, by public names only.

A case gets an empty folder and returns tensors, numbers and texts by name. ``record.py`` writes them down,
``test_golden.py`` compares. Weights are drawn by the name of the parameter, so neither the order in which a module
makes its layers nor a library's initialisation has a say in the results.
"""

import contextlib
import functools
import io
import json
import math
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

# The only lines of this file that a move of modules may change.
import featsharp
from featsharp import create_backbone, create_encoder, from_callable, load_from_file
from featsharp.cli.main import main as featsharp_command
from featsharp.implicit import load_fit
from featsharp.normalizers import FeatureStatistics, create_normalizer, list_normalizers
from featsharp.train import main as train_command

Values = dict[str, Tensor | float | str]

MAPS = 1e-4  # of the largest absolute value of the recorded sample
TRAINED = 1e-3  # the same, after a few steps of Adam, which turns rounding of tiny gradients into steps
HEADS = 2e-2  # scores of heads that are trained for the measurement
COUNTS = 1e-2  # operations: what counts as one is a convention of the counter


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        run: Gets an empty folder.
        tolerance: Of every value, relative.
        exact: Whether the same machine and libraries must give the same bits.
        slow: Whether it is left out of the quick tests.
    """

    run: Callable[[Path], Values]
    tolerance: float = MAPS
    exact: bool = True
    slow: bool = False


CASES: dict[str, Case] = {}


def add(name: str, run: Callable[..., Values], *arguments: Any, **settings: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(functools.partial(run, *arguments), **settings)


def run_case(name: str, folder: Path) -> Values:
    """Run a case in an empty folder: one thread, fixed seeds, caches inside of the folder."""
    with _alone(folder):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 (third parties draw from the global generator)
        torch.manual_seed(0)
        return CASES[name].run(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    threads, cache = torch.get_num_threads(), os.environ.get("FEATSHARP_CACHE")
    torch.set_num_threads(1)
    os.environ["FEATSHARP_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del os.environ["FEATSHARP_CACHE"]
        if cache is not None:
            os.environ["FEATSHARP_CACHE"] = cache


# Inputs and weights


def drawn(name: str, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the name only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def smooth_images(height: int, width: int, count: int = 1) -> Tensor:
    """Whitened images with content at several scales."""
    coarse = F.interpolate(drawn("coarse", count, 3, 5, 7), (height, width), mode="bicubic")
    return coarse + 0.3 * drawn("fine", count, 3, height, width)


def fill(module: nn.Module) -> None:
    """Draw all weights by name, widely enough that no part of the module is without effect."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = drawn(name, *weight.shape)
            if "pos" in name or "token" in name:
                weight.copy_(0.5 * noise)
            elif weight.ndim > 1:
                weight.copy_(noise / math.sqrt(weight[0].numel()))
            elif name.endswith("weight"):
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.add_(0.2 * noise)


def disturb(module: nn.Module) -> None:
    """Move all weights from where they start, by name."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            scale = 0.5 / math.sqrt(weight[0].numel()) if weight.ndim > 1 else 0.1
            weight.add_(scale * drawn(name, *weight.shape))


def picture(number: int, size: tuple[int, int] = (120, 160)) -> Image.Image:
    """A smooth picture with a few rectangles."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = np.array(image)
    for _ in range(4):
        top, left = rng.integers(0, size[0] - 24), rng.integers(0, size[1] - 24)
        pixels[top : top + rng.integers(8, 24), left : left + rng.integers(8, 24)] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def save_pictures(folder: Path, count: int = 3, size: tuple[int, int] = (120, 160)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number, size).save(folder / f"{number}.png")
    return folder


# Upsamplers


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


def state_of(state: Mapping[str, Any]) -> Values:
    """All tensors of a state dict as one vector, in the order of their names."""
    names = sorted(state)
    flat = [state[name].double().flatten() for name in names]
    return {
        "names": " ".join(f"{name}:{'x'.join(map(str, state[name].shape))}" for name in names),
        "weights": torch.cat(flat) if flat else torch.zeros(0),
    }


for _name in featsharp.list_upsamplers():
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
    add(f"parts/{_name}", sharpen_in_parts, _name, FACTORS.get(_name, ANY)[0], exact=False, slow=_name == "anyup")


def shipped(folder: Path, **settings: Any) -> Values:
    """The weights that come with the package."""
    encoder = load_from_file("vits14-focus/featsharp-2x", **settings)
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


# Backbones


def features(backbone: Any, *sizes: tuple[int, int]) -> Values:
    """Features and summary at the native size and, where the backbone takes others, at an odd grid."""
    p = backbone.patch_size
    sizes = sizes or ((3 * p, 5 * p) if backbone.flexible else backbone.input_size,)
    values: Values = {
        "facts": f"patch size {p}, {backbone.embed_dim} channels, native {backbone.input_size}, "
        f"summary {backbone.summary_dim}, flexible {backbone.flexible}, "
        f"mean {[round(v, 6) for v in backbone.mean]}, std {[round(v, 6) for v in backbone.std]}"
    }
    with torch.no_grad():
        for height, width in sizes:
            maps, summary = backbone(smooth_images(height, width))
            values[f"features {height}x{width}"] = maps
            if summary is not None:
                values[f"summary {height}x{width}"] = summary
    return values


def named(name: str, folder: Path) -> Values:
    return features(create_backbone(name))


def toy(name: str, folder: Path, **options: Any) -> Values:
    return features(create_backbone(name, **options), (64, 64), *([] if "fixed" in name else [(24, 40)]))


def tiled(folder: Path) -> Values:
    """Windows of a backbone of one size, and an encoder on top."""
    values = features(create_backbone("toy-vit-fixed", other_sizes="tile"), (64, 64), (104, 152))
    encoder = create_encoder(create_backbone("toy-vit-fixed", other_sizes="tile"), "tile", 2)
    with torch.no_grad():
        return values | {"high_res": encoder(smooth_images(176, 240)).high_res}


def strided(folder: Path) -> Values:
    """Overlapping patches."""
    encoder = create_encoder("toy-vit", "identity", 1)
    with torch.no_grad():
        return {"features": encoder.encode(smooth_images(48, 64), patch_stride=4)[0]}


for _name in ("toy-vit", "toy-cnn", "toy-vit-fixed"):
    add(f"backbone/{_name}", toy, _name)
add("backbone/toy-vit-fixed, tiled", tiled)
add("backbone/toy-vit, stride 4", strided)
add("backbone/vits14-focus", named, "vits14-focus")

# Real classes with few blocks; folders as the libraries write them.
TIMM = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2}),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64, "depth": 2}),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}),
    "radio": ("naflexvit_base_patch16_radio_v3", {"depth": 1}),
    "sam": ("samvit_base_patch16", {"depth": 1, "img_size": 64, "global_attn_indexes": ()}),
    "convnext": ("test_convnext", {}),
    "resnet": ("test_resnet", {}),
}
TIMM_OPTIONS = {
    "keys": ("vit", {"facet": "key"}),
    "queries of block 0": ("vit", {"facet": "query", "layer": 0}),
    "values": ("dinov2", {"facet": "value"}),
    "keys, rotary": ("dinov3", {"facet": "key"}),
    "two layers": ("vit", {"layer": (0, -1)}),
    "mean summary": ("vit", {"summary": "mean"}),
    "stage 1": ("resnet", {"layer": 1}),
}


def timm_folder(kind: str, folder: Path) -> str:
    import timm
    from timm.models import save_for_hf

    model, arguments = TIMM[kind]
    module = timm.create_model(model, num_classes=0, **arguments)
    fill(module)
    if "img_size" in arguments:
        module.pretrained_cfg["input_size"] = (3, arguments["img_size"], arguments["img_size"])
    save_for_hf(module, folder / "timm", model_args=arguments)
    return f"timm:{folder / 'timm'}"


def timm_backbone(kind: str, options: Mapping[str, Any], folder: Path) -> Values:
    return features(create_backbone(timm_folder(kind, folder), **options))


def timm_random(folder: Path) -> Values:
    """A model by name with seeded random weights, whose initialisation is timm's."""
    return features(create_backbone("timm:test_vit?pretrained=false&img_size=64"))


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONV = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_channels": 3}
TRANSFORMERS = {  # model, configuration, options, image processor
    "vit": ("ViTModel", "ViTConfig", TOWER, "ViTImageProcessor"),
    "deit": ("DeiTModel", "DeiTConfig", TOWER, "ViTImageProcessor"),
    "dinov2": ("Dinov2Model", "Dinov2Config", TOWER, "BitImageProcessor"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {"num_register_tokens": 4, **TOWER},
        "BitImageProcessor",
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4, **TOWER}, "ViTImageProcessor"),
    "mae": (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, **TOWER},
        "ViTImageProcessor",
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"vision_config": TOWER, "text_config": TEXT, "projection_dim": 24},
        "CLIPImageProcessor",
    ),
    "siglip": ("SiglipModel", "SiglipConfig", {"vision_config": TOWER, "text_config": TEXT}, "SiglipImageProcessor"),
    "naflex": (
        "Siglip2Model",
        "Siglip2Config",
        {
            "vision_config": {key: value for key, value in TOWER.items() if key != "image_size"} | {"num_patches": 16},
            "text_config": TEXT,
        },
        "Siglip2ImageProcessor",
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
            "text_config": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16, **TEXT},
            "projection_dim": 32,
        },
        "SiglipImageProcessor",
    ),
    "sam": (
        "SamVisionModel",
        "SamVisionConfig",
        {**TOWER, "mlp_dim": 64, "output_channels": 8, "window_size": 3, "global_attn_indexes": [2]},
        "SamImageProcessor",
    ),
    "convnext": ("ConvNextModel", "ConvNextConfig", CONV, "ConvNextImageProcessor"),
    "convnextv2": ("ConvNextV2Model", "ConvNextV2Config", CONV, "ConvNextImageProcessor"),
    "resnet": ("ResNetModel", "ResNetConfig", {"embedding_size": 8, **CONV}, "ConvNextImageProcessor"),
    "dinov3_convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", CONV, "ViTImageProcessor"),
}
TRANSFORMERS_OPTIONS = {
    "keys": ("dinov2", {"facet": "key"}),
    "queries of block 0": ("vit", {"facet": "query", "layer": 0}),
    "values": ("siglip", {"facet": "value"}),
    "two layers": ("dinov2_with_registers", {"layer": (0, -1)}),
    "projected": ("clip", {"project": True}),
    "mean summary": ("vit", {"summary": "mean"}),
}
PROCESSOR_SIZES = {
    "BitImageProcessor": {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}},
    "CLIPImageProcessor": {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 64}},
    "SiglipImageProcessor": {"size": {"height": 64, "width": 64}},
    "ViTImageProcessor": {"size": {"height": 64, "width": 64}},
}


def transformers_backbone(family: str, options: Mapping[str, Any], folder: Path) -> Values:
    import transformers

    model, configuration, settings, processor = TRANSFORMERS[family]
    module = getattr(transformers, model)(getattr(transformers, configuration)(**settings))
    fill(module)
    module.save_pretrained(folder / "model")
    getattr(transformers, processor)(
        image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25], **PROCESSOR_SIZES.get(processor, {})
    ).save_pretrained(folder / "model")
    return features(create_backbone(f"hf:{folder / 'model'}", **options))


WORDS = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 56, "layers": 3, "width": 64, "head_width": 16, "patch_size": 14}
OPEN_CLIP = {
    "transformer": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VISION},
    "averaged": {
        "embed_dim": 48,
        "vision_cfg": {**VISION, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    },
    "coca": {
        "embed_dim": 48,
        "vision_cfg": {
            **VISION, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 6, "output_tokens": True
        },
    },
    "resnet": {"embed_dim": 24, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}},
    "convnext": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
    },
    "siglip": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    },
}  # fmt: skip
OPEN_CLIP_OPTIONS = {
    "keys": ("transformer", {"facet": "key"}),
    "two layers": ("transformer", {"layer": (0, -1)}),
    "projected": ("transformer", {"project": True}),
}


def open_clip_backbone(tower: str, options: Mapping[str, Any], folder: Path) -> Values:
    import open_clip
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    config = json.loads(json.dumps(OPEN_CLIP[tower])) | {"text_cfg": WORDS}
    model = open_clip.CLIP(**json.loads(json.dumps(config))).eval()
    fill(model)
    whitening = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "size": 64}
    open_clip.set_model_preprocess_cfg(model, whitening)
    (folder / "model").mkdir()
    save_file(model.state_dict(), folder / "model" / "open_clip_model.safetensors")
    save_config_for_hf(model, folder / "model" / "open_clip_config.json", config)
    return features(create_backbone(f"open_clip:{folder / 'model'}", **options))


HUB = {
    "dinov2": "dinov2_tiny?pretrained=false",
    "dinov2, keys": "dinov2_tiny?pretrained=false&facet=key",
    "dinov2, two layers": "dinov2_tiny?pretrained=false&layer=0,-1",
    "dino": "dino_tiny8",
    "radio": "radio_model?version=radio_v2.5-l",
    "any module": "plain_cnn",
}


def hub_backbone(entry: str, folder: Path) -> Values:
    return features(create_backbone(f"hub:{Path(__file__).parent / 'hub'}/{entry}"))


class Patches(nn.Module):
    """Patches to tokens [B, P + h * w, C] with P prefix tokens, and a pooled token."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.embed, self.mix, self.prefix = nn.Conv2d(3, 12, 8, 8), nn.Linear(12, 12), prefix
        fill(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.mix(self.embed(images).flatten(2).transpose(1, 2).tanh())
        mean = tokens.mean(1, keepdim=True)
        tokens = torch.cat([mean.expand(-1, self.prefix, -1), tokens + 0.3 * mean], 1)
        return {"last_hidden_state": tokens, "pooler_output": mean[:, 0]}


def wrapped_tokens(folder: Path) -> Values:
    return features(from_callable(Patches(3), name="mine", input_size=(56, 56)))


def wrapped_maps(folder: Path) -> Values:
    trunk = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.GELU(), nn.Conv2d(8, 10, 3, padding=1))
    fill(trunk)
    backbone = from_callable(trunk, name="mine", input_size=(64, 64), mean=(0.5,) * 3, std=(0.25,) * 3)
    with torch.no_grad():
        return features(backbone) | {"high_res": create_encoder(backbone, "tile", 2)(smooth_images(100, 72)).high_res}


for _kind in TIMM:
    add(f"backbone/timm {_kind}", timm_backbone, _kind, {})
for _label, (_kind, _options) in TIMM_OPTIONS.items():
    add(f"backbone/timm {_kind}, {_label}", timm_backbone, _kind, _options)
add("backbone/timm random", timm_random)
for _kind in TRANSFORMERS:
    add(f"backbone/transformers {_kind}", transformers_backbone, _kind, {})
for _label, (_kind, _options) in TRANSFORMERS_OPTIONS.items():
    add(f"backbone/transformers {_kind}, {_label}", transformers_backbone, _kind, _options)
for _kind in OPEN_CLIP:
    add(f"backbone/open_clip {_kind}", open_clip_backbone, _kind, {})
for _label, (_kind, _options) in OPEN_CLIP_OPTIONS.items():
    add(f"backbone/open_clip {_kind}, {_label}", open_clip_backbone, _kind, _options)
for _label, _entry in HUB.items():
    add(f"backbone/hub {_label}", hub_backbone, _entry)
add("backbone/from_callable, tokens", wrapped_tokens)
add("backbone/from_callable, maps", wrapped_maps)


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


# Training

LOSSES: list[tuple[str, float, int]] = []


class Losses:
    """A logger, as users can write one: keeps the scalars of a run."""

    def __init__(self, folder: Path) -> None:
        LOSSES.clear()

    def config(self, config: Mapping[str, Any]) -> None:
        pass

    def scalar(self, name: str, value: float, step: int) -> None:
        if name.startswith(("loss/", "optim/", "val/")):  # the others are of the machine
            LOSSES.append((name, value, step))

    def image(self, name: str, image: Tensor, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def train(upsampler: str, overrides: tuple[str, ...], folder: Path) -> Values:
    """Three steps by the command: all scalars, and the weights that the checkpoint holds."""
    arguments = [
        "+model=toy-vit",
        f"+upsampler={upsampler}",
        f"train_data_dir={save_pictures(folder / 'photos', 4)}",
        f"output_base={folder / 'outputs'}",
        "batch_size=2",
        "num_workers=0",
        "num_training_steps=3",
        "log_frequency=1",
        "val_frequency=3",
        "normalizer.num_samples=8",
        "normalizer.batch_size=4",
        "viz.num_images=1",
        f"viz.type={Losses.__module__}:{Losses.__name__}",
        "model.dtype=float32",
        "upsampler.dtype=float32",
        "device=cpu",
        "progress=false",
    ]
    assert train_command([*arguments, *overrides]) == 0
    values: Values = {f"{name} at {step}": value for name, value, step in LOSSES}
    (last,) = (folder / "outputs").rglob("last.pth")
    return values | state_of(torch.load(last, weights_only=True)["model"])


RUNS = {
    "featsharp": ("featsharp-2x", ()),
    "featsharp, accumulated": ("featsharp-2x", ("accumulation_steps=2", "spectral=false", "bias_buffer=false")),
    "featsharp, cached features": ("featsharp-2x", ("feature_cache.samples=4",)),
    "featsharp, all of multi-view": (
        "featsharp-2x",
        ("objective.distance=l1", "objective.tv_weight=0.1", "objective.downsampler=area", "views.flip=0.5"),
    ),
    "featsharp-published": ("featsharp-published-2x", ()),
    "featsharp-progressive": ("featsharp-progressive-4x", ()),
    "featsharp-linear": ("featsharp-linear-2x", ("linear_fit.samples=8", "num_training_steps=0")),
    "featup-original": ("featup-original-2x", ()),
    "featup-published": ("featup-published-2x", ()),
    "resfu, smooth L1": ("resfu-2x", ("objective.distance=smooth_l1",)),
    "tile, layernorm": ("tile-2x", ("normalizer=layernorm",)),
    "lift": ("lift-2x", ()),
    "lift, published": ("lift-2x", ("objective.distance=cosine", "objective.subsample=slice", "normalizer=none")),
    "resize-conv, l1": ("resize-conv-2x", ("objective=reconstruction", "objective.distance=l1")),
    "jafar": ("jafar-2x", ("objective=jafar",)),
    "anyup": ("anyup-2x", ("objective=jafar",)),
}
for _label, (_name, _overrides) in RUNS.items():
    add(f"train/{_label}", train, _name, _overrides, tolerance=TRAINED)


# Evaluation


def evaluate(task: str, folder: Path, *arguments: object, upsamplers: tuple[str, ...] = ()) -> Values:
    """The result that a task writes for toy-vit, numbers of single images included."""
    command = ["eval", task, *map(str, arguments), "--device", "cpu", "--dtype", "float32"]
    if upsamplers:
        command += ["--upsampler", *upsamplers]
    if task != "delta-m":
        command += ["--backbone", "toy-vit"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert featsharp_command([*command, "--json", str(folder / "result.json")]) == 0
    content = json.loads((folder / "result.json").read_text())
    numbers = dict(_leaves(content["encoders"] if "encoders" in content else content["result"]))
    return {name: value for name, value in numbers.items() if not isinstance(value, str | bool)}


def _leaves(content: Any, name: str = "") -> Iterator[tuple[str, Tensor | float | str]]:
    """Numbers, texts and lists of numbers inside of JSON, by path."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "items":
                numbers = [v for _, v in sorted(_leaves(value)) if not isinstance(v, str)]
                yield f"{name}items", torch.cat([torch.as_tensor(v, dtype=torch.float64).flatten() for v in numbers])
            else:
                yield from _leaves(value, f"{name}{key}/")
    elif isinstance(content, list) and content and not isinstance(content[0], dict | str):
        yield name.rstrip("/"), torch.tensor(content, dtype=torch.float64)
    elif isinstance(content, list):
        yield from _leaves(dict(enumerate(content)), name)
    elif content is not None:
        yield name.rstrip("/"), content


BOTH = ("bilinear-2x", "tile-2x")


def on_images(task: str, arguments: tuple[object, ...], folder: Path) -> Values:
    images = save_pictures(folder / "photos", 3, (144, 176))
    return evaluate(task, folder, "--data", images, *arguments, upsamplers=BOTH)


def drift(folder: Path) -> Values:
    """Applied again and again: an interpolation and a guided upsampler with a checkpoint."""
    train("lift-2x", (), folder)
    (last,) = (folder / "outputs").rglob("last.pth")
    options = ("--data", folder / "photos", "--iterations", 2, "--checkpoint", f"trained={last}")
    return evaluate("drift", folder, *options, upsamplers=("bilinear-2x",))


def trained_fidelity(folder: Path) -> Values:
    """Fidelity of a checkpoint with the downsampler that it was trained with."""
    train("featsharp-2x", (), folder)
    (last,) = (folder / "outputs").rglob("last.pth")
    return evaluate("fidelity", folder, "--data", folder / "photos", "--checkpoint", f"trained={last}")


def segmentation(arguments: tuple[object, ...], folder: Path) -> Values:
    """Rectangles of three classes in noisy colours."""
    rng = np.random.default_rng(0)
    colours = np.array([[200, 60, 70], [70, 180, 80], [60, 80, 190]])
    for number in range(8):
        truth = np.kron(rng.integers(0, 3, (2, 3)), np.ones((64, 64), int))
        pixels = np.clip(colours[truth] + rng.normal(0, 30, (*truth.shape, 3)), 0, 255)
        for kind, content in (("images", pixels), ("labels", truth)):
            path = folder / "data" / kind / ("train" if number < 5 else "val") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content.astype(np.uint8)).save(path)
    options = ("--steps", 20, "--low-res-size", "64x96", *arguments)
    return evaluate("segmentation", folder, "--data", folder / "data", *options, upsamplers=BOTH)


POINTS = np.array([[12, 12], [28, 13], [12, 44], [36, 35], [37, 20]])


def correspondence(folder: Path) -> Values:
    """SPair's layout: pictures whose middle moves by a few pixels before another ground."""
    root = folder / "data"
    for path in (root / "JPEGImages" / "cat", root / "PairAnnotation" / "test"):
        path.mkdir(parents=True)
    for number in range(3):
        source, target = np.array(picture(number, (64, 64))), np.array(picture(number + 10, (64, 64)))
        move = np.array([6 + number, 3])
        target[8 + move[1] : 48 + move[1], 8 + move[0] : 48 + move[0]] = source[8:48, 8:48]
        for name, pixels in ((f"a{number}", source), (f"b{number}", target)):
            Image.fromarray(pixels).save(root / "JPEGImages" / "cat" / f"{name}.jpg", quality=100, subsampling=0)
        content = {
            "src_imname": f"a{number}.jpg",
            "trg_imname": f"b{number}.jpg",
            "src_kps": POINTS.tolist(),
            "trg_kps": (POINTS + move).tolist(),
            "src_bndbox": [8, 8, 48, 48],
            "trg_bndbox": [int(v) for v in (*(8 + move), *(48 + move))],
            "category": "cat",
        }
        path = root / "PairAnnotation" / "test" / f"{number:06}-a{number}-b{number}:cat.json"
        path.write_text(json.dumps(content))
    return evaluate("correspondence", folder, "--data", root, "--low-res-size", "64x64", upsamplers=BOTH)


def boundaries(folder: Path) -> Values:
    """BSDS500's layout: two annotators of pictures of coloured rectangles."""
    from scipy.io import savemat

    images, truths = folder / "data" / "images" / "test", folder / "data" / "groundTruth" / "test"
    images.mkdir(parents=True)
    truths.mkdir(parents=True)
    for number in range(2):
        rng = np.random.default_rng(number)
        regions = np.kron(rng.integers(0, 4, (3, 4)), np.ones((32, 36), int))
        pixels = np.clip(rng.integers(0, 256, (4, 3))[regions] + rng.normal(0, 12, (*regions.shape, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(images / f"{number}.png")
        edges = np.zeros(regions.shape, bool)
        edges[:-1] |= regions[:-1] != regions[1:]
        edges[:, :-1] |= regions[:, :-1] != regions[:, 1:]
        cells = np.empty((1, 2), dtype=object)
        for annotator, rows in enumerate((96, 64)):
            seen = edges & (np.arange(96) < rows)[:, None]
            cells[0, annotator] = {"Segmentation": regions.astype(np.uint16), "Boundaries": seen}
        savemat(truths / f"{number}.mat", {"groundTruth": cells})
    options = ("--split", "test", "--thresholds", 9)
    return evaluate("boundaries", folder, "--data", folder / "data", *options, upsamplers=BOTH)


def small_objects(folder: Path) -> Values:
    """COCO's instances: noisy boxes of three classes in three sizes."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(5):
        pixels = rng.normal(128, 20, (240, 320, 3))
        for place, (x, y, w, h) in enumerate(((22, 31, 24, 24), (101, 25, 60, 60), (150, 110, 130, 100))):
            category = (number + place) % 3
            pixels[y : y + h, x : x + w] += rng.normal(0, 30, 3) + 40 * (np.arange(3) == category)
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": category, "bbox": [x, y, w, h],
                 "segmentation": [corners], "area": w * h, "iscrowd": 0}
            )  # fmt: skip
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 240, "width": 320})
    content = {"images": images, "annotations": annotations, "categories": []}
    (folder / "instances.json").write_text(json.dumps(content))
    options = ("--data", folder / "images", "--labels", folder / "instances.json")
    return evaluate("small-objects", folder, *options, upsamplers=BOTH)


def delta_m(folder: Path) -> Values:
    rows = (
        "model,knn,ade20k,voc,rmse",
        "group,classification,dense,dense,depth",
        "better,higher,,,lower",
        "plain,80,40,50,0.5",
        "sharp,82,44,49,0.4",
        "blurred,80,38,50,0.6",
    )
    (folder / "scores.csv").write_text("\n".join(rows) + "\n")
    return evaluate("delta-m", folder, "--data", folder / "scores.csv", "--baseline", "plain")


def flops(folder: Path) -> Values:
    """Operations of the backbone and of each upsampler."""
    upsamplers = ("featsharp", "featup", "jafar", "resfu", "sapa", "carafe", "lift", "tile", "bilinear")
    values = evaluate("flops", folder, "--factors", 2, upsamplers=upsamplers)
    return {name: value for name, value in values.items() if name.endswith(("/backbone", "/upsampler", "/total"))}


for _task, _arguments in {
    "fidelity": ("--views", 3),
    "zoom": ("--crops", 2),
    "cka": ("--sizes", 32, 64, 96),
    "reference": (),
}.items():
    add(f"eval/{_task}", on_images, _task, _arguments)
add("eval/drift, train", drift, tolerance=TRAINED)
add("eval/fidelity, train", trained_fidelity, tolerance=TRAINED)
add("eval/segmentation", segmentation, (), tolerance=HEADS)
add("eval/segmentation, low-res head", segmentation, ("--head", "low-res"), tolerance=HEADS)
add("eval/correspondence", correspondence)
add("eval/boundaries", boundaries)
add("eval/small-objects", small_objects)
add("eval/delta-m", delta_m)
add("eval/flops", flops, tolerance=COUNTS, exact=False)


# Other commands


def implicit(arguments: tuple[object, ...], folder: Path) -> Values:
    """A network of a few steps, fitted to one picture."""
    picture(0).save(folder / "photo.png")
    command = ["fit", folder / "photo.png", "--backbone", "toy-vit", "--views", 6, "--steps", 4, "--query", "20x30"]
    command += ["-o", folder / "fit", "--device", "cpu", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        featsharp_command([*map(str, command)])
    fitted = load_fit(folder / "fit" / "photo.pth")
    with torch.no_grad():
        return {"features": fitted.features((25, 31))} | _tensors_of(folder / "fit" / "photo.safetensors", printed)


def upsample(folder: Path) -> Values:
    """Features of a picture by the command, with the weights that come with the package."""
    picture(0, (150, 210)).save(folder / "photo.png")
    command = ["upsample", str(folder / "photo.png"), "-o", str(folder / "out"), "--size", "112x168", "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        featsharp_command(command)
    (file,) = (folder / "out").rglob("*.safetensors")
    return _tensors_of(file, printed)


def _tensors_of(file: Path, printed: io.StringIO) -> Values:
    from safetensors.torch import load_file

    scores = re.findall(r"\d+\.\d+", printed.getvalue().replace(str(file.parent), ""))
    values: Values = {f"printed {number}": float(score) for number, score in enumerate(scores)}
    return values | load_file(file)


def exported(folder: Path) -> Values:
    """Weights in half precision, after one step of training."""
    train("featsharp-2x", ("num_training_steps=1",), folder)
    (last,) = (folder / "outputs").rglob("last.pth")
    with contextlib.redirect_stdout(io.StringIO()):
        featsharp_command(["export", str(last), "-o", str(folder / "small.safetensors")])
    with torch.no_grad():
        return {"high_res": load_from_file(folder / "small.safetensors")(smooth_images(112, 80)).high_res}


add("implicit/resolved", implicit, (), tolerance=TRAINED)
add(
    "implicit/published",
    implicit,
    ("--downsampler", "attention", "--frequencies", "published", "--start", "nothing"),
    tolerance=TRAINED,
)
add("command/upsample vits14-focus", upsample)
add("command/export, train", exported, tolerance=TRAINED)
