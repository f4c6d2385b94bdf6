"""Vision models of Hugging Face transformers by name: ``hf:ORG/MODEL`` or ``hf:DIRECTORY``.

:data:`FAMILIES` has the class for each kind of model that is known; the others are tried out as any module is.

Convention:
    Sizes other than the native one resample the position embedding as transformers does: bicubic, not antialiased,
    half-pixel centres; SigLIP2 NaFlex: bilinear, antialiased. At the size of the stored table it is added itself.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.backbones.adapters import FACETS, StageBackbone, TokenBackbone, captured, choose_stage, to_map
from featsharp.backbones.base import Backbone
from featsharp.backbones.from_callable import wrap_unknown
from featsharp.backbones.loading import (
    call_leaving_out,
    cannot_fetch,
    check_version,
    import_optional,
    pair,
    seeded_weights,
    square_patch,
    whole_patches,
)
from featsharp.backbones.options import Options
from featsharp.backbones.preprocessing import quiet, read_image_processor
from featsharp.checkpoint import read_state_dict
from featsharp.errors import CheckpointError, ConfigError, MissingDependencyError, first_line, shorten
from featsharp.ops.resize import size_of

INSTALL_HF = 'pip install "featsharp[hf]"'
# Where the vision tower lies in the checkpoints of language models that see (PaliGemma, LLaVA), old layout and new.
TOWER_KEYS = {r"^(model\.)?vision_tower\.(vision_model\.)?": ""}
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
# The linear layers of an attention, by the names that transformers gives them.
PROJECTIONS = {"query": ("q_proj", "query"), "key": ("k_proj", "key"), "value": ("v_proj", "value")}
# Arguments that some models and versions do not take; without them transformers 4 builds float32 as well.
LATER_ARGUMENTS = ("add_pooling_layer", "dtype", "key_mapping")
# Kinds that came with a later transformers than the oldest allowed, or whose vision tower could not be read alone.
SINCE = {
    **dict.fromkeys(("dinov3_convnext", "dinov3_vit"), (4, 56)),
    **dict.fromkeys(("sam", "sam_vision_model"), (4, 51)),
    **dict.fromkeys(("llava", "llava_next", "paligemma", "siglip2", "siglip2_vision_model"), (4, 50)),
}
# A side that the strides of all convolutional networks divide.
PROBE_SIDE = 128
# Models that resample their positions when they are asked to, beside those of FAMILIES.
RESAMPLING = {
    *("beit", "chinese_clip_vision_model", "data2vec-vision", "donut-swin", "hiera", "ijepa", "maskformer-swin"),
    *("swin", "swinv2", "vit_msn", "vivit"),
}


def build(name: str, source: str, options: Options) -> Backbone:
    """Build ``hf:ORG/MODEL`` or ``hf:DIRECTORY``, whose ``save_pretrained`` files lie there.

    Of a model with a language part only the vision tower is built and read. ``mean`` and ``std`` are for a model
    without an image processor; ``trust=true`` runs the model code that comes with the weights, which is otherwise
    refused. ``weights`` is a directory or a file with weights in place of the model's own.

    Raises:
        ConfigError: For an option that the model does not have, no or an unknown configuration, no whitening, or code
            that is not trusted.
        CheckpointError: For weights that cannot be read or are of another architecture; the message lists the keys.
        MissingDependencyError: When transformers or the weights are absent and the weights cannot be fetched.
    """
    transformers = import_optional("transformers", f"backbone {name!r}", INSTALL_HF)
    source = os.path.expanduser(source)
    with quiet(transformers):
        place, config = _read_config(transformers, name, source, options)
        whitening, size = read_image_processor(name, place, options)
        foreign = not type(config).__module__.startswith("transformers.")  # its code came with the weights
        vision = config if foreign else getattr(config, "vision_config", None) or config
        model = _build_model(transformers, name, place, config, vision, foreign, options)
    if not foreign and vision.model_type in FAMILIES:
        if options.project and not hasattr(model, "visual_projection"):
            raise ConfigError(
                f"backbone {name!r} has no projection into the space of text; leave out project, or take a checkpoint "
                f"of CLIPModel or CLIPVisionModelWithProjection"
            )
        if options.project and options.facet != "token":
            raise ConfigError(f"the {options.facet} of {name!r} has no projection; leave out project or facet")
        return FAMILIES[vision.model_type](name, model, options, size, **whitening)
    size = _native_size(name, options.img_size or size or getattr(vision, "image_size", None))
    asked = not foreign and vision.model_type in RESAMPLING
    backbone = wrap_unknown(name, _Resampling(model) if asked else model, options, input_size=size, **whitening)
    if not backbone.flexible and not asked:  # others may have to be asked as well
        with suppress(ConfigError):
            other = wrap_unknown(name, _Resampling(model), options, input_size=size, **whitening)
            return other if other.flexible else backbone
    return backbone


class TransformersViT(TokenBackbone):
    """A vision transformer of transformers: its last patch tokens after the final norm (ViT, DeiT).

    Patch size, width, blocks and the size of the position table are read from the model. The native size is that of the
    image processor, in whole patches: a 384-pixel model with 14-pixel patches is native at 27 patches, 378 pixels.

    Args:
        name: The name of ``create_backbone``, or a label.
        model: The vision model, with weights.
        options: Layer, facet, projection and summary.
        size: (h, w) in pixels that the image processor makes; None when it does not say.
        whitening: ``mean`` and ``std``.

    Raises:
        ConfigError: For an option that this model does not have, or patches that are not square.
    """

    final_norm: str | None = "layernorm"
    # Whether positions are resampled for other grids, and whether the model has to be asked to.
    resamples = True
    arguments: Mapping[str, Any] = {"interpolate_pos_encoding": True}

    def __init__(self, name: str, model: Any, options: Options, size: tuple[int, int] | None, **whitening: Any) -> None:
        trunk = self.trunk_of(model)
        config = trunk.config
        table = self.table_size(config)
        # To resample its table, transformers makes it a square first.
        flexible = self.resamples and table[0] == table[1]
        patch_size = square_patch(name, config.patch_size)
        projected = model.visual_projection.out_features if hasattr(model, "visual_projection") else None
        super().__init__(
            name,
            model,
            options,
            _module_list(trunk, config.num_hidden_layers),
            width=config.hidden_size,
            summaries=self.summaries(config, projected),
            head_width=projected or 0,
            patch_size=patch_size,
            input_size=whole_patches((size if flexible else None) or table, patch_size),
            flexible=flexible,
            **whitening,
        )
        self.trunk: Any = trunk

    def trunk_of(self, model: Any) -> Any:
        """The part of ``model`` that has ``config``, blocks and norm as its own."""
        return getattr(model, "vision_model", model)

    def table_size(self, config: Any) -> tuple[int, int]:
        """(h, w) in pixels of the images that the position table is for."""
        return pair(config.image_size)

    def summaries(self, config: Any, projected: int | None) -> dict[str, int | None]:
        """Channels of the summaries that this model has, its default first; the mean is that of its last tokens."""
        return {"cls": config.hidden_size, "mean": config.hidden_size}

    def run(self, images: Tensor, **more: Any) -> tuple[Tensor, Any]:
        output = self.model(images, **(self.arguments if self.flexible else {}), **more)
        return output.last_hidden_state, output

    def norm(self, tokens: Tensor) -> Tensor:
        return tokens if self.final_norm is None else getattr(self.trunk, self.final_norm)(tokens)

    def take(self, block: Any, tensor: Any, grid: tuple[int, int]) -> Tensor:
        return tensor[0] if isinstance(tensor, tuple) else tensor  # blocks of transformers 4 return tuples

    def project(self, tokens: Tensor) -> Tensor:
        return self.model.visual_projection(tokens)

    def source(self, block: Any) -> nn.Module:
        names = PROJECTIONS[self.options.facet]
        for path, module in block.named_modules():
            if path.rpartition(".")[2] in names and isinstance(module, nn.Linear):
                return module
        raise ConfigError(
            f"backbone {self.name!r} has no facet {self.options.facet!r}: no layer of {type(block).__name__} is called "
            f"{' or '.join(names)}; leave out facet"
        )

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        if kind == "cls":
            return end[:, 0]
        return output.pooler_output if kind == "pool" else output.image_embeds


class DinoV2ViT(TransformersViT):
    """DINOv2, with registers or without, which resamples unasked."""

    arguments: Mapping[str, Any] = {}


class DinoV3ViT(DinoV2ViT):
    """DINOv3: rotary positions, so every grid is as native as another; the facets are taken before the rotation."""

    final_norm = "norm"


class MaskedAutoencoderViT(TransformersViT):
    """The encoder of a masked autoencoder that masks nothing and leaves the patches in their order."""

    def __init__(self, *arguments: Any, **whitening: Any) -> None:
        super().__init__(*arguments, **whitening)
        self.trunk.config.mask_ratio = 0.0

    def run(self, images: Tensor, **more: Any) -> tuple[Tensor, Any]:
        rows, columns = self.grid_size(size_of(images))
        # The encoder keeps, and sorts by, the smallest noise.
        order = torch.arange(rows * columns, device=images.device).expand(images.shape[0], -1)
        return super().run(images, noise=order)


class ClipViT(TransformersViT):
    """The vision tower of CLIP.

    transformers applies the final norm to the class token only; here it goes over the patch tokens too, as in
    open_clip, because the head behind it (``project``) expects its output. The summary is the projected class token
    where the checkpoint has the projection, else the class token.
    """

    final_norm = "post_layernorm"

    def summaries(self, config: Any, projected: int | None) -> dict[str, int | None]:
        return {**({} if projected is None else {"projected": projected}), **super().summaries(config, projected)}

    def run(self, images: Tensor, **more: Any) -> tuple[Tensor, Any]:
        tokens, output = super().run(images)
        return self.norm(tokens), output


class SiglipViT(TransformersViT):
    """The vision tower of SigLIP and of what is built on it (SigLIP2 of fixed size, PaliGemma): no class token.

    The summary is the output of the attention pool, where the tower has one.
    """

    final_norm = "post_layernorm"

    def summaries(self, config: Any, projected: int | None) -> dict[str, int | None]:
        width = config.hidden_size
        return {**({"pool": width} if getattr(config, "vision_use_head", True) else {}), "none": None, "mean": width}


class NaFlexViT(SiglipViT):
    """SigLIP2 NaFlex: images of any aspect ratio as sequences of flattened patches.

    The images of a batch have one size, so there is no padding, and attention without a mask is exact.
    """

    def __init__(self, *arguments: Any, **whitening: Any) -> None:
        super().__init__(*arguments, **whitening)
        self.embeds_patches = True  # by a linear layer

    def table_size(self, config: Any) -> tuple[int, int]:
        return pair(int(config.num_patches**0.5) * config.patch_size)

    def run(self, images: Tensor, **more: Any) -> tuple[Tensor, Any]:
        rows, columns = self.grid_size(size_of(images))
        p = self.patch_size
        cells = images.reshape(images.shape[0], 3, rows, p, columns, p)
        patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(images.shape[0], rows * columns, 3 * p * p)
        shapes = torch.tensor([[rows, columns]]).expand(images.shape[0], 2)
        output = self.model(pixel_values=patches, pixel_attention_mask=None, spatial_shapes=shapes)
        return output.last_hidden_state, output


class SamViT(TransformersViT):
    """The image encoder of SAM at its one size: the tokens of the last block, before the neck. It has no summary."""

    final_norm = None
    resamples = False

    def __init__(self, name: str, model: nn.Module, *arguments: Any, **whitening: Any) -> None:
        self.trunk_of(model).neck = nn.Identity()
        super().__init__(name, model, *arguments, **whitening)

    def trunk_of(self, model: Any) -> Any:
        return model.vision_encoder

    def summaries(self, config: Any, projected: int | None) -> dict[str, int | None]:
        return {"none": None, "mean": config.hidden_size}

    def run(self, images: Tensor, **more: Any) -> tuple[Tensor, Any]:
        tokens, output = super().run(images)
        return tokens.flatten(1, 2), output

    def source(self, block: Any) -> nn.Module:
        return block.attn.qkv

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.options.facet != "token":
            tensor = tensor.chunk(3, dim=-1)[FACETS.index(self.options.facet)]
            window = block.window_size
            if window > 0:  # the attention sees windows of a padded map
                padded = (-(-grid[0] // window) * window, -(-grid[1] // window) * window)
                tensor = block.window_unpartition(tensor, window, padded, grid)
        return super().take(block, tensor, grid).flatten(1, 2)


class TransformersConvNet(StageBackbone):
    """A convolutional network of transformers (ResNet, ConvNeXt, DINOv3 ConvNeXt): the map of a stage, the last one.

    ``layer`` counts stages and gives their maps as they are; the stride of the stage, measured by a run, is the patch
    size. The summary is the pooled last map.

    Args: As :class:`TransformersViT`; of ``options.layer`` one.
    """

    def __init__(self, name: str, model: Any, options: Options, size: tuple[int, int] | None, **whitening: Any) -> None:
        stages = _module_list(model, len(model.config.depths))
        stage = choose_stage(stages, options, name)
        model.eval()  # normalisation layers must not learn from the run
        with torch.no_grad(), captured(stages) as maps:
            model(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE))
        patch_size, width = PROBE_SIDE // maps[stage].shape[2], maps[-1].shape[1]
        super().__init__(
            name,
            model,
            options,
            stages[stage],
            summaries={"pool": width, "mean": width},
            patch_size=patch_size,
            embed_dim=maps[stage].shape[1],
            input_size=whole_patches(_native_size(name, size or options.img_size), patch_size),
            **whitening,
        )
        self._last_stride = PROBE_SIDE // maps[-1].shape[2]

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        output = self.model(images)
        last = output.last_hidden_state
        if last.ndim == 3:  # DINOv3 ConvNeXt: the pooled token, then the pixels of the map, after the norm
            height, width = size_of(images)
            last = to_map(last[:, 1:], (height // self._last_stride, width // self._last_stride))
        return last, output

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        return output.pooler_output.flatten(1)


FAMILIES: dict[str, type[TransformersViT] | type[TransformersConvNet]] = {
    "clip_vision_model": ClipViT,
    "convnext": TransformersConvNet,
    "convnextv2": TransformersConvNet,
    "deit": TransformersViT,
    "dinov2": DinoV2ViT,
    "dinov2_with_registers": DinoV2ViT,
    "dinov3_convnext": TransformersConvNet,
    "dinov3_vit": DinoV3ViT,
    "resnet": TransformersConvNet,
    "sam_vision_model": SamViT,
    "siglip2_vision_model": NaFlexViT,
    "siglip_vision_model": SiglipViT,
    "vit": TransformersViT,
    "vit_mae": MaskedAutoencoderViT,
}


class _Resampling(nn.Module):
    """A model that is asked to resample its positions at every call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images, interpolate_pos_encoding=True)


