"""What the models of Hugging Face transformers are as backbones, family by family.

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
from featsharp.backbones.blocks import captured, chosen_blocks
from featsharp.backbones.options import Options
from featsharp.errors import ConfigError
from featsharp.ops.resize import size_of

DEFAULTS = Options()
# The linear layers of an attention, by the names that transformers gives them.
PROJECTIONS = {"query": ("q_proj", "query"), "key": ("k_proj", "key"), "value": ("v_proj", "value")}
# A side that the strides of all convolutional networks divide.
PROBE_SIDE = 128


@dataclass(frozen=True)
class Preprocessing:
    """What a model's image processor does to pixels in [0, 1].

    Attributes:
        mean, std: Whitening, three values each.
        size: (h, w) in pixels that it makes; None when it does not say.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None


class TransformersViT(Backbone):
    """A vision transformer of transformers: its last patch tokens after the final norm (ViT, DeiT, DINOv2, DINOv3).

    Patch size, width, blocks and the size of the position table are read from the model. The native size is that of the
    image processor, in whole patches: a 384-pixel model with 14-pixel patches is native at 27 patches, 378 pixels.

    Args:
        name: What ``create_backbone`` builds it from, or a label.
        model: The vision model, with weights.
        preprocessing: Whitening and native size.
        choices: Layers, facet, projection, summary and size; see :class:`featsharp.backbones.options.Options`.

    Raises:
        ConfigError: For a choice that this model does not have, or patches that are not square.
    """

    final_norm: str | None = "layernorm"
    # Whether positions are resampled for other grids.
    resamples: bool = True

    def __init__(self, name: str, model: nn.Module, preprocessing: Preprocessing, choices: Options = DEFAULTS) -> None:
        _check_projection(name, model, choices)
        config = self.trunk_of(model).config
        patch_size = _patch_size(name, config)
        table = self.table_size(config)
        # To resample its table, transformers makes it a square first.
        flexible = self.resamples and table[0] == table[1]
        own_size = (preprocessing.size if flexible else None) or table
        super().__init__(
            name,
            patch_size=patch_size,
            embed_dim=config.hidden_size,
            input_size=_native_size(name, patch_size, own_size, choices.img_size, flexible),
            mean=preprocessing.mean,
            std=preprocessing.std,
            flexible=flexible,
        )
        self.model: Any = model
        self.trunk: Any = self.trunk_of(model)
        self.facet, self.project = choices.facet, choices.project
        blocks = _module_list(self.trunk, config.num_hidden_layers)
        self.layers = chosen_blocks(blocks, choices.layer, name)
        # The model itself ends with the last block and the norm.
        self.takes_end = choices.layer is None and self.facet == "token"
        self._blocks = [] if self.takes_end else [blocks[layer] for layer in sorted(set(self.layers))]
        self._taps = self._blocks if self.facet == "token" else [self._projection(block) for block in self._blocks]
        self.embed_dim = len(self.layers) * self._width()
        self.summary = _chosen_summary(name, choices.summary, self.summaries())
        self.summary_dim = self._summary_width()
        self.embeds_patches = any(embeds_patches(layer, patch_size) for layer in self.trunk.modules())
        takes_flag = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self._arguments: dict[str, Any] = {"interpolate_pos_encoding": True} if takes_flag and flexible else {}
        self.freeze()

    @classmethod
    def trunk_of(cls, model: Any) -> Any:
        """The part of ``model`` that has ``config``, blocks and norm as its own."""
        return getattr(model, "vision_model", model)

    @classmethod
    def table_size(cls, config: Any) -> tuple[int, int]:
        """(h, w) in pixels of the images that the position table is for."""
        return pair(config.image_size)

    def summaries(self) -> list[str]:
        """The kinds of summary that this model has, its default first."""
        return ["cls", "mean", "none"]

    def extract(self, images: Tensor) -> BackboneOutput:
        grid = self.grid_size(size_of(images))
        num_patches = grid[0] * grid[1]
        with captured(self._taps) as taken:
            output = self.run(images)
        tokens = self.last_tokens(output)
        if self.takes_end:
            parts = [self._aligned(tokens[:, -num_patches:])]
        else:
            of_layer = {
                layer: self._finished(self.as_tokens(block, tensor, grid)[:, -num_patches:])
                for layer, block, tensor in zip(sorted(set(self.layers)), self._blocks, taken, strict=True)
            }
            parts = [of_layer[layer] for layer in self.layers]
        features = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        summary = self._summarise(output, tokens, num_patches)
        return BackboneOutput(features.transpose(1, 2).unflatten(2, grid), summary)

    def run(self, images: Tensor) -> Any:
        """The model's own output."""
        return self.model(images, **self._arguments)

    def last_tokens(self, output: Any) -> Tensor:
        """All tokens [B, P + h * w, C] of the last block after the final norm."""
        return output.last_hidden_state

    def as_tokens(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, P + h * w, C] from what ``block``, or the projection in its attention, returned."""
        return tensor

    def _projection(self, block: nn.Module) -> nn.Linear:
        """The layer of ``block`` that makes the facet."""
        names = PROJECTIONS[self.facet]
        for path, module in block.named_modules():
            if path.rpartition(".")[2] in names and isinstance(module, nn.Linear):
                return module
        raise ConfigError(
            f"backbone {self.name!r} has no facet {self.facet!r}: no layer of {type(block).__name__} is called "
            f"{' or '.join(names)}; leave out facet"
        )

    def _width(self) -> int:
        """Channels of the features of one layer."""
        return self.embed_dim if self.facet == "token" else self._projection(self._blocks[0]).out_features

    def _finished(self, tokens: Tensor) -> Tensor:
        """Tokens of a block as the model would end with them; facets stay as they are."""
        return self._aligned(self._normalised(tokens)) if self.facet == "token" else tokens

    def _normalised(self, tokens: Tensor) -> Tensor:
        return tokens if self.final_norm is None else getattr(self.trunk, self.final_norm)(tokens)

    def _aligned(self, tokens: Tensor) -> Tensor:
        """In the space of text, where asked for."""
        return self.model.visual_projection(tokens) if self.project else tokens

    def _summarise(self, output: Any, tokens: Tensor, num_patches: int) -> Tensor | None:
        if self.summary == "cls":
            return tokens[:, 0]
        if self.summary == "pool":
            return output.pooler_output
        if self.summary == "projected":
            return output.image_embeds
        if self.summary == "mean":
            return tokens[:, -num_patches:].mean(dim=1)
        return None

    def _summary_width(self) -> int | None:
        if self.summary == "projected":
            return self.model.visual_projection.out_features
        return None if self.summary == "none" else self.trunk.config.hidden_size


class DinoV3ViT(TransformersViT):
    """DINOv3: rotary positions, so every grid is as native as another; the facets are taken before the rotation."""

    final_norm = "norm"


class MaskedAutoencoderViT(TransformersViT):
    """The encoder of a masked autoencoder that masks nothing and leaves the patches in their order."""

    def __init__(self, name: str, model: nn.Module, preprocessing: Preprocessing, choices: Options = DEFAULTS) -> None:
        super().__init__(name, model, preprocessing, choices)
        self.trunk.config.mask_ratio = 0.0

    def run(self, images: Tensor) -> Any:
        rows, columns = self.grid_size(size_of(images))
        # The encoder keeps, and sorts by, the smallest noise.
        order = torch.arange(rows * columns, device=images.device).expand(len(images), -1)
        return self.model(images, noise=order, **self._arguments)


class ClipViT(TransformersViT):
    """The vision tower of CLIP.

    transformers applies the final norm to the class token only; here it goes over the patch tokens too, as in
    open_clip, because the head behind it (``project``) expects its output. The summary is the projected class token
    where the checkpoint has the projection, else the class token.
    """

    final_norm = "post_layernorm"

    def summaries(self) -> list[str]:
        projected = ["projected"] if hasattr(self.model, "visual_projection") else []
        return [*projected, "cls", "mean", "none"]

    def last_tokens(self, output: Any) -> Tensor:
        return self._normalised(output.last_hidden_state)

    def _width(self) -> int:
        return self.model.visual_projection.out_features if self.project else super()._width()


class SiglipViT(TransformersViT):
    """The vision tower of SigLIP and of what is built on it (SigLIP2 of fixed size, PaliGemma): no class token.

    The summary is the output of the attention pool, where the tower has one.
    """

    final_norm = "post_layernorm"

    def summaries(self) -> list[str]:
        return [*(["pool"] if self.trunk.config.vision_use_head else []), "none", "mean"]


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

    def run(self, images: Tensor) -> Any:
        rows, columns = self.grid_size(size_of(images))
        p = self.patch_size
        cells = images.reshape(len(images), 3, rows, p, columns, p)
        patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(len(images), rows * columns, 3 * p * p)
        shapes = torch.tensor([[rows, columns]]).expand(len(images), 2)
        return self.model(pixel_values=patches, pixel_attention_mask=None, spatial_shapes=shapes)


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

    def summaries(self) -> list[str]:
        return ["none", "mean"]

    def last_tokens(self, output: Any) -> Tensor:
        return output.last_hidden_state.flatten(1, 2)

    def as_tokens(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.facet != "token":
            tensor = tensor.chunk(3, dim=-1)[list(PROJECTIONS).index(self.facet)]
            window = block.window_size
            if window > 0:  # the attention sees windows of a padded map
                padded = (-(-grid[0] // window) * window, -(-grid[1] // window) * window)
                tensor = block.window_unpartition(tensor, window, padded, grid)
        return tensor.flatten(1, 2)

    def _projection(self, block: nn.Module) -> nn.Linear:
        return block.attn.qkv  # type: ignore[union-attr, return-value]

    def _width(self) -> int:
        return self.trunk.config.hidden_size


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
        if choices.facet != "token":
            raise ConfigError(f"backbone {name!r} is a convolutional network without attention; leave out facet")
        stages = _module_list(model, len(model.config.depths))  # type: ignore[union-attr, arg-type]
        layers = chosen_blocks(stages, choices.layer, name)
        maps = _stage_maps(model, stages)
        strides = {layer: PROBE_SIDE // maps[layer].shape[2] for layer in layers}
        if len(set(strides.values())) > 1:
            found = ", ".join(f"{stride} in stage {layer}" for layer, stride in strides.items())
            raise ConfigError(f"the stages of {name!r} differ in stride ({found}); choose one")
        patch_size = strides[layers[0]]
        super().__init__(
            name,
            patch_size=patch_size,
            embed_dim=sum(maps[layer].shape[1] for layer in layers),
            input_size=_native_size(name, patch_size, preprocessing.size, choices.img_size, True),
            mean=preprocessing.mean,
            std=preprocessing.std,
        )
        self.model: Any = model
        self.layers = layers
        self.takes_end = choices.layer is None
        self._last_stride = PROBE_SIDE // maps[-1].shape[2]
        self._stages = [] if self.takes_end else [stages[layer] for layer in sorted(set(layers))]
        self.summary = _chosen_summary(name, choices.summary, ["pool", "mean", "none"])
        self.summary_dim = None if self.summary == "none" else maps[-1].shape[1]
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        with captured(self._stages) as taken:
            output = self.model(images)
        last = output.last_hidden_state
        if last.ndim == 3:  # DINOv3 ConvNeXt: the pooled token, then the pixels of the map, after the norm
            height, width = size_of(images)
            last = last[:, 1:].transpose(1, 2).unflatten(2, (height // self._last_stride, width // self._last_stride))
        if self.takes_end:
            features = last
        else:
            of_layer = dict(zip(sorted(set(self.layers)), taken, strict=True))
            features = torch.cat([of_layer[layer] for layer in self.layers], dim=1)
        summary = None
        if self.summary == "pool":
            summary = output.pooler_output.flatten(1)
        elif self.summary == "mean":
            summary = last.mean(dim=(2, 3))
        return BackboneOutput(features, summary)


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
    """What is asked for, which has to be whole patches, else its own size in whole patches."""
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


def _chosen_summary(name: str, asked: str, kinds: Sequence[str]) -> str:
    if asked == "default":
        return kinds[0]
    if asked not in kinds:
        raise ConfigError(f"backbone {name!r} has no summary {asked!r}; it has {', '.join(kinds)}")
    return asked


def _module_list(model: nn.Module, length: int) -> list[nn.Module]:
    """The outermost list of as many blocks as the configuration names."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == length))


def _stage_maps(model: nn.Module, stages: Sequence[nn.Module]) -> list[Tensor]:
    """What each stage makes of a small image; normalisation layers must not learn from it."""
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
