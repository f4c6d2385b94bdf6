"""The visual towers of open_clip as backbones: OpenAI-style transformers, CLIP ResNets, trunks of timm.

Shapes:
    tokens [B, P + h * w, C]: P prefix tokens (class token first), then patches row by row.

Only the visual tower is run. Text-aligned features (``project=true``, one name for three kinds of head) are always what
the model's own head makes of one patch alone: for a linear head each normalised patch token times the projection, for
an attention pool its value path, the softmax over a single token being 1 ("Extract Free Dense Labels from CLIP",
MaskCLIP, arXiv 2112.01071). They lie in the space of the text embeddings. Bilinear upsampling commutes with a linear
head, so there projecting before or after makes no difference.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput, embeds_patches
from featsharp.backbones.blocks import captured, chosen_blocks
from featsharp.backbones.options import Options
from featsharp.errors import ConfigError
from featsharp.ops.resize import size_of

FACETS = ("query", "key", "value")
STRIDE = 32  # of the last stage of a CLIP ResNet


class TransformerTower(Backbone):
    """``open_clip.VisionTransformer``: the transformer of OpenAI's CLIP and its many relatives.

    Features are the patch tokens after ``ln_post``; with a CoCa attention pool after the norm in front of that pool.
    The summary is the projected image embedding, or by name the class token after the same norm ("cls"), the pooled
    token before the projection ("pool"), the patch mean, or none.

    Other sizes resample the grid of the position table (bicubic, antialiased, half-pixel centres) as open_clip itself
    does to a table of another grid when it loads a checkpoint; the table stays as it is, and at the native size it is
    added itself.

    ``facet=value`` with ``project=true`` is MaskCLIP (arXiv 2112.01071): the value path of the block instead of its
    attention, ``proj(ln_post(out_proj(value)))``. ``project=true`` alone takes the tokens of the block. The value path
    usually is the better one for open-vocabulary segmentation, since CLIP trained only its class token to be aligned.

    Args:
        name: A label.
        visual: ``open_clip.create_model(...).visual`` of this class.
        choices: Layers, facet, projection and summary.
        mean, std: Whitening.
    """

    def __init__(
        self, name: str, visual: nn.Module, choices: Options, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        tower: Any = visual
        blocks = tower.transformer.resblocks
        if tower.patch_size[0] != tower.patch_size[1]:
            raise ConfigError(f"backbone {name!r} has {tower.patch_size[0]}x{tower.patch_size[1]} patches, not square")
        if choices.project and choices.facet in ("query", "key"):
            raise ConfigError(f"backbone {name!r}: project goes with facet token or value; got {choices.facet!r}")
        if choices.project and tower.attn_pool is not None:
            raise ConfigError(
                f"backbone {name!r} pools with learned queries, which give patches no place in the space of its text; "
                f"leave out project"
            )
        layers = chosen_blocks(blocks, choices.layer, name)
        width = tower.proj.shape[1] if choices.project else tower.conv1.out_channels
        patch_size = tower.patch_size[0]
        summary_dims = {
            "default": tower.proj.shape[1],
            "projected": tower.proj.shape[1],
            "pool": tower.proj.shape[0],
            "cls": tower.conv1.out_channels,
            "mean": width * len(layers),
            "none": None,
        }
        super().__init__(
            name,
            patch_size=patch_size,
            embed_dim=width * len(layers),
            input_size=tuple(side * patch_size for side in tower.grid_size),
            mean=tuple(mean),
            std=tuple(std),
            summary_dim=summary_dims[choices.summary],
        )
        self.visual: Any = visual
        self.choices, self.layers = choices, layers
        self.embeds_patches = embeds_patches(tower.conv1, patch_size)
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        grid = self.grid_size(size_of(images))
        blocks, token = self.visual.transformer.resblocks, self.choices.facet == "token"
        # A token of block n is what enters block n + 1; a facet is made from what enters block n.
        wanted = {layer + token for layer in self.layers}
        to_end = self.choices.summary not in ("none", "mean")
        depth = len(blocks) if to_end else max(wanted)
        entering: dict[int, Tensor] = {}
        x = self._embed(images, grid)
        for number, block in enumerate(blocks[:depth]):
            if number in wanted:
                entering[number] = x
            x = block(x)
        entering[depth] = x
        parts = [self._patches(layer, entering[layer + token][:, 1:]) for layer in self.layers]
        features = to_map(parts[0] if len(parts) == 1 else torch.cat(parts, -1), grid)
        return BackboneOutput(features, self._summary(x, features))

    def _embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        visual = self.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        positions = resample_positions(visual.positional_embedding, visual.grid_size, grid)
        return visual.ln_pre(torch.cat([first, patches], 1) + positions.to(patches.dtype))

    def _norm(self, tokens: Tensor) -> Tensor:
        pool = self.visual.attn_pool
        return self.visual.ln_post(tokens) if pool is None else pool.ln_k(tokens)

    def _patches(self, layer: int, tokens: Tensor) -> Tensor:
        """What was asked for of the patch tokens that ``entering`` holds for a layer."""
        facet, project = self.choices.facet, self.choices.project
        if facet != "token":
            block = self.visual.transformer.resblocks[layer]
            attention, part = block.attn, FACETS.index(facet)
            bias = attention.in_proj_bias
            tokens = F.linear(
                block.ln_1(tokens),
                attention.in_proj_weight.chunk(3)[part],
                None if bias is None else bias.chunk(3)[part],
            )
            if not project:
                return tokens
            tokens = attention.out_proj(tokens)
        tokens = self._norm(tokens)
        return tokens @ self.visual.proj if project else tokens

    def _summary(self, x: Tensor, features: Tensor) -> Tensor | None:
        kind = self.choices.summary
        if kind == "none":
            return None
        if kind == "mean":
            return features.mean((2, 3))
        if kind == "cls":
            return self._norm(x[:, 0])
        pooled = self.visual._pool(x)[0]
        return pooled if kind == "pool" else pooled @ self.visual.proj


class ResNetTower(Backbone):
    """``open_clip.ModifiedResNet``: the ResNet of OpenAI's CLIP, with an attention pool in place of the mean.

    Features are the map of the last stage (stride 32), or of one other (``layer=0`` to 3, stride 4 to 32);
    ``project=true`` sends each place of the last through the value path of the pool. The summary is the pool's output,
    which is the projected embedding. At other sizes the positions of the pool are resampled as those of a transformer;
    the maps need none.
    """

    def __init__(
        self, name: str, visual: nn.Module, choices: Options, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        tower: Any = visual
        stages = [tower.layer1, tower.layer2, tower.layer3, tower.layer4]
        stage = _one_stage(name, stages, choices)
        if choices.project and stage != len(stages) - 1:
            raise ConfigError(f"backbone {name!r} projects its last stage, {len(stages) - 1}; got layer={stage}")
        width = tower.output_dim if choices.project else stages[stage][-1].conv3.out_channels
        if choices.summary == "cls":
            raise ConfigError(f"backbone {name!r} has no class token; its summaries are projected, mean and none")
        super().__init__(
            name,
            patch_size=4 * 2**stage,
            embed_dim=width,
            input_size=(tower.image_size // STRIDE * STRIDE,) * 2,
            mean=tuple(mean),
            std=tuple(std),
            summary_dim={"none": None, "mean": width}.get(choices.summary, tower.output_dim),
        )
        self.visual: Any = visual
        self.choices, self.stage = choices, stage
        self.pool_grid = (tower.image_size // STRIDE,) * 2
        self.freeze()

    def fit_size(self, height: float, width: float) -> tuple[int, int]:
        """The nearest multiple of 32 pixels, also where an earlier stage gives the features: later ones are pooled."""
        super().fit_size(height, width)
        return whole_cells(height, STRIDE), whole_cells(width, STRIDE)

    def extract(self, images: Tensor) -> BackboneOutput:
        visual, kind = self.visual, self.choices.summary
        x = visual.stem(images)
        for number, stage in enumerate([visual.layer1, visual.layer2, visual.layer3, visual.layer4]):
            if number > self.stage and kind in ("none", "mean"):
                break
            x = stage(x)
            if number == self.stage:
                features = x
        if self.choices.project:
            pool = visual.attnpool
            features = pool.c_proj(pool.v_proj(features.movedim(1, -1))).movedim(-1, 1)
        if kind == "none":
            return BackboneOutput(features, None)
        return BackboneOutput(features, features.mean((2, 3)) if kind == "mean" else self._pool(x))

    def _pool(self, x: Tensor) -> Tensor:
        pool, grid = self.visual.attnpool, size_of(x)
        if grid == self.pool_grid:
            return pool(x)
        positions = resample_positions(pool.positional_embedding, self.pool_grid, grid)
        return torch.func.functional_call(pool, {"positional_embedding": positions}, (x,))


class TrunkTower(Backbone):
    """``open_clip.TimmModel``: a trunk of timm under a head of open_clip (SigLIP, EVA, ConvNeXt, FastViT, PE-Core ...).

    Features are what the trunk's ``forward_features`` gives: normalised patch tokens of a transformer, the map of the
    last stage of a convolutional one. The summary is the image embedding, through the heads of both; for SigLIP, which
    projects nothing, the output of its attention pool. Positions at other sizes are resampled by timm (bicubic,
    antialiased); a trunk that cannot (relative position tables) takes its own size only.

    Args:
        name: A label.
        visual: ``open_clip.create_model(...).visual`` of this class, its trunk built with ``dynamic_img_size``.
        choices: Layers, facet, projection and summary.
        mean, std: Whitening.
        joint_dim: Channels of the space that images and text share.
    """

    def __init__(
        self,
        name: str,
        visual: nn.Module,
        choices: Options,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        joint_dim: int,
    ) -> None:
        tower: Any = visual
        trunk = tower.trunk
        stride = trunk.feature_info[-1]["reduction"]
        tokens = hasattr(trunk, "num_prefix_tokens")
        has_class_token = tokens and getattr(trunk, "cls_token", None) is not None
        if choices.summary == "cls" and not has_class_token:
            raise ConfigError(f"backbone {name!r} has no class token; take another summary, such as projected or pool")
        if choices.project and choices.facet != "token":
            raise ConfigError(f"backbone {name!r}: project goes with facet token only; got {choices.facet!r}")
        if tokens:
            layers_taken = chosen_blocks(trunk.blocks, choices.layer, name)
            patch_size, width = stride, trunk.num_features
            sources = [_facet_source(name, trunk.blocks[layer], choices.facet) for layer in layers_taken]
        else:
            stages = [trunk.get_submodule(info["module"]) for info in trunk.feature_info]
            stage = _one_stage(name, stages, choices)
            layers_taken, info = [stage], trunk.feature_info[stage]
            # Without a layer the trunk ends as it likes; some add a convolution to their last stage.
            patch_size, width = info["reduction"], trunk.num_features if choices.layer is None else info["num_chs"]
            sources = [stages[stage]]
            if choices.project and width != trunk.num_features:
                raise ConfigError(f"backbone {name!r} projects its last stage only; leave out layer or project")
        width = joint_dim if choices.project else width
        dims = {"default": joint_dim, "projected": joint_dim, "none": None, "mean": width * len(layers_taken)}
        super().__init__(
            name,
            patch_size=patch_size,
            embed_dim=width * len(layers_taken),
            input_size=tuple(side // stride * stride for side in tower.image_size),
            mean=tuple(mean),
            std=tuple(std),
            summary_dim=dims.get(choices.summary, trunk.num_features),
            flexible=bool(getattr(trunk, "dynamic_img_size", not tokens)),
        )
        self.visual: Any = visual
        self.choices, self.layers = choices, layers_taken
        self.num_prefix_tokens: int | None = trunk.num_prefix_tokens if tokens else None
        self.channels_last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
        self.stride = stride
        self._sources = [sources[layers_taken.index(layer)] for layer in sorted(set(layers_taken))]
        embed = getattr(getattr(trunk, "patch_embed", None), "proj", None)
        self.embeds_patches = tokens and embeds_patches(embed, patch_size)
        self.freeze()

    def fit_size(self, height: float, width: float) -> tuple[int, int]:
        """Whole cells of the last stage, also where an earlier one gives the features."""
        fitted = super().fit_size(height, width)
        return (whole_cells(height, self.stride), whole_cells(width, self.stride)) if self.flexible else fitted

    def extract(self, images: Tensor) -> BackboneOutput:
        trunk, grid = self.visual.trunk, self.grid_size(size_of(images))
        if self.choices.layer is None and self.choices.facet == "token":
            x = last = trunk.forward_features(images)
            parts = [last]
        else:
            with captured(self._sources) as found:
                x = trunk.forward_features(images)
            by_layer = dict(zip(sorted(set(self.layers)), found, strict=True))
            parts = [self._part(by_layer[layer]) for layer in self.layers]
        parts = [self._map(part, grid) for part in parts]
        features = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return BackboneOutput(features, self._summary(x, features))

    def _part(self, found: Tensor) -> Tensor:
        """Tokens of a block through the final norm, a third of a packed projection, or the map of a stage."""
        if self.num_prefix_tokens is None:
            return found
        if self.choices.facet == "token":
            return self.visual.trunk.norm(found)
        width = self.visual.trunk.num_features
        return found if found.shape[-1] == width else found.chunk(3, -1)[FACETS.index(self.choices.facet)]

    def _map(self, part: Tensor, grid: tuple[int, int]) -> Tensor:
        """A part as a map [B, C, h, w], projected if asked for."""
        if self.num_prefix_tokens is not None:
            part = part[:, self.num_prefix_tokens :]
            return to_map(self._project(part) if self.choices.project else part, grid)
        if self.channels_last:
            part = part.movedim(-1, 1)
        return to_map(self._project(part.flatten(2).transpose(1, 2)), grid) if self.choices.project else part

    def _project(self, patches: Tensor) -> Tensor:
        """[B, N, C] to [B, N, D]: the head for each patch as if it were the only one."""
        alone = patches.flatten(0, 1)
        if self.num_prefix_tokens is not None:
            # In the places of the prefix as well, so that a pool of either finds the patch.
            alone = alone[:, None].expand(-1, self.num_prefix_tokens + 1, -1)
        else:
            alone = alone[:, None, None] if self.channels_last else alone[:, :, None, None]
        return self._head(alone).unflatten(0, patches.shape[:2])

    def _head(self, x: Tensor) -> Tensor:
        return self.visual.head(self.visual.trunk.forward_head(x))

    def _summary(self, x: Tensor, features: Tensor) -> Tensor | None:
        kind = self.choices.summary
        if kind == "none":
            return None
        if kind == "mean":
            return features.mean((2, 3))
        if kind == "cls":
            return x[:, 0]
        return self.visual.trunk.forward_head(x, pre_logits=True) if kind == "pool" else self._head(x)


def resample_positions(table: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A position table of another grid: bicubic, antialiased, half-pixel centres.

    Args:
        table: [1 + h * w, C], the class token first.
        native: (h, w) of the table.
        grid: (h, w) wanted.

    Returns:
        [1 + grid_h * grid_w, C] in the dtype of ``table``; ``table`` itself for its own grid.
    """
    if tuple(native) == tuple(grid):
        return table
    cells = table[1:].float().T.unflatten(1, native)[None]  # the kernel has no half-precision version on the CPU
    cells = F.interpolate(cells, grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([table[:1], cells[0].flatten(1).T.to(table.dtype)])


def whole_cells(length: float, cell: int) -> int:
    """The nearest multiple of ``cell``, at least one."""
    return max(1, round(length / cell)) * cell


def to_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, h * w, C] to [B, C, h, w], a view."""
    return patches.transpose(1, 2).unflatten(2, grid)


def _one_stage(name: str, stages: Sequence[nn.Module], choices: Options) -> int:
    if choices.facet != "token":
        raise ConfigError(f"backbone {name!r} is convolutional: it has no attention with a {choices.facet}")
    chosen = chosen_blocks(stages, choices.layer, name)
    if len(chosen) > 1:
        raise ConfigError(
            f"the stages of backbone {name!r} have different strides and cannot be concatenated; name one layer, "
            f"0 to {len(stages) - 1}"
        )
    return chosen[0]


def _facet_source(name: str, block: Any, facet: str) -> nn.Module:
    """The module of a block whose output holds the facet: a projection of its own or all three packed."""
    if facet == "token":
        return block
    attention = block.attn
    own = getattr(attention, f"{facet[0]}_proj", None)
    if own is not None:
        return own
    # Attention with a separate q_bias calls no module for its projection.
    if getattr(attention, "qkv", None) is None or getattr(attention, "q_bias", None) is not None:
        raise ConfigError(f"the attention of backbone {name!r} ({type(attention).__name__}) does not show its {facet}")
    return attention.qkv
