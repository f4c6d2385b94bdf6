"""CLIP-type models of open_clip, by name: ``open_clip:MODEL/TAG``, such as ``open_clip:ViT-H-14-378-quickgelu/dfn5b``.

The name can be:

- ``MODEL/TAG``: an architecture and its weights, a row of ``open_clip.list_pretrained()``.
- ``MODEL``: an architecture with ``?weights=FILE`` (a checkpoint of the whole model as open_clip writes it, ``.pt``,
  ``.bin`` or ``.safetensors``) or ``?pretrained=false``.
- ``hf-hub:OWNER/NAME``: a repository with ``open_clip_config.json``.
- a local directory with such a file and the weights next to it.

Whitening is that of the tag or of the directory's configuration. Without a tag it is that on which all tags of the
architecture agree, else open_clip's default; ``MODEL/TAG?weights=FILE`` names it. QuickGELU follows the tag too, where
open_clip only warns that model and tag differ: ``ViT-B-32/openai`` runs as those weights were trained.

Of a checkpoint only the visual tower is built, kept and run. Text-aligned features (``project=true``, one name for
three kinds of head) are always what the model's own head makes of one patch alone: for a linear head each normalised
patch token times the projection, for an attention pool its value path, the softmax over a single token being 1
("Extract Free Dense Labels from CLIP", MaskCLIP, arXiv 2112.01071). They lie in the space of the text embeddings.
Bilinear upsampling commutes with a linear head, so there projecting before or after makes no difference.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones.adapters import FACETS, StageBackbone, TokenBackbone, choose_stage, to_map
from featsharp.backbones.base import Backbone
from featsharp.backbones.loading import (
    cannot_fetch,
    fill,
    find_weights,
    import_optional,
    seeded_weights,
    square_patch,
    whole_patches,
)
from featsharp.backbones.options import Options
from featsharp.backbones.preprocessing import choose_whitening
from featsharp.errors import CheckpointError, ConfigError, first_line, unknown_name
from featsharp.ops.resize import size_of

INSTALL_OPEN_CLIP = 'pip install "featsharp[open_clip]"'
HUB, DIRECTORY = "hf-hub:", "local-dir:"
# The text tower is thrown away: the smallest that there can be, so that it costs nothing and needs no tokenizer.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
STRIDE = 32  # of the last stage of a CLIP ResNet


@dataclass(frozen=True)
class Source:
    """Source of a model.

    Attributes:
        config: open_clip's ``model_cfg``: embed_dim, vision_cfg, ...
        preprocess: Its ``preprocess_cfg``; of it ``mean`` and ``std`` are read.
        weights: The checkpoint; None while it is not known.
        tag: The facts of open_clip about the pretrained tag, None without one.
        place: Where the configuration was read, for messages.
    """

    config: dict[str, Any]
    preprocess: Mapping[str, Any]
    weights: Path | None = None
    tag: Mapping[str, Any] | None = None
    place: str = "open_clip"


def build(name: str, spec: str, options: Options) -> Backbone:
    """Build ``open_clip:MODEL/TAG``.

    Raises:
        ConfigError: For an unknown model, tag or option, or one that the model does not have.
        CheckpointError: For weights that do not fill the visual tower exactly.
        MissingDependencyError: When open_clip or the weights are absent and the weights cannot be fetched.
    """
    open_clip = import_optional("open_clip", f"backbone {name!r}", INSTALL_OPEN_CLIP)
    source = find_source(open_clip, name, spec, options)
    model = _build(open_clip, source)
    if options.pretrained:
        _load_visual(model, source.weights or download_file(open_clip, name, spec, tag=source.tag), spec)
    usual = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {key: source.preprocess.get(key) or value for key, value in usual.items()}
    whitening = choose_whitening(options, config, f"preprocess_cfg of {source.place}")
    visual = model.visual
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return TransformerTower(name, visual, options, **whitening)
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        return ResNetTower(name, visual, options, **whitening)
    tower = TrunkTower if hasattr(visual.trunk, "num_prefix_tokens") else MapTower
    return tower(name, visual, options, **whitening, joint_dim=source.config["embed_dim"])


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
        name: The name of ``create_backbone``, or a label.
        visual: ``open_clip.create_model(...).visual`` of this class.
        options: Layers, facet, projection and summary.
        whitening: ``mean`` and ``std``.
    """

    holder = "visual"

    def __init__(self, name: str, visual: Any, options: Options, **whitening: Any) -> None:
        patch_size = square_patch(name, visual.patch_size)
        if options.project and options.facet in ("query", "key"):
            raise ConfigError(f"backbone {name!r}: project goes with facet token or value; got {options.facet!r}")
        if options.project and visual.attn_pool is not None:
            raise ConfigError(
                f"backbone {name!r} pools with learned queries, which give patches no place in the space of its text; "
                f"leave out project"
            )
        width = visual.conv1.out_channels
        pooled, projected = visual.proj.shape
        super().__init__(
            name,
            visual,
            options,
            visual.transformer.resblocks,
            width=width,
            summaries={"projected": projected, "pool": pooled, "cls": width},
            head_width=projected,
            patch_size=patch_size,
            input_size=tuple(side * patch_size for side in visual.grid_size),
            **whitening,
        )

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        visual, grid = self.visual, self.grid_size(size_of(images))
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)
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

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.options.facet == "token":
            return tensor
        attention, part = block.attn, FACETS.index(self.options.facet)
        weight, bias = attention.in_proj_weight.chunk(3)[part], attention.in_proj_bias
        tokens = F.linear(tensor[:, 1:], weight, None if bias is None else bias.chunk(3)[part])
        return attention.out_proj(tokens) if self.options.project else tokens

    def project(self, tokens: Tensor) -> Tensor:
        return tokens @ self.visual.proj

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        if kind == "cls":
            return end[:, 0]
        pooled = self.visual._pool(output)[0]
        return pooled if kind == "pool" else pooled @ self.visual.proj


