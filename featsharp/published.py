"""Weights that the authors of upsamplers have published, as sharp encoders of this package.

Get the file from the authors, under their licence, or name one of ``featsharp.weights.published``, which is fetched.
Its tensors are renamed and have to fit exactly; those that only training used, and projections that never reach the
output, are known by name and left out.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone
from featsharp.builder import SharpEncoder, create_encoder, load_model_state, model_state
from featsharp.checkpoint import describe_mismatch, read_state_dict
from featsharp.errors import BackboneMismatchError, CheckpointError, ConfigError, unknown_name
from featsharp.weights.published import PUBLISHED, fetch_published

FEATUP_LEVELS = 4
ATTENTION = "cross_decode.cross_attn."
LOFTUP_LAYERS = 2
# Levels of the encoder, and channels that the decoder gets of it beside the features.
UPLIFT_LEVELS, UPLIFT_GUIDE = 5, 128
# Upsamplers that can reproduce peculiarities of the published code, which their defaults do not have.
PEERS = ("naf", "loftup", "uplift")


def load_published(
    kind: str,
    path: str | PathLike[str],
    backbone: str | Backbone,
    *,
    factor: float | None = None,
    final_fixup: bool | None = None,
    published: bool = False,
    max_memory: int | str | None = None,
) -> SharpEncoder:
    """Load an upsampler that its authors have published.

    ========= ================================================== =================================================
    kind      file                                               factor
    ========= ================================================== =================================================
    "featup"  a JBU stack for one backbone, with or without norm 16 (default); 2, 4, 8: its first levels
    "lift"    for one backbone                                   2 (default); 4, 8, ...: applied again
    "jafar"   for one backbone                                   any; default: the patch size, a feature per pixel
    "anyup"   for any backbone                                   any; default: the patch size, a feature per pixel
    "naf"     for any backbone                                   any; default: the patch size, a feature per pixel
    "loftup"  for one backbone                                   any; default: the patch size, a feature per pixel
    "uplift"  for one backbone                                   any; default: the patch size, a feature per pixel
    ========= ================================================== =================================================

    A file with norm ("featup") has a LayerNorm: the features of the encoder are then normalised and cannot be
    denormalised. A file does not identify its backbone beyond the number of channels: give the same model, facet and
    whitening as its authors did. The guidance image is whitened as for the backbone ("naf": as for ImageNet, always).

    Args:
        kind: See the table.
        path: A PyTorch file (a state dict, or a Lightning checkpoint) or a .safetensors file; or "naf_release",
            "loftup-dinov2s" or another name of ``featsharp ls weights``: that file is fetched once; its authors,
            licence and address are logged before, its hash after that.
        backbone: A name of ``list_backbones()`` or a backbone.
        factor: In each direction; see the table.
        final_fixup: Only for "featup": whether the convolution after the last level is used. It was trained after the
            fourth level, so the default is True at factor 16 only.
        published: Only for "naf", "loftup" and "uplift": whether results are those of the published code where that is
            peculiar; see the option of these upsamplers. "uplift" has the default factor 16 then.
        max_memory: Limit of the memory that encoding takes; see ``SharpEncoder.max_memory``.

    Returns:
        The encoder in eval mode, on the CPU, without gradients; ``save_checkpoint`` converts it to a checkpoint.

    Raises:
        CheckpointError: When the file cannot be fetched or read safely, or a tensor is missing, unknown or of another
            shape.
        BackboneMismatchError: When the weights are for another number of channels.
        ConfigError: For an unknown kind, or a factor that the method does not have.

    Example:
        >>> encoder = load_published("anyup", "anyup_paper.pth", "vits14-focus", factor=4)  # doctest: +SKIP
    """
    if kind not in _READERS:
        raise unknown_name("kind of published weights", kind, _READERS)
    if final_fixup is not None and kind != "featup":
        raise ConfigError(f"final_fixup= is for 'featup' only; leave it out for {kind!r}")
    if published and kind not in PEERS:
        raise ConfigError(f"published= is for {', '.join(map(repr, PEERS))} only; leave it out for {kind!r}")
    backbone = create_backbone(backbone)
    path = _find_file(kind, path)
    tensors = {key.removeprefix("module."): value for key, value in read_state_dict(path).items()}
    if factor is None:
        factor = {"featup": 2**FEATUP_LEVELS, "lift": 2}.get(kind, backbone.patch_size)
        factor = 16 if published and kind == "uplift" else factor
    weights = _READERS[kind](tensors, factor, backbone, final_fixup)
    if published:
        weights.options["published"] = True
    if weights.channels not in (None, backbone.embed_dim):
        raise BackboneMismatchError(
            f"{path} is for features of {weights.channels} channels, but backbone {backbone.name!r} has "
            f"{backbone.embed_dim}; give the backbone that it was trained for"
        )
    encoder = create_encoder(
        backbone,
        kind,
        weights.factor,
        upsampler_options=weights.options,
        normalizer=weights.normalizer,
        max_memory=max_memory,
    )
    load_model_state(encoder, _our_state(encoder, weights, path), path)
    return encoder.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Weights:
    """Contents of a file, and how they map to an encoder of this package."""

    tensors: dict[str, Tensor]  # by published name
    names: dict[str, str]  # prefixes of our names -> of published ones
    factor: float
    channels: int | None  # of the features, None for any
    options: dict[str, Any] = field(default_factory=dict)
    normalizer: str = "none"
    unused: str = r"$^"  # a pattern of published names that are known and left out


def _featup(tensors: dict[str, Tensor], factor: float, backbone: Backbone, final_fixup: bool | None) -> _Weights:
    factors = [2**n for n in range(1, FEATUP_LEVELS + 1)]
    if factor not in factors:
        raise ConfigError(
            f"published FeatUp weights are {FEATUP_LEVELS} levels of 2x, used from the first; got factor {factor}, "
            f"use {min(factors, key=lambda known: abs(known - factor))}"
        )
    final_fixup = factor == factors[-1] if final_fixup is None else final_fixup
    levels = factors.index(int(factor)) + 1
    names = {
        "normalizer.weight": "model.1.norm.weight",
        "normalizer.bias": "model.1.norm.bias",
        "upsampler.final_fixup.layers": "upsampler.fixup_proj",
    }
    for n in range(levels):
        ours, theirs = f"upsampler.levels.{n}", f"upsampler.up{n + 1}"
        names |= {
            f"{ours}.log_temperature": f"{theirs}.range_temp",
            f"{ours}.sigma": f"{theirs}.sigma_spatial",
            f"{ours}.keys": f"{theirs}.range_proj",
            f"{ours}.fixup": f"{theirs}.fixup_proj",
        }
    normed = any(key.startswith("model.1.norm.") for key in tensors)
    unused = r"(downsampler|scale_net)\.|model\.(?!1\.norm\.)"
    unused += "".join(rf"|upsampler\.up{n + 1}\." for n in range(levels, FEATUP_LEVELS))
    if not final_fixup:
        unused += r"|upsampler\.fixup_proj\."
    return _Weights(
        tensors,
        names,
        factor,
        _length(tensors, "upsampler.fixup_proj.1.bias", 0),
        {"flavour": "featup", "start": "published", "final_fixup": final_fixup},
        "layernorm" if normed else "none",
        unused,
    )


def _lift(tensors: dict[str, Tensor], factor: float, backbone: Backbone, _: bool | None) -> _Weights:
    names = {
        "upsampler.doubling.image_fine": "image_convs_1",
        "upsampler.doubling.image_coarse": "image_convs_2",
        "upsampler.doubling.expand": "up1.up",
        "upsampler.doubling.fuse": "up1.conv_1.double_conv",
        "upsampler.doubling.project": "outc",
    }
    # One patch of the backbone per cell, as in the published network.
    options = {"image_scale": backbone.patch_size}
    return _Weights(tensors, names, factor, _length(tensors, "outc.bias", 0), options)


def _jafar(tensors: dict[str, Tensor], factor: float, backbone: Backbone, _: bool | None) -> _Weights:
    names = _cross_attention_names() | {
        "upsampler.feature_encoder": "key_features_encoder",
        "upsampler.gamma": "sft_key.gamma",
        "upsampler.beta": "sft_key.beta",
    }
    kernel = _length(tensors, "image_encoder.0.weight", -1) or 1
    # FeatSharp's copy has a 3 x 3 convolution there, and guidance of twice the output.
    options = {"image_kernel": kernel, "guidance_scale": 2.0 if kernel == 3 else None, "query_padding": "zeros"}
    return _Weights(
        _with_our_layout(tensors),
        names,
        factor,
        _length(tensors, "key_features_encoder.0.weight", 1),
        options,
        unused=_dead_projections(),
    )


def _anyup(tensors: dict[str, Tensor], factor: float, backbone: Backbone, _: bool | None) -> _Weights:
    names = _cross_attention_names() | {
        "upsampler.feature_encoder": "key_features_encoder",
        "upsampler.aggregation": "aggregation",
    }
    return _Weights(_with_our_layout(tensors), names, factor, None, unused=_dead_projections())


def _naf(tensors: dict[str, Tensor], factor: float, backbone: Backbone, _: bool | None) -> _Weights:
    names = {
        "upsampler.pixel_encoder": "image_encoder.encoder",
        "upsampler.context_encoder": "image_encoder.sem_encoder",
        "upsampler.periods": "image_encoder.rope.periods",
    }
    return _Weights(tensors, names, factor, None)


def _loftup(tensors: dict[str, Tensor], factor: float, backbone: Backbone, _: bool | None) -> _Weights:
    if not any(key.startswith("upsampler.") for key in tensors):  # the inner module alone
        tensors = {f"upsampler.{key}": value for key, value in tensors.items()}
    names = {
        "upsampler.feature_norm": "channelnorm.norm",
        "upsampler.token_phases": "upsampler.lr_pe",
        "upsampler.image_phases": "upsampler.fourier_feat.1",
        "upsampler.image_norm": "upsampler.first_conv.0.norm",
        **{f"upsampler.image_convs.{n}": f"upsampler.first_conv.{n + 1}" for n in (0, 1, 3, 4)},
        "upsampler.query_norm": "upsampler.ca_transformer.norm",
        "upsampler.project": "upsampler.final_conv.0",
        "upsampler.output_norm": "upsampler.final_conv.1",
    }
    for n in range(LOFTUP_LAYERS):
        ours, theirs = f"upsampler.layers.{n}", f"upsampler.ca_transformer.layers.{n}"
        names |= {
            f"{ours}.query_norm": f"{theirs}.0.norm_q",
            f"{ours}.token_norm": f"{theirs}.0.norm_kv",
            f"{ours}.in_proj.weight": f"{theirs}.0.attention.in_proj_weight",
            f"{ours}.in_proj.bias": f"{theirs}.0.attention.in_proj_bias",
            f"{ours}.out_proj": f"{theirs}.0.attention.out_proj",
            **{f"{ours}.mlp.{place}": f"{theirs}.1.net.{there}" for place, there in ((0, 0), (1, 1), (3, 4))},
        }
    unused = r"$^"
    if "model.1.norm.weight" in tensors:  # of the authors' training, with the backbone and what computes losses
        names["upsampler.feature_norm"] = "model.1.norm"
        unused = r"(?!upsampler\.|model\.1\.norm\.)"
    weight = "upsampler.final_conv.0.weight"
    if weight in tensors and tensors[weight].shape[2:] == (1, 1):  # a convolution, here a linear layer
        tensors = tensors | {weight: tensors[weight].flatten(1)}
    return _Weights(tensors, names, factor, _length(tensors, "upsampler.final_conv.0.bias", 0), unused=unused)


def _uplift(tensors: dict[str, Tensor], factor: float, backbone: Backbone, _: bool | None) -> _Weights:
    names = {
        **{f"upsampler.encoder.{n}.layers": f"encoder.block_{n}.blocks.0.conv" for n in range(UPLIFT_LEVELS)},
        "upsampler.coarse.layers": "decoder.block_0.blocks.0.conv",
        "upsampler.fine.layers": "decoder.block_1.blocks.0.conv",
        "upsampler.expand": "decoder.up_1.up",
        "upsampler.attend": "attender.conv1",
    }
    # The published constructor casts counters of batches with all other buffers.
    tensors = {key: x.long() if key.endswith("num_batches_tracked") else x for key, x in tensors.items()}
    inputs = _length(tensors, "decoder.block_0.blocks.0.conv.0.weight", 1)
    return _Weights(tensors, names, factor, None if inputs is None else inputs - UPLIFT_GUIDE)


_READERS: dict[str, Callable[[dict[str, Tensor], float, Backbone, bool | None], _Weights]] = {
    "featup": _featup,
    "lift": _lift,
    "jafar": _jafar,
    "anyup": _anyup,
    "naf": _naf,
    "loftup": _loftup,
    "uplift": _uplift,
}


def _cross_attention_names() -> dict[str, str]:
    """Names that JAFAR and AnyUp have in common."""
    return {
        "upsampler.image_encoder": "image_encoder",
        "upsampler.query_encoder": "query_encoder",
        "upsampler.key_encoder": "key_encoder",
        "upsampler.rope.frequencies": "rope.freqs",
        "upsampler.query_conv": "cross_decode.conv2d",
        "upsampler.query_norm": f"{ATTENTION}norm_q",
        "upsampler.key_norm": f"{ATTENTION}norm_k",
        "upsampler.query_proj.weight": f"{ATTENTION}attention.q_proj_weight",
        "upsampler.query_proj.bias": f"{ATTENTION}attention.in_proj_bias[q]",
        "upsampler.key_proj.weight": f"{ATTENTION}attention.k_proj_weight",
        "upsampler.key_proj.bias": f"{ATTENTION}attention.in_proj_bias[k]",
    }


def _dead_projections() -> str:
    """Pattern of projections of values and of the output, which averaged attention weights do not use."""
    return (
        re.escape(ATTENTION) + r"(norm_v\.weight|attention\.(v_proj_weight|in_proj_bias\[v\]|out_proj\.(weight|bias)))$"
    )


def _with_our_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split packed projections, and number the layers of residual blocks as ours are."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        packed = re.fullmatch(rf"({re.escape(ATTENTION)}attention\.)in_proj_(weight|bias)", key)
        if packed and value.ndim and value.shape[0] % 3 == 0:
            name = "{}_proj_weight" if packed[2] == "weight" else "in_proj_bias[{}]"
            renamed |= {packed[1] + name.format(x): part for x, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[key] = value
    blocks: dict[tuple[str, str, int], list[str]] = {}
    for key, value in renamed.items():
        if match := re.fullmatch(r"(\w+_encoder\.[12]|aggregation\.[12])\..+\.(weight|bias)", key):
            blocks.setdefault((match[1], match[2], value.ndim), []).append(key)
    layout = {}
    for (block, leaf, ndim), keys in blocks.items():
        # Normalisation, activation, convolution; and once more.
        indices = (2, 5) if ndim == 4 else (0, 3)
        for index, key in zip(indices, sorted(keys, key=_natural_order), strict=False):
            layout[key] = f"{block}.layers.{index}.{leaf}"
    return {layout.get(key, key): value for key, value in renamed.items()}


def _natural_order(key: str) -> list[tuple[int, str]]:
    """Sort key that compares numbers by value, the rest as text."""
    return [(int(part or 0) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", key)]


def _our_state(encoder: SharpEncoder, weights: _Weights, path: object) -> dict[str, Tensor]:
    """Fill the state of ``encoder`` with the published tensors; raises CheckpointError unless all fit."""
    state = model_state(encoder)
    published = {_published_name(key, weights.names): key for key in state}
    published.pop("", None)
    tensors = {key: value for key, value in weights.tensors.items() if not re.match(weights.unused, key)}
    if problems := describe_mismatch(tensors, {key: state[ours] for key, ours in published.items()}):
        raise CheckpointError(f"{path} {problems}; is it a file of this kind?")
    return state | {ours: tensors[key] for key, ours in published.items()}


def _published_name(ours: str, names: Mapping[str, str]) -> str:
    """Map the name of a tensor of ours to the authors'; "" for one that they do not have."""
    for prefix, theirs in names.items():
        if ours == prefix or ours.startswith(f"{prefix}."):
            return theirs + ours.removeprefix(prefix)
    return ""


def _length(tensors: Mapping[str, Tensor], key: str, dim: int) -> int | None:
    """Size of a tensor along ``dim``, None where the tensor is missing."""
    return tensors[key].shape[dim] if key in tensors and tensors[key].ndim else None


def _find_file(kind: str, path: str | PathLike[str]) -> str | PathLike[str]:
    """Fetch a file that is named instead of given; a file of that name comes first."""
    if Path(path).is_file():
        return path
    known = PUBLISHED.get(str(path))
    if known is None:
        names = [name for name, file in PUBLISHED.items() if file.kind == kind]
        near = get_close_matches(str(path), names, n=1)
        raise CheckpointError(
            f"there is no file {path}{f' (did you mean {near[0]!r}?)' if near else ''}; get it from the authors of the "
            + (f"method, or name one that is fetched: {', '.join(names)}" if names else "method")
        )
    if known.kind != kind:
        raise ConfigError(f"{path} has weights of kind {known.kind!r}; got {kind!r}, use {known.kind!r}")
    return fetch_published(str(path), known)
