"""Models of the timm library, by name: ``timm:MODEL[.TAG]``, ``timm:DIR`` or ``timm:MODEL?weights=FILE``.

Three kinds are known: vision transformers with a token sequence (:class:`TimmViT`), the trunk of Segment Anything
(:class:`TimmSAM`), and everything else that ends in a map, such as convolutional networks (:class:`TimmStages`).

Shapes:
    tokens [B, P + h * w, C]: P prefix tokens (class token first, then registers), then patches row by row.

Convention:
    Other sizes than the native one resample the position embedding as timm does: bicubic, antialiased, half-pixel
    centres. At the native size timm adds the stored embedding itself. Models of its class ``NaFlexVit`` keep a table of
    their own grid and resample that at every call, as each is configured: those of RADIO bilinearly to a square of the
    longer side, of which they crop the top left (cropped position embedding, arXiv 2412.07679).

Whitening is what ``pretrained_cfg`` of the weights says. Published numbers may rest on another: timm has 0.5/0.5 for
the supervised ``vit_small_patch16_224``, FeatUp (arXiv 2403.10516) feeds it ImageNet's. Options ``mean`` and ``std``
match these: ``?mean=0.485,0.456,0.406&std=0.229,0.224,0.225``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones._timm_loading import load_timm_model
from featsharp.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneOutput, embeds_patches
from featsharp.backbones.loading import first_line
from featsharp.backbones.options import Facet, Options
from featsharp.backbones.tokens import FACETS, TokenBackbone, chosen_stage, chosen_summary
from featsharp.errors import ConfigError


def build(name: str, spec: str, choices: Options) -> Backbone:
    """Build ``timm:MODEL[.TAG]``; the directory that ``timm.models.save_for_hf`` writes can take the place of MODEL.

    Options, beside those of every backbone:
        ``layer``, ``facet``, ``summary``: see :class:`featsharp.backbones.options.Options` and the classes here.
        ``pretrained=false``: seeded random weights.
        ``img_size=448x224``: the native size, whole patches.
        ``weights``: a file that timm can read (``.safetensors``, ``.pth``, ``.bin``; timm's own keys or those of the
        authors, which timm converts) or a directory with one. Every weight has to be in it, the classifier aside.
        ``mean``, ``std``: three numbers with commas in place of those of the weights.

    Raises:
        ConfigError: For an unknown model, tag or option, or a model that has not what an option asks for.
        MissingDependencyError: When timm or the weights are absent and the weights cannot be fetched.
        CheckpointError: For a weight file that cannot be read.
        BackboneMismatchError: For one that does not fill the model.
    """
    model = load_timm_model(spec, choices)
    if not hasattr(model, "forward_features"):
        raise ConfigError(f"timm model {name!r} ({type(model).__name__}) gives no features")
    if _is_sam(model):
        kind: type[TimmViT | TimmSAM | TimmStages] = TimmSAM
    else:
        kind = TimmViT if _has_tokens(model) else TimmStages
    # A model with a token grid may be native at less: it was built for img_size.
    size = None if hasattr(_embedding(model), "grid_size") and kind is TimmViT else choices.img_size
    backbone = kind(name, model, choices=choices, input_size=size, mean=choices.mean, std=choices.std)
    if choices.img_size is not None and backbone.input_size != choices.img_size:
        height, width = backbone.input_size
        which = "smallest near it" if min(choices.img_size) < backbone.patch_size else "nearest below"
        raise ConfigError(
            f"img_size of {name!r} has to be whole patches of {backbone.patch_size}; the {which} is {height}x{width}"
        )
    return backbone


class TimmViT(TokenBackbone):
    """A timm vision transformer: final-norm patch tokens as features.

    Patch size, prefix tokens and width are read from the model; whitening comes from its ``pretrained_cfg``, and the
    native size from its token grid: a 384-pixel model with 14-pixel patches is native at 27 patches, 378 pixels. A
    ``NaFlexVit`` has no such grid and is native at the size that its configuration names.
    Hybrids, which start with a convolutional network, have the stride of that network times that of the patches.

    ``layer`` takes outputs of blocks through the final norm, ``facet`` the output of a block's query, key or value
    projection, before normalisation and rotary positions. A model whose only norm follows its pooling (timm's
    ``fc_norm``: BEiT and EVA fine-tuned for classes) has none for tokens, which come as its last block leaves them.

    The summary is "cls", the class token that the model ends with, whatever ``layer`` says. In a model without one, and
    in one whose norm follows its pooling, it is "pool", its own pooling head (the attention pool of SigLIP); without
    that there is none. timm's models carry no text-aligned head.

    Args:
        name: What ``create_backbone`` builds it from, or a label.
        model: A timm model with ``patch_embed`` (``embeds`` in a ``NaFlexVit``), ``num_prefix_tokens`` and
            ``forward_features`` to tokens.
        choices: Of these ``layers``, ``facet`` and ``summary``.
        input_size, mean, std: Override what is read.

    Raises:
        ConfigError: For a model without such tokens, with patches that are not square, or without what is chosen.
    """

    facet_from_inputs = True

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        choices: Options = Options(),  # noqa: B008  (frozen)
        input_size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        if not _has_tokens(model):
            raise ConfigError(
                f"timm model {name!r} ({type(model).__name__}) does not give patch tokens; wrap it with "
                f"featsharp.backbones.from_callable(model.forward_features)"
            )
        embedding = _embedding(model)
        patch_size, width = _square_patch(name, embedding), _int(model, "embed_dim")
        super().__init__(
            name,
            model,
            choices,
            _blocks(model, choices, name),
            width=width,
            summaries=dict.fromkeys(_token_summaries(model), width),
            patch_size=patch_size,
            input_size=_whole_patches(input_size or _native_size(model, patch_size), patch_size),
            flexible=_is_naflex(model) or bool(getattr(model, "dynamic_img_size", False)),
            **_whitening(model, mean, std),
        )
        self.num_prefix_tokens = _int(model, "num_prefix_tokens")
        self.embeds_patches = embeds_patches(getattr(embedding, "proj", None), patch_size)

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        return self.model.forward_features(images), None

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def source(self, block: Any) -> nn.Module:
        _projection(block, self.options.facet)  # or an error
        return block.attn

    def facet_width(self, block: Any) -> int:
        return _projection(block, self.options.facet)[0].shape[0]

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.options.facet == "token":
            return tensor
        return F.linear(tensor[:, self.num_prefix_tokens :], *_projection(block, self.options.facet))

    def summarise(self, kind: str, tokens: Tensor, output: Any, num_patches: int) -> Tensor:
        return tokens[:, 0] if kind == "cls" else self.model.forward_head(tokens, pre_logits=True)


class TimmSAM(TokenBackbone):
    """The image encoder of Segment Anything (arXiv 2304.02643): the output of its last block, before the neck.

    It takes one size, 1024 pixels in the weights of the authors: its absolute and relative positions are tables.
    Another ``input_size`` resamples them at every call as timm does (absolute ones bicubic and antialiased, relative
    ones linear). There is no class token and no pooling; the only summary is the token mean, when asked for.

    ``facet`` gives the projections of whole maps, also in blocks whose attention is windowed.

    Args: As :class:`TimmViT`.
    """

    has_end = False

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        choices: Options = Options(),  # noqa: B008  (frozen)
        input_size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        patch_embed: Any = model.patch_embed
        patch_size = _square_patch(name, patch_embed)
        super().__init__(
            name,
            model,
            choices,
            _blocks(model, choices, name),
            width=_int(model, "embed_dim"),
            summaries={},
            patch_size=patch_size,
            input_size=_whole_patches(input_size or patch_embed.img_size, patch_size),
            flexible=False,
            **_whitening(model, mean, std),
        )
        self.embeds_patches = embeds_patches(getattr(patch_embed, "proj", None), patch_size)

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        return self.model.forward_features(images), None

    def norm(self, tokens: Tensor) -> Tensor:
        return tokens

    def source(self, block: Any) -> nn.Module:
        return block.norm1  # the attention itself may see windows, with padding

    def facet_width(self, block: Any) -> int:
        return _projection(block, self.options.facet)[0].shape[0]

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        facet = self.options.facet
        return (tensor if facet == "token" else F.linear(tensor, *_projection(block, facet))).flatten(1, 2)


class TimmStages(Backbone):
    """A timm model whose stages are maps: ConvNeXt, ResNet and other CNNs, Swin and other hierarchical transformers.

    ``layer`` is a stage as timm counts them in ``feature_info`` (in a ResNet 0 is the stem, 4 the last one); its stride
    is the patch size. Without it the last stage, through the model's final norm over maps where it has one. The summary
    is "pool", the pooled output of the model's last stage, as its classifier would see it.

    Where token (y, x) looks: a stride-s stack of patch convolutions (ConvNeXt) is centred on its s pixels. Odd kernels
    of stride 2 with symmetric padding (ResNet) are centred on the first pixel of theirs, (s - 1) / 2 pixels above and
    left of the centre: 15.5 of 32 pixels at the last stage of a ResNet. That is the model's own, and is left as it is.

    Args: As :class:`TimmViT`; of ``choices.layer`` one.

    Raises:
        ConfigError: Also for a model whose map is not image / stride (no padding, as in Inception), found by a pass.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        choices: Options = Options(),  # noqa: B008  (frozen)
        input_size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        stages: Any = getattr(model, "feature_info", None)
        if not isinstance(stages, Sequence) or not stages or not hasattr(model, "forward_intermediates"):
            raise ConfigError(
                f"timm model {name!r} ({type(model).__name__}) names no stages; wrap it with "
                f"featsharp.backbones.from_callable(model.forward_features)"
            )
        stage = chosen_stage(stages, choices, name)
        config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        size = input_size or _configured_size(model)
        stride = int(stages[stage]["reduction"])
        super().__init__(
            name,
            patch_size=stride,
            embed_dim=int(stages[stage]["num_chs"]),
            input_size=_whole_patches(size, stride),
            flexible=not config.get("fixed_input_size", False),
            **_whitening(model, mean, std),
        )
        self.model: Any = model
        self.stage = stage
        self.summary_kind = chosen_summary(name, choices.summary, {"pool": None})
        self.norm = True
        self.freeze()
        self._try()

    def extract(self, images: Tensor) -> BackboneOutput:
        if self.summary_kind != "pool":
            (features,) = self.model.forward_intermediates(
                images, indices=[self.stage], norm=self.norm, stop_early=True, intermediates_only=True
            )
            return BackboneOutput(features, features.mean((2, 3)) if self.summary_kind == "mean" else None)
        final, (features,) = self.model.forward_intermediates(images, indices=[self.stage], norm=self.norm)
        return BackboneOutput(features, self.model.forward_head(final, pre_logits=True))

    @torch.no_grad()
    def _try(self) -> None:
        """Run a small image; sets the channels of the summary."""
        p = self.patch_size
        deepest = math.lcm(p, *(int(stage["reduction"]) for stage in self.model.feature_info))
        size = (3 * deepest, 4 * deepest) if self.flexible else self.input_size
        weight = next(self.model.parameters())
        try:
            features, summary = self.extract(weight.new_zeros(1, 3, *size))
            shape = tuple(features.shape)
        except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
            if self.norm and "normalization" in str(error):  # Hiera has none between stages and its head
                self.norm = False
                return self._try()
            raise ConfigError(
                f"timm model {self.name!r} ({type(self.model).__name__}) cannot run at {size[0]}x{size[1]} "
                f"({first_line(error)}); wrap it with featsharp.backbones.from_callable(model.forward_features)"
            ) from error
        expected = (1, self.embed_dim, *self.grid_size(size))
        if shape != expected:
            raise ConfigError(
                f"timm model {self.name!r} ({type(self.model).__name__}) makes {shape} of {size[0]}x{size[1]} pixels, "
                f"not {expected}: its map is not the image over its stride, {p}; choose another layer or model"
            )
        self.summary_dim = None if summary is None else summary.shape[1]