class TrunkTower(TokenBackbone):
    """``open_clip.TimmModel`` with a transformer of timm (SigLIP, EVA, PE-Core ...) under a head of open_clip.

    Features are the normalised patch tokens of the trunk's ``forward_features``. The summary is the image embedding,
    through the heads of both; for SigLIP, which projects nothing, the output of its attention pool. Positions at other
    sizes are resampled by timm (bicubic, antialiased); a trunk that cannot (relative position tables) takes its own
    size only.

    Args:
        visual: ``open_clip.create_model(...).visual`` of this class, its trunk built with ``dynamic_img_size``.
        joint_dim: Channels of the space that images and text share.
        name, options, whitening: As for :class:`TransformerTower`.
    """

    holder = "visual"

    def __init__(self, name: str, visual: Any, options: Options, *, joint_dim: int, **whitening: Any) -> None:
        trunk = visual.trunk
        if options.project and options.facet != "token":
            raise ConfigError(f"backbone {name!r}: project goes with facet token only; got {options.facet!r}")
        stride, width = trunk.feature_info[-1]["reduction"], trunk.num_features
        has_class_token = getattr(trunk, "cls_token", None) is not None
        super().__init__(
            name,
            visual,
            options,
            trunk.blocks,
            width=width,
            summaries={"projected": joint_dim, "pool": width, **({"cls": width} if has_class_token else {})},
            head_width=joint_dim,
            patch_size=stride,
            input_size=whole_patches(visual.image_size, stride),
            flexible=bool(getattr(trunk, "dynamic_img_size", False)),
            **whitening,
        )
        self.num_prefix_tokens: int = trunk.num_prefix_tokens

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

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        packed = self.options.facet != "token" and tensor.shape[-1] != self.width
        return tensor.chunk(3, -1)[FACETS.index(self.options.facet)] if packed else tensor

    def project(self, tokens: Tensor) -> Tensor:
        # The token in the places of the prefix as well, so that a pool of either finds it.
        alone = tokens.flatten(0, 1)[:, None].expand(-1, self.num_prefix_tokens + 1, -1)
        return _embed(self.visual, alone).unflatten(0, tokens.shape[:2])

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        if kind == "cls":
            return end[:, 0]
        return self.visual.trunk.forward_head(end, pre_logits=True) if kind == "pool" else _embed(self.visual, end)


