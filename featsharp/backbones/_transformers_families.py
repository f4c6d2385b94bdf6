"""Models of Hugging Face transformers as backbones, family by family.

Shapes:
    tokens [B, P + h * w, C]: P prefix tokens (class token first, then registers), then patches row by row.

Convention:
    Sizes other than the native one resample the position embedding as transformers does: bicubic, not antialiased,
    half-pixel centres; SigLIP2 NaFlex: bilinear, antialiased. At the size of the stored table it is added itself.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput, embeds_patches
from featsharp.backbones.options import Options
from featsharp.backbones.tokens import FACETS, TokenBackbone, captured, chosen_stage, chosen_summary, to_map
from featsharp.errors import ConfigError
from featsharp.ops.resize import size_of

DEFAULTS = Options()
# The linear layers of an attention, by the names that transformers gives them.
PROJECTIONS = {"query": ("q_proj", "query"), "key": ("k_proj", "key"), "value": ("v_proj", "value")}
# A side that the strides of all convolutional networks divide.
PROBE_SIDE = 128


@dataclass(frozen=True)
class Preprocessing:
    """Whitening and size of a model's image processor, for pixels in [0, 1].

    Attributes:
        mean, std: Whitening, three values each.
        size: (h, w) in pixels that it makes; None when it does not say.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None


class TransformersViT(TokenBackbone):
    """A vision transformer of transformers: its last patch tokens after the final norm (ViT, DeiT, DINOv2, DINOv3).

    Patch size, width, blocks and the size of the position table are read from the model. The native size is that of the
    image processor, in whole patches: a 384-pixel model with 14-pixel patches is native at 27 patches, 378 pixels.

    Args:
        name: The name of ``create_backbone``, or a label.
        model: The vision model, with weights.
        preprocessing: Whitening and native size.
        choices: Layer, facet, projection, summary and size.

    Raises:
        ConfigError: For a choice that this model does not have, or patches that are not square.
    """

    final_norm: str | None = "layernorm"
    # Whether positions are resampled for other grids.
    resamples: bool = True

    def __init__(self, name: str, model: nn.Module, preprocessing: Preprocessing, choices: Options = DEFAULTS) -> None:
        _check_projection(name, model, choices)
        trunk = self.trunk_of(model)
        config = trunk.config
        patch_size, width = _patch_size(name, config), config.hidden_size
        table = self.table_size(config)
        # To resample its table, transformers makes it a square first.
        flexible = self.resamples and table[0] == table[1]
        own_size = (preprocessing.size if flexible else None) or table
        head: Any = getattr(model, "visual_projection", None)
        super().__init__(
            name,
            model,
            choices,
            _module_list(trunk, config.num_hidden_layers),
            width=width,
            summaries=self.summaries(config, None if head is None else head.out_features),
            head_width=0 if head is None else head.out_features,
            patch_size=patch_size,
            input_size=_native_size(name, patch_size, own_size, choices.img_size, flexible),
            mean=preprocessing.mean,
            std=preprocessing.std,
            flexible=flexible,
        )
        self.trunk: Any = trunk
        self.embeds_patches = any(embeds_patches(layer, patch_size) for layer in trunk.modules())
        takes_flag = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self._arguments: dict[str, Any] = {"interpolate_pos_encoding": True} if takes_flag and flexible else {}

    @classmethod
    def trunk_of(cls, model: Any) -> Any:
        """The part of ``model`` that has ``config``, blocks and norm as its own."""
        return getattr(model, "vision_model", model)

    @classmethod
    def table_size(cls, config: Any) -> tuple[int, int]:
        """(h, w) in pixels of the images that the position table is for."""
        return pair(config.image_size)

    @classmethod
    def summaries(cls, config: Any, projected: int | None) -> dict[str, int | None]:
        """Channels of the summaries that this model has, its default first; the mean is that of its last tokens."""
        return {"cls": config.hidden_size, "mean": config.hidden_size}

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        output = self.model(images, **self._arguments)
        return output.last_hidden_state, output

    def norm(self, tokens: Tensor) -> Tensor:
        return tokens if self.final_norm is None else getattr(self.trunk, self.final_norm)(tokens)

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

    def facet_width(self, block: Any) -> int:
        width: Any = self.source(block).out_features
        return int(width)

    def summarise(self, kind: str, tokens: Tensor, output: Any, num_patches: int) -> Tensor:
        if kind == "mean":
            return tokens[:, -num_patches:].mean(dim=1)
        if kind == "cls":
            return tokens[:, 0]
        return output.pooler_output if kind == "pool" else output.image_embeds


class DinoV3ViT(TransformersViT):
    """DINOv3: rotary positions, so every grid is as native as another; the facets are taken before the rotation."""

    final_norm = "norm"


