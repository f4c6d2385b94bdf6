"""Models of the timm library, by name: ``timm:MODEL[.TAG]``, ``timm:DIR`` or ``timm:MODEL?weights=FILE``.

Three kinds are known: vision transformers with a token sequence (:class:`TimmViT`), the trunk of Segment Anything
(:class:`TimmSAM`), and everything else that ends in a map, such as convolutional networks (:class:`TimmStages`).

Convention:
    Other sizes than the native one resample the position embedding as timm does: bicubic, antialiased, half-pixel
    centres. At the native size timm adds the stored embedding itself. Models of its class ``NaFlexVit`` keep a table of
    their own grid and resample that at every call, as each is configured: those of RADIO bilinearly to a square of the
    longer side, of which they crop the top left (cropped position embedding, arXiv 2412.07679).

Whitening is that of the weights, ``pretrained_cfg``. Published numbers may rest on another: timm has 0.5/0.5 for the
supervised ``vit_small_patch16_224``, FeatUp (arXiv 2403.10516) feeds it ImageNet's. Options ``mean`` and ``std`` match
these: ``?mean=0.485,0.456,0.406&std=0.229,0.224,0.225``.
"""

import difflib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones.adapters import FACETS, ModelBackbone, TokenBackbone, choose_stage
from featsharp.backbones.base import Backbone
from featsharp.backbones.loading import (
    call_leaving_out,
    cannot_fetch,
    find_weights,
    import_optional,
    seeded_weights,
    square_patch,
    whole_patches,
)
from featsharp.backbones.options import DEFAULTS, Facet, Options
from featsharp.backbones.preprocessing import choose_whitening
from featsharp.errors import BackboneMismatchError, CheckpointError, ConfigError, first_line, shorten

INSTALL_TIMM = 'pip install "featsharp[timm]"'
# As timm looks for them in a directory of its own.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
# These resample their positions at every call: SAM not when it loads them, NaFlexVit from a table of its own grid.
RESAMPLING_MODULES = ["vision_transformer_sam", "naflexvit"]


