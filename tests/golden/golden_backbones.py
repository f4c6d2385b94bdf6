"""Recorded runs of backbones: tiny models with drawn weights, saved as the libraries do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from golden_base import Values, add, fill, smooth_images
from torch import Tensor, nn

from featsharp import create_backbone, create_encoder, from_callable


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