def _has_tokens(model: nn.Module) -> bool:
    placed = hasattr(_embedding(model), "grid_size") or _is_naflex(model)
    return placed and isinstance(getattr(model, "num_prefix_tokens", None), int)


def _is_naflex(model: nn.Module) -> bool:
    """timm's ``NaFlexVit``, which takes images as other models do, of any size, beside batches of loose patches."""
    return hasattr(getattr(model, "embeds", None), "pos_embed_ar_preserving")


def _embedding(model: nn.Module) -> Any:
    return model.embeds if _is_naflex(model) else getattr(model, "patch_embed", None)


def _native_size(model: nn.Module, patch_size: int) -> tuple[int, int]:
    if _is_naflex(model):
        return _configured_size(model)
    rows, columns = _embedding(model).grid_size
    return rows * patch_size, columns * patch_size


def _configured_size(model: nn.Module) -> tuple[int, int]:
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    height, width = config.get("input_size", (3, 224, 224))[1:]
    return height, width


def _is_sam(model: nn.Module) -> bool:
    """Recognise the one model of timm with a neck after blocks that keep their map."""
    return all(hasattr(model, part) for part in ("patch_embed", "blocks", "neck", "rope_window"))


def _token_summaries(model: nn.Module) -> list[str]:
    """List the summaries that the model has, the one that it is known for first."""
    holder = _embedding(model) if _is_naflex(model) else model
    summaries = ["cls"] if getattr(holder, "cls_token", None) is not None else []
    if getattr(model, "global_pool", ""):
        # Where the norm follows the pooling, training saw the pooled tokens only.
        pooled_first = not isinstance(getattr(model, "fc_norm", None), nn.Identity | None)
        summaries.insert(0 if pooled_first else len(summaries), "pool")
    return summaries


