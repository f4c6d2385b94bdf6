"""Vision transformers of the timm library, by name: ``timm:MODEL[.TAG][?pretrained=false&img_size=448]``.

Shapes:
    tokens [B, P + h * w, C]: P prefix tokens (class token first, then registers), then patches row by row.

Convention:
    Other sizes than the native one resample the position embedding as timm does: bicubic, antialiased, half-pixel
    centres. At the native size timm adds the stored embedding itself.
"""

import difflib
import re
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneOutput, embeds_patches
from featsharp.backbones.registration import import_optional, register_prefix, split_options
from featsharp.errors import ConfigError, MissingDependencyError

INSTALL_TIMM = 'pip install "featsharp[timm]"'


class TimmViT(Backbone):
    """A timm vision transformer: final-norm patch tokens as features.

    Patch size, prefix tokens and width are read from the model; whitening comes from its ``pretrained_cfg``, and the
    native size from its token grid: a 384-pixel model with 14-pixel patches is native at 27 patches, 378 pixels.
    The summary is the final-norm class token; without one the model's own pool (the attention pool of SigLIP); without
    that there is none.

    Args:
        name: What ``create_backbone`` builds it from, or a label.
        model: A timm model with ``patch_embed``, ``num_prefix_tokens`` and ``forward_features`` to tokens.
        input_size, mean, std: Override what is read.

    Raises:
        ConfigError: For a model without such tokens or with patches that are not square.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        input_size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        patch_embed = getattr(model, "patch_embed", None)
        num_prefix_tokens = getattr(model, "num_prefix_tokens", None)
        if patch_embed is None or num_prefix_tokens is None:
            raise ConfigError(
                f"timm model {name!r} ({type(model).__name__}) does not give patch tokens; wrap it with "
                f"featsharp.backbones.from_callable(model.forward_features)"
            )
        patch_height, patch_width = patch_embed.patch_size
        if patch_height != patch_width:
            raise ConfigError(f"timm model {name!r} has {patch_height}x{patch_width} patches; only square ones work")
        rows, columns = patch_embed.grid_size
        config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        embed_dim: int = getattr(model, "embed_dim")  # noqa: B009  (nn.Module types attributes as Tensor | Module)
        has_class_token = getattr(model, "cls_token", None) is not None
        has_summary = has_class_token or getattr(model, "global_pool", "") != ""
        super().__init__(
            name,
            patch_size=patch_height,
            embed_dim=embed_dim,
            input_size=input_size or (rows * patch_height, columns * patch_height),
            mean=mean or config.get("mean", IMAGENET_MEAN),
            std=std or config.get("std", IMAGENET_STD),
            summary_dim=embed_dim if has_summary else None,
            flexible=bool(getattr(model, "dynamic_img_size", False)),
        )
        self.model: Any = model
        self.num_prefix_tokens: int = num_prefix_tokens
        self.has_class_token = has_class_token
        self.embeds_patches = embeds_patches(getattr(patch_embed, "proj", None), patch_height)
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        tokens = self.model.forward_features(images)
        height, width = images.shape[-2:]
        features = tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, self.grid_size((height, width)))
        summary = None
        if self.has_class_token:
            summary = tokens[:, 0]
        elif self.summary_dim is not None:
            summary = self.model.forward_head(tokens, pre_logits=True)
        return BackboneOutput(features, summary)


@register_prefix("timm", "timm:MODEL[.TAG] any vision transformer of timm (options: pretrained, img_size)")
def create_timm_backbone(name: str) -> TimmViT:
    """Build ``timm:MODEL[.TAG]``: ``?pretrained=false`` takes seeded random weights, ``?img_size=448x224`` a size.

    Raises:
        ConfigError: For an unknown model, tag or option, or a model that gives no patch tokens.
        MissingDependencyError: When timm or the weights are absent and the weights cannot be fetched.
    """
    timm = import_optional("timm", f"backbone {name!r}", INSTALL_TIMM)
    spec, options = split_options(name.removeprefix("timm:"), ("pretrained", "img_size"))
    architecture = spec.split(".")[0]
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(repr(n) for n in nearest)}?" if nearest else "no name is near."
        raise ConfigError(f"unknown timm model {architecture!r}; {hint} timm.list_models() lists all")
    pretrained = _parse_flag("pretrained", options.get("pretrained", "true"))
    arguments: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    size = None
    if "img_size" in options:
        size = arguments["img_size"] = _parse_size("img_size", options["img_size"])
    try:
        model = _create_model(timm, spec, arguments)
    except OSError as error:
        raise MissingDependencyError(
            f"the weights of timm model {spec!r} are not on this machine and cannot be fetched "
            f"({_first_line(error)}); with a network, run once: python -c \"import timm; timm.create_model('{spec}', "
            f'pretrained=True)"; or take random weights: timm:{spec}?pretrained=false'
        ) from error
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"timm cannot build {name!r}: {_first_line(error)}; timm.list_pretrained('{architecture}*') lists the tags "
            f"with weights, ?pretrained=false takes random weights"
        ) from error
    backbone = TimmViT(name, model)
    if size is not None and backbone.input_size != size:
        height, width = backbone.input_size
        raise ConfigError(
            f"img_size of {name!r} has to be whole patches of {backbone.patch_size}; "
            f"the nearest below is {height}x{width}"
        )
    return backbone


def _create_model(timm: Any, spec: str, arguments: dict[str, Any]) -> nn.Module:
    """The timm model, able to change its size where its class can; random weights are the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return timm.create_model(spec, dynamic_img_size=True, **arguments)
        except TypeError as error:
            # Models whose position terms are tied to one grid, such as BEiT's, do not know the argument.
            if "dynamic_img_size" not in str(error):
                raise
            return timm.create_model(spec, **arguments)


def _parse_flag(option: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"option {option} is true or false; got {text!r}")
    return text.lower() == "true"


def _parse_size(option: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise ConfigError(f"option {option} is a side in pixels or HEIGHTxWIDTH, such as 448 or 448x224; got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