class MaskedAutoencoderViT(TransformersViT):
    """The encoder of a masked autoencoder that masks nothing and leaves the patches in their order."""

    def __init__(self, name: str, model: nn.Module, preprocessing: Preprocessing, choices: Options = DEFAULTS) -> None:
        super().__init__(name, model, preprocessing, choices)
        self.trunk.config.mask_ratio = 0.0

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        rows, columns = self.grid_size(size_of(images))
        # The encoder keeps, and sorts by, the smallest noise.
        order = torch.arange(rows * columns, device=images.device).expand(len(images), -1)
        output = self.model(images, noise=order, **self._arguments)
        return output.last_hidden_state, output


class ClipViT(TransformersViT):
    """The vision tower of CLIP.

    transformers applies the final norm to the class token only; here it goes over the patch tokens too, as in
    open_clip, because the head behind it (``project``) expects its output. The summary is the projected class token
    where the checkpoint has the projection, else the class token.
    """

    final_norm = "post_layernorm"

    @classmethod
    def summaries(cls, config: Any, projected: int | None) -> dict[str, int | None]:
        own: dict[str, int | None] = {} if projected is None else {"projected": projected}
        return own | super().summaries(config, projected)

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        tokens, output = super().run(images)
        return self.norm(tokens), output


class SiglipViT(TransformersViT):
    """The vision tower of SigLIP and of what is built on it (SigLIP2 of fixed size, PaliGemma): no class token.

    The summary is the output of the attention pool, where the tower has one.
    """

    final_norm = "post_layernorm"

    @classmethod
    def summaries(cls, config: Any, projected: int | None) -> dict[str, int | None]:
        width = config.hidden_size
        return {**({"pool": width} if config.vision_use_head else {}), "none": None, "mean": width}


class NaFlexViT(SiglipViT):
    """SigLIP2 NaFlex: images of any aspect ratio as sequences of flattened patches.

    The images of a batch have one size, so there is no padding, and attention without a mask is exact.
    """

    def __init__(self, name: str, model: nn.Module, preprocessing: Preprocessing, choices: Options = DEFAULTS) -> None:
        super().__init__(name, model, preprocessing, choices)
        self.embeds_patches = True  # by a linear layer

    @classmethod
    def table_size(cls, config: Any) -> tuple[int, int]:
        side = int(config.num_patches**0.5) * config.patch_size
        return side, side

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        rows, columns = self.grid_size(size_of(images))
        p = self.patch_size
        cells = images.reshape(len(images), 3, rows, p, columns, p)
        patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(len(images), rows * columns, 3 * p * p)
        shapes = torch.tensor([[rows, columns]]).expand(len(images), 2)
        output = self.model(pixel_values=patches, pixel_attention_mask=None, spatial_shapes=shapes)
        return output.last_hidden_state, output