def _square_patch(name: str, patch_embed: Any) -> int:
    ratio = getattr(patch_embed, "feat_ratio", None)
    height, width = ratio(as_scalar=False) if ratio is not None else patch_embed.patch_size
    if height != width:
        raise ConfigError(f"timm model {name!r} has {height}x{width} patches; only square ones work")
    return int(height)


def _blocks(model: nn.Module, choices: Options, name: str) -> Any:
    """Blocks of a transformer; ConfigError where features from inside are asked for and it shows none."""
    blocks: Any = getattr(model, "blocks", [])
    if choices.inner and not (len(blocks) and hasattr(model, "forward_intermediates")):
        raise ConfigError(f"timm model {name!r} ({type(model).__name__}) shows no blocks; leave out layer and facet")
    return blocks


def _projection(block: nn.Module, facet: Facet) -> tuple[Tensor, Tensor | None]:
    """Weight [C, width] and bias [C] of the query, key or value projection in a block, views of the model's own.

    Raises:
        ConfigError: For a block without attention, or one that computes them in another way.
    """
    attention = getattr(block, "attn", None)
    letter, part = facet[0], FACETS.index(facet)
    separate = getattr(attention, f"{letter}_proj", None)
    if isinstance(separate, nn.Linear):
        return separate.weight, separate.bias
    joint, out = getattr(attention, "qkv", None), getattr(attention, "proj", None)
    if not isinstance(joint, nn.Linear) or not isinstance(out, nn.Linear) or joint.out_features != 3 * out.in_features:
        raise ConfigError(f"{type(block).__name__} of timm has no linear {facet} projection; leave out facet={facet}")
    # EVA and BEiT keep the biases apart from the weight.
    bias = joint.bias.chunk(3)[part] if joint.bias is not None else getattr(attention, f"{letter}_bias", None)
    return joint.weight.chunk(3)[part], bias


def _whitening(model: nn.Module, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> dict[str, Any]:
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return {
        "mean": mean or _configured_values(config, "mean", IMAGENET_MEAN),
        "std": std or _configured_values(config, "std", IMAGENET_STD),
    }


def _configured_values(config: dict[str, Any], key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """``pretrained_cfg`` may come from a file."""
    values = config.get(key, default)
    numbers = isinstance(values, Sequence) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    if not numbers or len(values) != 3 or (key == "std" and min(values) <= 0):
        above = ", above zero" if key == "std" else ""
        raise ConfigError(
            f"pretrained_cfg of this timm model has {key}={values!r}; it has to be three numbers{above}, such as "
            f"{list(default)}: mend its config.json, or give option {key}"
        )
    return tuple(float(value) for value in values)


def _whole_patches(size: Sequence[int], patch_size: int) -> tuple[int, int]:
    height, width = (max(1, side // patch_size) * patch_size for side in size)
    return height, width


def _int(model: nn.Module, attribute: str) -> int:
    """nn.Module types its attributes as Tensor | Module."""
    value: Any = getattr(model, attribute)
    return int(value)