def build(name: str, spec: str, options: Options) -> Backbone:
    """Build ``timm:MODEL[.TAG]``; the directory that ``timm.models.save_for_hf`` writes can take the place of MODEL.

    ``weights`` is a file that timm can read (``.safetensors``, ``.pth``, ``.bin``; timm's own keys or those of the
    authors, which timm converts) or a directory with one. Every weight has to be in it, the classifier aside.

    Raises:
        ConfigError: For an unknown model, tag or option, or a model that has not what an option asks for.
        MissingDependencyError: When timm or the weights are absent and the weights cannot be fetched.
        CheckpointError: For a weight file that cannot be read.
        BackboneMismatchError: For one that does not fill the model.
    """
    model = load_timm_model(name, spec, options)
    if not hasattr(model, "forward_features"):
        raise ConfigError(f"timm model {name!r} ({type(model).__name__}) gives no features")
    if all(hasattr(model, part) for part in ("patch_embed", "blocks", "neck", "rope_window")):
        return TimmSAM(name, model, options)  # the one model with a neck after blocks that keep their map
    return TimmViT(name, model, options) if _has_tokens(model) else TimmStages(name, model, options)


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
        name: The name of ``create_backbone``, or a label.
        model: A timm model with ``patch_embed`` (``embeds`` in a ``NaFlexVit``), ``num_prefix_tokens`` and
            ``forward_features`` to tokens.
        options: Of these layer, facet, summary, mean and std.
        facts: In place of those that are read.

    Raises:
        ConfigError: For a model without such tokens, with patches that are not square, or without what is chosen.
    """

    facet_from_inputs = True

    def __init__(self, name: str, model: Any, options: Options = DEFAULTS, **facts: Any) -> None:
        embedding, width = _embedding(model), model.embed_dim
        ratio = getattr(embedding, "feat_ratio", None)
        patch_size = square_patch(name, embedding.patch_size if ratio is None else ratio(as_scalar=False))
        blocks = getattr(model, "blocks", [])
        if options.inner and not (len(blocks) and hasattr(model, "forward_intermediates")):
            raise ConfigError(
                f"timm model {name!r} ({type(model).__name__}) shows no blocks; leave out layer and facet"
            )
        if "input_size" not in facts:
            grid = None if _is_naflex(model) else [side * patch_size for side in embedding.grid_size]
            facts["input_size"] = whole_patches(grid or _configured_size(model), patch_size)
        read: dict[str, Any] = {
            "summaries": dict.fromkeys(_token_summaries(model), width),
            "flexible": _is_naflex(model) or bool(getattr(model, "dynamic_img_size", False)),
            **_whitening(name, model, options),
        }
        super().__init__(name, model, options, blocks, width=width, patch_size=patch_size, **{**read, **facts})
        self.num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))

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

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        return end[:, 0] if kind == "cls" else self.model.forward_head(end, pre_logits=True)


class TimmSAM(TimmViT):
    """The image encoder of Segment Anything (arXiv 2304.02643): the output of its last block, before the neck.

    It takes one size, 1024 pixels in the weights of the authors: its absolute and relative positions are tables.
    Another ``options.img_size`` resamples them at every call as timm does (absolute ones bicubic and antialiased,
    relative ones linear). There is no class token and no pooling; the only summary is the token mean, when asked for.

    ``facet`` gives the projections of whole maps, also in blocks whose attention is windowed.

    Args: As :class:`TimmViT`.
    """

    facet_from_inputs = False
    has_end = False

    def __init__(self, name: str, model: Any, options: Options = DEFAULTS) -> None:
        size = whole_patches(options.img_size or model.patch_embed.img_size, model.patch_embed.patch_size[0])
        super().__init__(name, model, options, summaries={}, input_size=size, flexible=False)

    def norm(self, tokens: Tensor) -> Tensor:
        return tokens

    def source(self, block: Any) -> nn.Module:
        return block.norm1  # the attention itself may see windows, with padding

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        facet = self.options.facet
        return (tensor if facet == "token" else F.linear(tensor, *_projection(block, facet))).flatten(1, 2)


class TimmStages(ModelBackbone):
    """A timm model whose stages are maps: ConvNeXt, ResNet and other CNNs, Swin and other hierarchical transformers.

    ``layer`` is a stage as timm counts them in ``feature_info`` (in a ResNet 0 is the stem, 4 the last one); its stride
    is the patch size. Without it the last stage, through the model's final norm over maps where it has one. The summary
    is "pool", the pooled output of the model's last stage, as its classifier would see it.

    Token (y, x) of a stride-s stack of patch convolutions (ConvNeXt) is centred on its s pixels. Odd kernels of stride
    2 with symmetric padding (ResNet) are centred on the first pixel of theirs, (s - 1) / 2 pixels above and left of the
    centre: 15.5 of 32 pixels at the last stage of a ResNet. That is the model's own, and is left as it is.

    Args: As :class:`TimmViT`; of ``options.layer`` one.

    Raises:
        ConfigError: Also for a model whose map is not image / stride (no padding, as in Inception).
    """

    def __init__(self, name: str, model: Any, options: Options = DEFAULTS) -> None:
        stages = getattr(model, "feature_info", None)
        if not isinstance(stages, Sequence) or not stages or not hasattr(model, "forward_intermediates"):
            raise ConfigError(
                f"timm model {name!r} ({type(model).__name__}) names no stages; wrap it with "
                f"featsharp.backbones.from_callable(model.forward_features)"
            )
        self.norm = True
        stage = choose_stage(stages, options, name)
        stride = int(stages[stage]["reduction"])
        super().__init__(
            name,
            model,
            options,
            summaries={"pool": None},
            patch_size=stride,
            embed_dim=int(stages[stage]["num_chs"]),
            input_size=whole_patches(options.img_size or _configured_size(model), stride),
            flexible=not _config(model).get("fixed_input_size", False),
            **_whitening(name, model, options),
        )
        self.stage = stage
        self._try()

    def encode(self, images: Tensor) -> tuple[Tensor, Any, Any]:
        if self.needs_end:
            end, (features,) = self.model.forward_intermediates(images, indices=[self.stage], norm=self.norm)
            return features, end, None
        (features,) = self.model.forward_intermediates(
            images, indices=[self.stage], norm=self.norm, stop_early=True, intermediates_only=True
        )
        return features, None, None

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        return self.model.forward_head(end, pre_logits=True)

    @torch.no_grad()
    def _try(self) -> None:
        """Run a small image; sets the channels of the summary."""
        p = self.patch_size
        deepest = math.lcm(p, *(int(stage["reduction"]) for stage in self.model.feature_info))
        size = (3 * deepest, 4 * deepest) if self.flexible else self.input_size
        weight = next(self.model.parameters())
        model = f"timm model {self.name!r} ({type(self.model).__name__})"
        try:
            features, summary = self.extract(weight.new_zeros(1, 3, *size))
            shape = tuple(features.shape)
        except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
            if self.norm and "normalization" in str(error):  # Hiera has none between stages and its head
                self.norm = False
                return self._try()
            raise ConfigError(
                f"{model} cannot run at {size[0]}x{size[1]} ({first_line(error)}); wrap it with "
                f"featsharp.backbones.from_callable(model.forward_features)"
            ) from error
        expected = (1, self.embed_dim, *self.grid_size(size))
        if shape != expected:
            raise ConfigError(
                f"{model} makes {shape} of {size[0]}x{size[1]} pixels, not {expected}: its map is not the image over "
                f"its stride, {p}; choose another layer or model"
            )
        self.summary_dim = None if summary is None else summary.shape[1]


def _has_tokens(model: Any) -> bool:
    placed = hasattr(_embedding(model), "grid_size") or _is_naflex(model)
    return placed and isinstance(getattr(model, "num_prefix_tokens", None), int)


def _is_naflex(model: Any) -> bool:
    """Recognise timm's ``NaFlexVit``, which takes images of any size, beside batches of loose patches."""
    return hasattr(getattr(model, "embeds", None), "pos_embed_ar_preserving")