class SamViT(TransformersViT):
    """The image encoder of SAM at its one size: the tokens of the last block, before the neck. It has no summary."""

    final_norm = None
    resamples = False

    def __init__(self, name: str, model: nn.Module, preprocessing: Preprocessing, choices: Options = DEFAULTS) -> None:
        self.trunk_of(model).neck = nn.Identity()
        super().__init__(name, model, preprocessing, choices)

    @classmethod
    def trunk_of(cls, model: Any) -> Any:
        return model.vision_encoder

    @classmethod
    def summaries(cls, config: Any, projected: int | None) -> dict[str, int | None]:
        return {"none": None, "mean": config.hidden_size}

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        tokens, output = super().run(images)
        return tokens.flatten(1, 2), output

    def source(self, block: Any) -> nn.Module:
        return block.attn.qkv

    def facet_width(self, block: Any) -> int:
        return self.trunk_of(self.model).config.hidden_size

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.options.facet != "token":
            tensor = tensor.chunk(3, dim=-1)[FACETS.index(self.options.facet)]
            window = block.window_size
            if window > 0:  # the attention sees windows of a padded map
                padded = (-(-grid[0] // window) * window, -(-grid[1] // window) * window)
                tensor = block.window_unpartition(tensor, window, padded, grid)
        return tensor.flatten(1, 2)


class TransformersConvNet(Backbone):
    """A convolutional network of transformers (ResNet, ConvNeXt, DINOv3 ConvNeXt): the map of a stage, the last one.

    ``layer`` counts stages and gives their maps as they are; the stride of the stage, found by running it, is the patch
    size. The summary is the pooled last map.

    Args:
        name, model, preprocessing, choices: As for :class:`TransformersViT`.

    Raises:
        ConfigError: For a choice that such a network does not have, or stages of several strides.
    """

    def __init__(self, name: str, model: nn.Module, preprocessing: Preprocessing, choices: Options = DEFAULTS) -> None:
        _check_projection(name, model, choices)
        stages = _module_list(model, len(model.config.depths))  # type: ignore[union-attr, arg-type]
        stage = chosen_stage(stages, choices, name)
        maps = _stage_maps(model, stages)
        patch_size = PROBE_SIDE // maps[stage].shape[2]
        super().__init__(
            name,
            patch_size=patch_size,
            embed_dim=maps[stage].shape[1],
            input_size=_native_size(name, patch_size, preprocessing.size, choices.img_size, True),
            mean=preprocessing.mean,
            std=preprocessing.std,
        )
        self.model: Any = model
        self._last_stride = PROBE_SIDE // maps[-1].shape[2]
        self._stages = [] if choices.layer is None else [stages[stage]]
        self.summary_kind = chosen_summary(name, choices.summary, {"pool": None})
        self.summary_dim = None if self.summary_kind == "none" else maps[-1].shape[1]
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        with captured(self._stages) as taken:
            output = self.model(images)
        last = output.last_hidden_state
        if last.ndim == 3:  # DINOv3 ConvNeXt: the pooled token, then the pixels of the map, after the norm
            height, width = size_of(images)
            last = to_map(last[:, 1:], (height // self._last_stride, width // self._last_stride))
        summary = None
        if self.summary_kind == "pool":
            summary = output.pooler_output.flatten(1)
        elif self.summary_kind == "mean":
            summary = last.mean(dim=(2, 3))
        return BackboneOutput(taken[0] if taken else last, summary)


FAMILIES: dict[str, type[TransformersViT] | type[TransformersConvNet]] = {
    "clip_vision_model": ClipViT,
    "convnext": TransformersConvNet,
    "convnextv2": TransformersConvNet,
    "deit": TransformersViT,
    "dinov2": TransformersViT,
    "dinov2_with_registers": TransformersViT,
    "dinov3_convnext": TransformersConvNet,
    "dinov3_vit": DinoV3ViT,
    "resnet": TransformersConvNet,
    "sam_vision_model": SamViT,
    "siglip2_vision_model": NaFlexViT,
    "siglip_vision_model": SiglipViT,
    "vit": TransformersViT,
    "vit_mae": MaskedAutoencoderViT,
}


def _native_size(
    name: str, patch_size: int, own: tuple[int, int] | None, asked: tuple[int, int] | None, flexible: bool
) -> tuple[int, int]:
    """Choose the native size: the one asked for, which has to be whole patches, else the model's in whole patches."""
    if own is not None:
        own = max(1, own[0] // patch_size) * patch_size, max(1, own[1] // patch_size) * patch_size
    if asked is None:
        if own is None:
            raise ConfigError(f"backbone {name!r} does not say its native size; give img_size, such as ?img_size=224")
        return own
    if not flexible and own is not None and asked != own:
        raise ConfigError(
            f"backbone {name!r} takes {own[0]}x{own[1]} pixels only; got img_size={asked[0]}x{asked[1]}. "
            f"other_sizes=tile covers larger images"
        )
    fitted = max(1, round(asked[0] / patch_size)) * patch_size, max(1, round(asked[1] / patch_size)) * patch_size
    if asked != fitted:
        raise ConfigError(
            f"img_size of {name!r} has to be whole patches of {patch_size}; got {asked[0]}x{asked[1]}, the nearest is "
            f"{fitted[0]}x{fitted[1]}"
        )
    return asked


def _check_projection(name: str, model: nn.Module, choices: Options) -> None:
    if choices.project and not hasattr(model, "visual_projection"):
        raise ConfigError(
            f"backbone {name!r} has no projection into the space of text; leave out project, or take a checkpoint of "
            f"CLIPModel or CLIPVisionModelWithProjection"
        )
    if choices.project and choices.facet != "token":
        raise ConfigError(f"the {choices.facet} of {name!r} has no projection; leave out project or facet")


def _module_list(model: nn.Module, length: int) -> list[nn.Module]:
    """The outermost list of as many blocks as the configuration names."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == length))


def _stage_maps(model: nn.Module, stages: Sequence[nn.Module]) -> list[Tensor]:
    """Compute the map of each stage for a small image; normalisation layers must not learn from it."""
    model.eval()
    with torch.no_grad(), captured(stages) as maps:
        model(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE))
    return maps


def _patch_size(name: str, config: Any) -> int:
    height, width = pair(config.patch_size)
    if height != width:
        raise ConfigError(f"backbone {name!r} has {height}x{width} patches; only square ones work")
    return height


def pair(value: Any) -> tuple[int, int]:
    """A side, or a height and a width, as (h, w)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
