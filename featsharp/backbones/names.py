"""Short names of backbones: what they stand for, in one table.

What cannot be read from a library's own configuration is said here, with its source, as options of the target: sizes of
the published configurations, versions, where files lie. Patch sizes, widths and whitening are the library's to tell;
the descriptions repeat some for the reader and are tested against it.
"""

from dataclasses import dataclass

from featsharp.backbones.options import with_options
from featsharp.backbones.registration import split_options


@dataclass(frozen=True)
class Alias:
    """A short name.

    Attributes:
        target: What ``create_backbone`` builds, with options.
        description: One line for ``featsharp ls``.
        source: Why these options or these weights; empty where the name says it all.
        repository: Where the weights lie on the Hugging Face hub, where the target does not say.
    """

    target: str
    description: str
    source: str = ""
    repository: str = ""


_AT_448 = "448 pixels as in the published FeatSharp configurations; the weights are of 518"
_AS_FEATUP = "as in FeatUp"
_CROPPED = "timm's vit_ namesakes stretch the position table at other sizes; these crop it, as RADIO was trained"

ALIASES: dict[str, Alias] = {
    "c-radio-v3-b": Alias(
        "timm:naflexvit_base_patch16_radio_v3.c_radio",
        "C-RADIOv3-B/16: 768 channels, stride 16, 512 pixels; summary: its first class token",
        _CROPPED,
    ),
    "c-radio-v3-h": Alias(
        "timm:naflexvit_huge_patch16_radio_v3.c_radio",
        "C-RADIOv3-H/16: 1280 channels, stride 16, 512 pixels; summary: its first class token",
        _CROPPED,
    ),
    "c-radio-v3-l": Alias(
        "timm:naflexvit_large_patch16_radio_v3.c_radio",
        "C-RADIOv3-L/16: 1024 channels, stride 16, 512 pixels; summary: its first class token",
        _CROPPED,
    ),
    "c-radio-v4-h": Alias(
        "timm:naflexvit_huge_patch16_radio_v4.c_radio",
        "C-RADIOv4-H/16: 1280 channels, stride 16, 512 pixels; summary: its first class token",
        _CROPPED,
    ),
    "c-radio-v4-so400m": Alias(
        "timm:naflexvit_so400m_patch16_radio_v4.c_radio",
        "C-RADIOv4-SO400M/16: 1152 channels, stride 16, 512 pixels; summary: its first class token",
        _CROPPED,
    ),
    "clip-b16": Alias(
        "open_clip:ViT-B-16-quickgelu/openai",
        "OpenAI CLIP ViT-B/16: 768 channels, 224 pixels; project=true for 512 aligned with text",
        source="these weights were trained with QuickGELU",
        repository="timm/vit_base_patch16_clip_224.openai",
    ),
    "convnext": Alias(
        "timm:convnext_base.fb_in22k",
        "ConvNeXt-B, supervised: 1024 channels, stride 32, 224 pixels",
        source="ImageNet-22k weights before the fine-tuning to 1000 classes",
    ),
    "dfn-clip": Alias(
        "open_clip:ViT-H-14-378-quickgelu/dfn5b",
        "DFN CLIP ViT-H/14: 1280 channels, 378 pixels",
        repository="apple/DFN5B-CLIP-ViT-H-14-378",
    ),
    "dino-b16": Alias("timm:vit_base_patch16_224.dino", "DINO ViT-B/16: 768 channels, 224 pixels"),
    "dino-b8": Alias("timm:vit_base_patch8_224.dino", "DINO ViT-B/8: 768 channels, 224 pixels"),
    "dino-s16": Alias("timm:vit_small_patch16_224.dino", "DINO ViT-S/16: 384 channels, 224 pixels"),
    "dino-s8": Alias("timm:vit_small_patch8_224.dino", "DINO ViT-S/8: 384 channels, 224 pixels"),
    "dinov2-b": Alias(
        "timm:vit_base_patch14_dinov2.lvd142m?img_size=448", "DINOv2-B/14: 768 channels, 448 pixels", _AT_448
    ),
    "dinov2-b-reg": Alias(
        "timm:vit_base_patch14_reg4_dinov2.lvd142m?img_size=448",
        "DINOv2-B/14 with registers: 768 channels, 448 pixels",
        _AT_448,
    ),
    "dinov2-g": Alias(
        "timm:vit_giant_patch14_reg4_dinov2.lvd142m?img_size=448",
        "DINOv2-g/14 with registers: 1536 channels, 448 pixels",
        _AT_448,
    ),
    "dinov2-l": Alias(
        "timm:vit_large_patch14_reg4_dinov2.lvd142m?img_size=448",
        "DINOv2-L/14 with registers: 1024 channels, 448 pixels",
        _AT_448,
    ),
    "dinov2-s": Alias(
        "timm:vit_small_patch14_dinov2.lvd142m?img_size=448",
        "DINOv2-S/14: 384 channels, 448 pixels",
        f"{_AT_448}; FeatUp runs it at img_size=224",
    ),
    "dinov2-s-reg": Alias(
        "timm:vit_small_patch14_reg4_dinov2.lvd142m?img_size=448",
        "DINOv2-S/14 with registers: 384 channels, 448 pixels",
        _AT_448,
    ),
    "dinov3-b": Alias("timm:vit_base_patch16_dinov3.lvd1689m", "DINOv3-B/16: 768 channels, 256 pixels"),
    "dinov3-l": Alias("timm:vit_large_patch16_dinov3.lvd1689m", "DINOv3-L/16: 1024 channels, 256 pixels"),
    "dinov3-s": Alias("timm:vit_small_patch16_dinov3.lvd1689m", "DINOv3-S/16: 384 channels, 256 pixels"),
    "mae": Alias(
        "timm:vit_large_patch16_224.mae",
        "MAE ViT-L/16, not fine-tuned: 1024 channels, 224 pixels",
        source=f"ViT-L {_AS_FEATUP}",
    ),
    "paligemma": Alias(
        "hf:google/paligemma-3b-pt-448",
        "vision tower of PaliGemma, a SigLIP SO400M/14: 1152 channels, 448 pixels, no summary",
    ),
    "radio-l": Alias(
        "hub:NVlabs/RADIO/radio_model?version=radio_v2.5-l&img_size=512",
        "RADIOv2.5-L/16: 1024 channels, 512 pixels; runs code of its repository, add trust=true",
        source="512 pixels as in the published FeatSharp configurations; it prefers 768",
    ),
    "resnet50": Alias(
        "timm:resnet50.tv_in1k",
        "ResNet-50, supervised: 2048 channels, stride 32, 224 pixels",
        source="the first weights of torchvision, those that most publications compare with",
    ),
    "sam-h": Alias(
        "timm:samvit_huge_patch16.sa1b", "SAM ViT-H/16 before its neck: 1280 channels, 1024 pixels, no summary"
    ),
    "siglip": Alias(
        "timm:vit_so400m_patch14_siglip_384.webli",
        "SigLIP SO400M/14: 1152 channels, 378 pixels",
        source="trained at 384 pixels, of which whole patches cover 378",
    ),
    "siglip2": Alias("hf:google/siglip2-so400m-patch16-512", "SigLIP2 SO400M/16: 1152 channels, 512 pixels"),
    "siglip2-g": Alias("hf:google/siglip2-giant-opt-patch16-384", "SigLIP2 giant/16: 1536 channels, 384 pixels"),
    "siglip2-naflex": Alias(
        "hf:google/siglip2-so400m-patch16-naflex", "SigLIP2 SO400M/16 NaFlex: 1152 channels, any size and shape"
    ),
    "vit": Alias(
        "timm:vit_small_patch16_224.augreg_in21k_ft_in1k",
        "ViT-S/16, supervised: 384 channels, 224 pixels",
        source="whitened with 0.5 as it was trained; FeatUp and FeatSharp give it ImageNet's whitening",
    ),
}

# As the published configurations call them.
ALIASES |= {
    f"{name}_{pixels}px": ALIASES[name] for name, pixels in (("dinov2-g", 448), ("dinov2-l", 448), ("radio-l", 512))
}


def resolve_alias(name: str) -> str:
    """The target of ``ALIAS?key=value``; options of the name go before those of the table."""
    alias, _, query = name.partition("?")
    target, _, fixed = ALIASES[alias].target.partition("?")
    chosen = split_query(query)
    return with_options(target, split_query(fixed) | chosen)


def split_query(query: str) -> dict[str, str]:
    """``key=value&key=value`` as a mapping."""
    keys = [part.partition("=")[0] for part in query.split("&") if part]
    return split_options(f"x?{query}", keys)[1] if query else {}