def _embedding(model: Any) -> Any:
    return model.embeds if _is_naflex(model) else getattr(model, "patch_embed", None)


def _config(model: Any) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def _configured_size(model: Any) -> tuple[int, int]:
    height, width = _config(model).get("input_size", (3, 224, 224))[1:]
    return height, width


def _whitening(name: str, model: Any, options: Options) -> dict[str, Any]:
    return choose_whitening(options, _config(model), f"pretrained_cfg of timm model {name!r}")


def _token_summaries(model: Any) -> list[str]:
    """List the summaries that the model has, the one that it is known for first."""
    holder = _embedding(model) if _is_naflex(model) else model
    summaries = ["cls"] if getattr(holder, "cls_token", None) is not None else []
    if getattr(model, "global_pool", ""):
        # Where the norm follows the pooling, training saw the pooled tokens only.
        pooled_first = not isinstance(getattr(model, "fc_norm", None), nn.Identity | None)
        summaries.insert(0 if pooled_first else len(summaries), "pool")
    return summaries


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


def load_timm_model(name: str, spec: str, options: Options) -> nn.Module:
    """Load the timm model without a classifier, able to change its size where its class can.

    Args:
        name: For messages.
        spec: ``MODEL``, ``MODEL.TAG``, ``hf-hub:ORG/MODEL``, or a directory with ``config.json`` (``DIR`` or
            ``local-dir:DIR``), where the weights are too.
        options: Of these ``pretrained``, ``weights`` and ``img_size``.
    """
    timm = import_optional("timm", f"backbone {name!r}", INSTALL_TIMM)
    source, architecture = _find_source(timm, spec, options.weights)
    weights = None
    if options.pretrained and (options.weights is not None or source.startswith("local-dir:")):
        weights = find_weights(options.weights or source.removeprefix("local-dir:"), WEIGHT_FILES)
    optional: dict[str, Any] = {"dynamic_img_size": True}
    if options.img_size is not None and not timm.models.is_model_in_modules(architecture, RESAMPLING_MODULES):
        optional["img_size"] = options.img_size
    load = options.pretrained and weights is None
    try:
        with seeded_weights():
            model: nn.Module = call_leaving_out(
                timm.create_model, optional, model_name=source, pretrained=load, num_classes=0, **optional
            )
    except OSError as error:
        command = f"python -c \"import timm; timm.create_model('{spec}', pretrained=True)\""
        raise cannot_fetch(name, error, command) from error
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"timm cannot build {spec!r}: {first_line(error)}; {_nearest_tags(timm, source, architecture)}"
            f"timm.list_pretrained('{architecture}*') lists the tags with weights, ?weights=FILE takes a file, "
            f"?pretrained=false takes random weights"
        ) from error
    if weights is not None:
        _fill(timm, model, architecture, weights)
    return model