def _module_list(model: nn.Module, length: int) -> list[nn.Module]:
    """The outermost list of as many blocks as the configuration names."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == length))


def _native_size(name: str, size: Any) -> tuple[int, int]:
    if size is None:
        raise ConfigError(f"backbone {name!r} does not say its native size; give img_size, such as ?img_size=224")
    return pair(size)


def _read_config(transformers: Any, name: str, source: str, options: Options) -> tuple[str, Any]:
    """Read the configuration, with its place: of the model, or of the weights where the model has none at hand."""
    if not source:
        raise ConfigError("hf: needs a model, such as hf:google/siglip2-base-patch16-224, or a directory")
    if os.path.isfile(source):
        raise ConfigError(f"backbone {name!r}: {source!r} is a file; give its directory, or hf:MODEL?weights={source}")
    if not os.path.isdir(source) and not re.fullmatch(HUB_NAME, source):
        raise ConfigError(f"backbone {name!r}: there is no directory {source!r}; on the hub, names are ORG/MODEL")
    places, trust = [source], options.trust
    if options.weights is not None and os.path.isfile(os.path.join(options.weights, "config.json")):
        places.append(options.weights)
    complete = len(places) > 1
    facts: dict[str, Any] = {}
    reason: Exception = FileNotFoundError("it has no config.json")
    for place in places:
        try:
            facts, _ = transformers.PretrainedConfig.get_config_dict(place, local_files_only=complete)
        except (OSError, ValueError) as error:
            reason = error
        if facts:
            break
    if not facts and os.path.isdir(source):
        raise ConfigError(f"{source!r} has no config.json that transformers can read; save_pretrained writes one")
    if not facts:
        raise _not_at_hand(name, source, reason) from reason
    check_version(transformers, name, SINCE.get(str(facts.get("model_type"))))
    if "auto_map" in facts and not trust and facts.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"backbone {name!r} brings model code of its own, which would run on this machine; read it, then allow it "
            f"with {name}{'&' if '?' in name else '?'}trust=true"
        )
    try:
        read = transformers.AutoConfig.from_pretrained
        return place, read(place, trust_remote_code=trust, local_files_only=complete)
    except Exception as error:  # whatever values of another kind lead to
        raise ConfigError(f"transformers cannot read the configuration of {name!r}: {first_line(error)}") from error


def _build_model(
    transformers: Any, name: str, place: str, config: Any, vision: Any, foreign: bool, options: Options
) -> nn.Module:
    """The vision model in float32, with weights or seeded random ones."""
    arguments: dict[str, Any] = {"dtype": torch.float32}
    if foreign:
        kind = transformers.AutoModel
        arguments["trust_remote_code"] = options.trust
    else:
        kind = transformers.MODEL_MAPPING.get(type(vision), None)
        if kind is None:
            raise ConfigError(
                f"transformers has no model without a head for {name!r} ({vision.model_type}); wrap one with "
                f"featsharp.backbones.from_callable"
            )
        kind = kind[0] if isinstance(kind, tuple) else kind
        projects = config.model_type == "clip" or "CLIPVisionModelWithProjection" in (config.architectures or ())
        if projects and (options.project or options.summary not in ("cls", "mean", "none")):
            kind = transformers.CLIPVisionModelWithProjection
            vision.projection_dim = config.projection_dim
        arguments["add_pooling_layer"] = False
    with seeded_weights():
        if options.pretrained:
            if vision is not config:
                arguments["key_mapping"] = TOWER_KEYS
            return _load(kind, name, options.weights or place, vision, arguments)
        create = kind.from_config if kind is transformers.AutoModel else kind._from_config
        try:
            return call_leaving_out(create, LATER_ARGUMENTS, config=vision, **arguments)
        except Exception as error:  # whatever values that do not fit lead to
            raise ConfigError(
                f"transformers cannot build {name!r} from its configuration at {place!r}: {first_line(error)}"
            ) from error


def _load(kind: Any, name: str, place: str, config: Any, arguments: dict[str, Any]) -> nn.Module:
    """The model with all its weights from ``place``: a hub name, a directory, or a file.

    Keys that the model has no use for are passed over: the checkpoint may hold heads and a language model.
    """
    file = os.path.isfile(place)
    if file:
        arguments = {**arguments, "state_dict": read_state_dict(place)}
    try:
        model, report = call_leaving_out(
            kind.from_pretrained,
            LATER_ARGUMENTS,
            pretrained_model_name_or_path=None if file else place,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, with the missing ones
            **arguments,
        )
    except OSError as error:
        raise _not_at_hand(name, place, error) from error
    except Exception as error:  # whatever reading a foreign file raises, the message has to name it
        raise CheckpointError(f"the weights of {name!r} at {place!r} cannot be read: {first_line(error)}") from error
    missing, spare = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(
        f"{key} {'x'.join(map(str, given))}, not {'x'.join(map(str, wanted))}"
        for key, given, wanted in report["mismatched_keys"]
    )
    if missing or mismatched:
        raise CheckpointError(
            f"the weights at {place!r} are not those of a {type(model).__name__} as {name!r} has it: "
            f"missing {shorten(missing)}; of another shape {shorten(mismatched)}; without use {shorten(spare)}"
        )
    return model


def _not_at_hand(name: str, source: str, error: Exception) -> MissingDependencyError:
    if os.path.isdir(source):
        return MissingDependencyError(
            f"directory {source!r} has no weights of backbone {name!r} ({first_line(error)}); put them there, give "
            f"weights=FILE, or take random ones: pretrained=false"
        )
    return cannot_fetch(name, error, f"hf download {source} (or copy the files and name their place, hf:DIRECTORY)")