class ResNetTower(StageBackbone):
    """``open_clip.ModifiedResNet``: the ResNet of OpenAI's CLIP, with an attention pool in place of the mean.

    Features are the map of the last stage (stride 32), or of one other (``layer=0`` to 3, stride 4 to 32);
    ``project=true`` sends each place of the last through the value path of the pool. The summary is the pool's output,
    which is the projected embedding. At other sizes the positions of the pool are resampled as those of a transformer;
    the maps need none. Images are multiples of 32 pixels, also for an earlier stage: later ones are pooled.
    """

    holder = "visual"

    def __init__(self, name: str, visual: Any, options: Options, **whitening: Any) -> None:
        stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        stage = choose_stage(stages, options, name)
        if options.project and stage != len(stages) - 1:
            raise ConfigError(f"backbone {name!r} projects its last stage, {len(stages) - 1}; got layer={stage}")
        super().__init__(
            name,
            visual,
            options,
            stages[stage],
            summaries=dict.fromkeys(("projected", "pool"), visual.output_dim),
            step=STRIDE,
            patch_size=4 * 2**stage,
            embed_dim=visual.output_dim if options.project else stages[stage][-1].conv3.out_channels,
            input_size=whole_patches(visual.image_size, STRIDE),
            **whitening,
        )
        self.pool_grid = (visual.image_size // STRIDE,) * 2

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        visual = self.visual
        x = visual.stem(images)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = stage(x)
        return x, None

    def project(self, features: Tensor) -> Tensor:
        pool = self.visual.attnpool
        return pool.c_proj(pool.v_proj(features.movedim(1, -1))).movedim(-1, 1)

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        pool, grid = self.visual.attnpool, size_of(end)
        positions = resample_positions(pool.positional_embedding, self.pool_grid, grid)
        return torch.func.functional_call(pool, {"positional_embedding": positions}, (end,))


class MapTower(StageBackbone):
    """``open_clip.TimmModel`` with a convolutional network of timm (ConvNeXt, FastViT ...) under a head of open_clip.

    Features are the map of the last stage, as the trunk's ``forward_features`` gives it, or of one other stage. The
    summary is the image embedding. Images are whole cells of the last stage, also for an earlier one.

    Args: As for :class:`TrunkTower`.
    """

    holder = "visual"

    def __init__(self, name: str, visual: Any, options: Options, *, joint_dim: int, **whitening: Any) -> None:
        trunk = visual.trunk
        stages = [trunk.get_submodule(info["module"]) for info in trunk.feature_info]
        stage = choose_stage(stages, options, name)
        # Without a layer the trunk ends as it likes; some add a convolution to their last stage.
        info, stride = trunk.feature_info[stage], trunk.feature_info[-1]["reduction"]
        width = trunk.num_features if options.layer is None else info["num_chs"]
        if options.project and width != trunk.num_features:
            raise ConfigError(f"backbone {name!r} projects its last stage only; leave out layer or project")
        super().__init__(
            name,
            visual,
            options,
            stages[stage],
            summaries={"projected": joint_dim, "pool": trunk.num_features},
            step=stride,
            patch_size=info["reduction"],
            embed_dim=joint_dim if options.project else width,
            input_size=whole_patches(visual.image_size, stride),
            flexible=bool(getattr(trunk, "dynamic_img_size", True)),
            **whitening,
        )
        self.channels_last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        return self.visual.trunk.forward_features(images), None

    def take(self, tensor: Any) -> Tensor:
        return tensor.movedim(-1, 1) if self.channels_last else tensor

    def project(self, features: Tensor) -> Tensor:
        alone = features.flatten(2).transpose(1, 2).flatten(0, 1)  # the head for each place as if it were the only one
        alone = alone[:, None, None] if self.channels_last else alone[:, :, None, None]
        return to_map(_embed(self.visual, alone).unflatten(0, (features.shape[0], -1)), size_of(features))

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        return self.visual.trunk.forward_head(end, pre_logits=True) if kind == "pool" else _embed(self.visual, end)


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


def find_source(open_clip: Any, name: str, spec: str, options: Options) -> Source:
    """The source that ``spec`` and the option ``weights`` mean."""
    folder = Path(spec.removeprefix(DIRECTORY)).expanduser()
    files = (open_clip.constants.HF_SAFE_WEIGHTS_NAME, open_clip.constants.HF_WEIGHTS_NAME)
    if spec.startswith(HUB):  # its files lie in one local directory once fetched
        source = _from_directory(
            open_clip, download_file(open_clip, name, spec, open_clip.constants.HF_CONFIG_NAME).parent
        )
    elif folder.is_dir():
        source = _from_directory(open_clip, folder)
        if options.pretrained and options.weights is None:
            source = replace(source, weights=find_weights(str(folder), files))
    elif spec.startswith((DIRECTORY, "/", "./", "../", "~")):
        raise ConfigError(f"{folder} is not a directory; open_clip:DIR takes one with open_clip_config.json in it")
    else:
        source = _from_list(open_clip, spec, options)
    return source if options.weights is None else replace(source, weights=find_weights(options.weights, files))


def _from_list(open_clip: Any, spec: str, options: Options) -> Source:
    """``MODEL[/TAG]`` of open_clip's own lists."""
    architecture, slash, tag = spec.partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise unknown_name("open_clip model", architecture, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if slash:
        if tag not in tags:
            raise unknown_name(f"pretrained tag of open_clip model {architecture!r}:", tag, tags)
        tag_config = open_clip.get_pretrained_cfg(architecture, tag)
        return Source(config, tag_config, tag=tag_config)
    if options.pretrained and options.weights is None:
        raise ConfigError(
            f"open_clip:{spec} names no weights; write one of "
            f"{', '.join(f'open_clip:{architecture}/{known}' for known in tags) or '?weights=FILE'}, "
            f"or give ?weights=FILE, or ?pretrained=false for random ones"
        )
    known = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    whitenings = {(tuple(one["mean"]), tuple(one["std"])) for one in known if one.get("mean") and one.get("std")}
    agreed = whitenings.pop() if len(whitenings) == 1 else None
    return Source(config, {} if agreed is None else {"mean": agreed[0], "std": agreed[1]})


def _from_directory(open_clip: Any, folder: Path) -> Source:
    path = folder / open_clip.constants.HF_CONFIG_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        source = Source(content["model_cfg"], content.get("preprocess_cfg") or {}, place=str(path))
        if not isinstance(source.config, dict) or not isinstance(source.preprocess, dict):
            raise TypeError("model_cfg and preprocess_cfg are mappings")
        if not isinstance(source.config["embed_dim"], int) or not isinstance(source.config["vision_cfg"], dict):
            raise TypeError("model_cfg has embed_dim, a number, and vision_cfg, a mapping")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a configuration with model_cfg ({first_line(error)}); "
            f"open_clip.push_to_hf_hub.save_for_hf writes one"
        ) from error
    return source


def download_file(
    open_clip: Any, name: str, spec: str, file: str | None = None, tag: Mapping[str, Any] | None = None
) -> Path:
    """A file on this machine, the checkpoint for None, fetched by open_clip if it is not there yet."""
    model, _, pretrained = spec.partition("/")
    try:
        if spec.startswith(HUB):
            command = f"open_clip.create_model('{spec}')"
            return Path(open_clip.pretrained.download_pretrained_from_hf(spec.removeprefix(HUB), filename=file))
        command = f"open_clip.create_model('{model}', pretrained='{pretrained}')"
        return Path(open_clip.download_pretrained(dict(tag or {})))
    except (OSError, RuntimeError) as error:
        raise cannot_fetch(name, error, f'python -c "import open_clip; {command}"') from error


def _build(open_clip: Any, source: Source) -> Any:
    """The model with seeded random weights and next to no text tower."""
    config = source.config
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    quick_gelu = bool((source.tag or config).get("quick_gelu", False))
    trunk = vision.get("timm_model_name")
    if trunk:
        import_optional("timm", f"the trunk {trunk!r}", 'pip install "featsharp[timm]"')
    try:
        with seeded_weights():
            model = open_clip.CustomTextCLIP(
                embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=_NO_TEXT, quick_gelu=quick_gelu
            )
            if trunk:
                model.visual.trunk = _let_size_vary(model.visual.trunk, trunk)
    except Exception as error:  # whatever open_clip and timm raise for values that they cannot use
        raise ConfigError(
            f"open_clip cannot build the visual tower that vision_cfg of {source.place} describes "
            f"({first_line(error)}); correct it, or update open_clip and timm"
        ) from error
    return model


def _let_size_vary(trunk: Any, architecture: str) -> nn.Module:
    """The trunk as timm builds it for images of any size, which open_clip has no argument for; the weights are kept."""
    if getattr(trunk, "dynamic_img_size", True):
        return trunk
    import timm

    other = timm.create_model(
        architecture, dynamic_img_size=True, num_classes=trunk.num_classes, global_pool=trunk.global_pool
    )
    other.load_state_dict(trunk.state_dict(), strict=True, assign=True)
    return other


def _load_visual(model: Any, path: Path, spec: str) -> None:
    """Fill ``model.visual`` from a checkpoint of the whole model, exactly."""
    from open_clip.convert import convert_state_dict
    from open_clip.factory import load_state_dict
    from open_clip.model import resize_pos_embed

    try:
        state = convert_state_dict(model, load_state_dict(str(path), weights_only=True))
        resize_pos_embed(state, model)  # as open_clip does with a table of another grid
    except Exception as error:  # whatever reading a foreign file raises, the message has to name it
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of open_clip ({first_line(error)}); it has to be a state dict of "
            f"the whole model, .pt, .bin or .safetensors"
        ) from error
    given = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    fill(model.visual, given, f"{path} is not a checkpoint of open_clip model {spec!r}: its visual tower differs")