def _find_source(timm: Any, spec: str, weights: str | None) -> tuple[str, str]:
    """Find the source that ``timm.create_model`` takes, and its architecture."""
    if spec.startswith("hf-hub:"):
        return spec, spec
    if not spec:
        raise ConfigError(
            "timm: needs a name of timm.list_models() or a directory, such as timm:vit_small_patch16_224.dino"
        )
    directory = Path(os.path.expanduser(spec.removeprefix("local-dir:")))
    if spec.startswith("local-dir:") or directory.is_dir():
        return f"local-dir:{directory}", _architecture(timm, directory)
    if "/" in spec or "\\" in spec:
        raise ConfigError(f"there is no directory {spec!r}; timm:MODEL is a name of timm.list_models() or a directory")
    architecture = spec.split(".")[0]
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(repr(n) for n in nearest)}?" if nearest else "no name is near."
        raise ConfigError(f"unknown timm model {architecture!r}; {hint} timm.list_models() lists all")
    folder = None if weights is None else Path(weights)
    if folder is not None and (folder / "config.json").is_file():
        other = _architecture(timm, folder)
        if other != architecture:
            raise BackboneMismatchError(f"{folder} holds a timm model {other!r}, not {architecture!r}; name that one")
        return f"local-dir:{folder}", architecture
    return spec, architecture


def _nearest_tags(timm: Any, source: str, architecture: str) -> str:
    """For the message about a tag that timm has not: the nearest ones, else the first; empty for a tag that it has."""
    if source.startswith(("hf-hub:", "local-dir:")):
        return ""
    tag = source.partition(".")[2]
    known = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if not tag or not known or tag in known:
        return ""
    nearest = difflib.get_close_matches(tag, known, n=3, cutoff=0.4) or known[:5]
    return f"nearest tags: {', '.join(nearest)}; "


def _architecture(timm: Any, directory: Path) -> str:
    config = directory / "config.json"
    if not config.is_file():
        raise ConfigError(
            f"{directory} has no config.json, so it is not a model that timm.models.save_for_hf wrote; "
            f"for a file of weights name the model: timm:MODEL?weights=FILE"
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON ({error}); save the model again") from error
    architecture = content.get("architecture") if isinstance(content, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ConfigError(f"{config} names no architecture of this timm ({architecture!r}); is it of another library?")
    if not isinstance(content.get("pretrained_cfg", {}), dict):
        raise ConfigError(
            f"{config} has pretrained_cfg={content['pretrained_cfg']!r}; it has to be a mapping with mean, std and "
            f"input_size, as timm.models.save_for_hf writes it"
        )
    return architecture


def _fill(timm: Any, model: nn.Module, architecture: str, file: Path) -> None:
    """Load all weights but those of the classifier.

    timm itself lets any key be missing when it is asked for another number of classes than the weights have.
    """
    try:
        state = timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:  # each format has errors of its own
        raise CheckpointError(
            f"{file} cannot be read as weights ({first_line(error)}); fetch or save it again"
        ) from error
    convert = getattr(sys.modules[timm.models.model_entrypoint(architecture).__module__], "checkpoint_filter_fn", None)
    try:
        result = model.load_state_dict(convert(state, model) if convert else state, strict=False)
    except (RuntimeError, KeyError, AttributeError, AssertionError, ValueError, TypeError) as error:
        shapes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise BackboneMismatchError(
            f"{file} does not fit timm model {architecture!r}: {shorten(shapes, '; ') if shapes else first_line(error)}"
            f"; name the model that it was saved from"
        ) from error
    names = _config(model).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    unknown = [key for key in result.unexpected_keys if not key.startswith(heads)]
    if result.missing_keys or unknown:
        raise BackboneMismatchError(
            f"{file} does not fill timm model {architecture!r}: missing {shorten(result.missing_keys)}; "
            f"not of this model {shorten(unknown)}; name the model that it was saved from"
        )
