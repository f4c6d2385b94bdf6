"""The visual towers of open_clip as backbones: OpenAI-style transformers, CLIP ResNets, trunks of timm.

Shapes:
    tokens [B, P + h * w, C]: P prefix tokens (class token first), then patches row by row.

Only the visual tower is run. Text-aligned features (``project=true``, one name for three kinds of head) are always what
the model's own head makes of one patch alone: for a linear head each normalised patch token times the projection, for
an attention pool its value path, the softmax over a single token being 1 ("Extract Free Dense Labels from CLIP",
MaskCLIP, arXiv 2112.01071). They lie in the space of the text embeddings. Bilinear upsampling commutes with a linear
head, so there projecting before or after makes no difference.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput, embeds_patches
from featsharp.backbones.options import Options, Triple
from featsharp.backbones.tokens import FACETS, TokenBackbone, captured, chosen_stage, chosen_summary, to_map
from featsharp.errors import ConfigError
from featsharp.ops.resize import size_of

STRIDE = 32  # of the last stage of a CLIP ResNet


class TransformerTower(TokenBackbone):
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

    holder = "visual"

    def __init__(self, name: str, visual: nn.Module, choices: Options, *, mean: Triple, std: Triple) -> None:
        tower: Any = visual
        if tower.patch_size[0] != tower.patch_size[1]:
            raise ConfigError(f"backbone {name!r} has {tower.patch_size[0]}x{tower.patch_size[1]} patches, not square")
        if choices.project and choices.facet in ("query", "key"):
            raise ConfigError(f"backbone {name!r}: project goes with facet token or value; got {choices.facet!r}")
        if choices.project and tower.attn_pool is not None:
            raise ConfigError(
                f"backbone {name!r} pools with learned queries, which give patches no place in the space of its text; "
                f"leave out project"
            )
        patch_size, width = tower.patch_size[0], tower.conv1.out_channels
        pooled, projected = tower.proj.shape
        super().__init__(
            name,
            visual,
            choices,
            tower.transformer.resblocks,
            width=width,
            summaries={"projected": projected, "pool": pooled, "cls": width},
            head_width=projected,
            patch_size=patch_size,
            input_size=tuple(side * patch_size for side in tower.grid_size),
            mean=mean,
            std=std,
        )
        self.embeds_patches = embeds_patches(tower.conv1, patch_size)

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        visual, grid = self.visual, self.grid_size(size_of(images))
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        positions = resample_positions(visual.positional_embedding, visual.grid_size, grid)
        x = visual.ln_pre(torch.cat([first, patches], 1) + positions.to(patches.dtype))
        for block in visual.transformer.resblocks:
            x = block(x)
        return self.norm(x), x

    def norm(self, tokens: Tensor) -> Tensor:
        pool = self.visual.attn_pool
        return self.visual.ln_post(tokens) if pool is None else pool.ln_k(tokens)

    def source(self, block: Any) -> nn.Module:
        return block.ln_1

    def facet_width(self, block: Any) -> int:
        return self.visual.conv1.out_channels

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.options.facet == "token":
            return tensor
        attention, part = block.attn, FACETS.index(self.options.facet)
        weight, bias = attention.in_proj_weight.chunk(3)[part], attention.in_proj_bias
        tokens = F.linear(tensor[:, 1:], weight, None if bias is None else bias.chunk(3)[part])
        return attention.out_proj(tokens) if self.options.project else tokens

    def project(self, tokens: Tensor) -> Tensor:
        return tokens @ self.visual.proj

    def summarise(self, kind: str, tokens: Tensor, output: Any, num_patches: int) -> Tensor:
        if kind == "cls":
            return tokens[:, 0]
        pooled = self.visual._pool(output)[0]
        return pooled if kind == "pool" else pooled @ self.visual.proj


class ResNetTower(Backbone):
    """``open_clip.ModifiedResNet``: the ResNet of OpenAI's CLIP, with an attention pool in place of the mean.

    Features are the map of the last stage (stride 32), or of one other (``layer=0`` to 3, stride 4 to 32);
    ``project=true`` sends each place of the last through the value path of the pool. The summary is the pool's output,
    which is the projected embedding. At other sizes the positions of the pool are resampled as those of a transformer;
    the maps need none.
    """

    def __init__(self, name: str, visual: nn.Module, choices: Options, *, mean: Triple, std: Triple) -> None:
        tower: Any = visual
        stages = [tower.layer1, tower.layer2, tower.layer3, tower.layer4]
        stage = chosen_stage(stages, choices, name)
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
            mean=mean,
            std=std,
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


class TrunkTower(TokenBackbone):
    """``open_clip.TimmModel`` with a transformer of timm (SigLIP, EVA, PE-Core ...) under a head of open_clip.

    Features are the normalised patch tokens of the trunk's ``forward_features``. The summary is the image embedding,
    through the heads of both; for SigLIP, which projects nothing, the output of its attention pool. Positions at other
    sizes are resampled by timm (bicubic, antialiased); a trunk that cannot (relative position tables) takes its own
    size only.

    Args:
        name: A label.
        visual: ``open_clip.create_model(...).visual`` of this class, its trunk built with ``dynamic_img_size``.
        choices: Layer, facet, projection and summary.
        mean, std: Whitening.
        joint_dim: Channels of the space that images and text share.
    """

    holder = "visual"

    def __init__(
        self, name: str, visual: nn.Module, choices: Options, *, mean: Triple, std: Triple, joint_dim: int
    ) -> None:
        tower: Any = visual
        trunk = tower.trunk
        if choices.project and choices.facet != "token":
            raise ConfigError(f"backbone {name!r}: project goes with facet token only; got {choices.facet!r}")
        stride, width = trunk.feature_info[-1]["reduction"], trunk.num_features
        has_class_token = getattr(trunk, "cls_token", None) is not None
        super().__init__(
            name,
            visual,
            choices,
            trunk.blocks,
            width=width,
            summaries={"projected": joint_dim, "pool": width, **({"cls": width} if has_class_token else {})},
            head_width=joint_dim,
            patch_size=stride,
            input_size=tuple(side // stride * stride for side in tower.image_size),
            mean=mean,
            std=std,
            flexible=bool(getattr(trunk, "dynamic_img_size", False)),
        )
        self.num_prefix_tokens: int = trunk.num_prefix_tokens
        self.embeds_patches = embeds_patches(getattr(getattr(trunk, "patch_embed", None), "proj", None), stride)

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        return self.visual.trunk.forward_features(images), None

    def norm(self, tokens: Tensor) -> Tensor:
        return self.visual.trunk.norm(tokens)

    def source(self, block: Any) -> nn.Module:
        attention, facet = block.attn, self.options.facet
        separate = getattr(attention, f"{facet[0]}_proj", None)
        if separate is not None:
            return separate
        # Attention with a separate q_bias calls no module for its projection.
        if getattr(attention, "qkv", None) is None or getattr(attention, "q_bias", None) is not None:
            raise ConfigError(
                f"the attention of backbone {self.name!r} ({type(attention).__name__}) does not show its {facet}"
            )
        return attention.qkv

    def facet_width(self, block: Any) -> int:
        return self.visual.trunk.num_features

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        packed = self.options.facet != "token" and tensor.shape[-1] != self.visual.trunk.num_features
        return tensor.chunk(3, -1)[FACETS.index(self.options.facet)] if packed else tensor

    def project(self, tokens: Tensor) -> Tensor:
        # The token in the places of the prefix as well, so that a pool of either finds it.
        alone = tokens.flatten(0, 1)[:, None].expand(-1, self.num_prefix_tokens + 1, -1)
        return _embed(self.visual, alone).unflatten(0, tokens.shape[:2])

    def summarise(self, kind: str, tokens: Tensor, output: Any, num_patches: int) -> Tensor:
        if kind == "cls":
            return tokens[:, 0]
        return (
            self.visual.trunk.forward_head(tokens, pre_logits=True) if kind == "pool" else _embed(self.visual, tokens)
        )


class MapTower(Backbone):
    """``open_clip.TimmModel`` with a convolutional network of timm (ConvNeXt, FastViT ...) under a head of open_clip.

    Features are the map of the last stage, as the trunk's ``forward_features`` gives it, or of one other stage. The
    summary is the image embedding.

    Args: As for :class:`TrunkTower`.
    """

    def __init__(
        self, name: str, visual: nn.Module, choices: Options, *, mean: Triple, std: Triple, joint_dim: int
    ) -> None:
        tower: Any = visual
        trunk = tower.trunk
        stages = [trunk.get_submodule(info["module"]) for info in trunk.feature_info]
        stage = chosen_stage(stages, choices, name)
        # Without a layer the trunk ends as it likes; some add a convolution to their last stage.
        info = trunk.feature_info[stage]
        width = trunk.num_features if choices.layer is None else info["num_chs"]
        if choices.project and width != trunk.num_features:
            raise ConfigError(f"backbone {name!r} projects its last stage only; leave out layer or project")
        width = joint_dim if choices.project else width
        kind = chosen_summary(name, choices.summary, {"projected": joint_dim, "pool": width})
        stride = trunk.feature_info[-1]["reduction"]
        super().__init__(
            name,
            patch_size=info["reduction"],
            embed_dim=width,
            input_size=tuple(side // stride * stride for side in tower.image_size),
            mean=mean,
            std=std,
            summary_dim={"none": None, "mean": width, "pool": trunk.num_features}.get(kind, joint_dim),
            flexible=bool(getattr(trunk, "dynamic_img_size", True)),
        )
        self.visual: Any = visual
        self.options, self.summary_kind, self.stride = choices, kind, stride
        self._sources = [] if choices.layer is None else [stages[stage]]
        self.channels_last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
        self.freeze()

    def fit_size(self, height: float, width: float) -> tuple[int, int]:
        """Return whole cells of the last stage, also where an earlier one gives the features."""
        fitted = super().fit_size(height, width)
        return (whole_cells(height, self.stride), whole_cells(width, self.stride)) if self.flexible else fitted

    def extract(self, images: Tensor) -> BackboneOutput:
        with captured(self._sources) as taken:
            last = self.visual.trunk.forward_features(images)
        part = taken[0] if taken else last
        features = part.movedim(-1, 1) if self.channels_last else part
        if self.options.project:  # the head for each place as if it were the only one
            alone = features.flatten(2).transpose(1, 2).flatten(0, 1)
            alone = alone[:, None, None] if self.channels_last else alone[:, :, None, None]
            features = to_map(_embed(self.visual, alone).unflatten(0, (len(images), -1)), size_of(features))
        if self.summary_kind in ("none", "mean"):
            return BackboneOutput(features, None if self.summary_kind == "none" else features.mean((2, 3)))
        if self.summary_kind == "pool":
            return BackboneOutput(features, self.visual.trunk.forward_head(last, pre_logits=True))
        return BackboneOutput(features, _embed(self.visual, last))


def _embed(visual: Any, x: Tensor) -> Tensor:
    """Image embeddings of what the trunk ends with, through the heads of trunk and tower."""
    embedded: Tensor = visual.head(visual.trunk.forward_head(x))
    return embedded


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
