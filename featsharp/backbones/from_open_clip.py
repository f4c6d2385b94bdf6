"""CLIP-type models of open_clip, by name: ``open_clip:MODEL/TAG``, such as ``open_clip:ViT-H-14-378-quickgelu/dfn5b``.

What the name can be:

- ``MODEL/TAG``: an architecture and its weights, a row of ``open_clip.list_pretrained()``.
- ``MODEL``: an architecture with ``?weights=FILE`` (a checkpoint of the whole model as open_clip writes it, ``.pt``,
  ``.bin`` or ``.safetensors``) or ``?pretrained=false``.
- ``hf-hub:OWNER/NAME``: a repository with ``open_clip_config.json``.
- a local directory with such a file and the weights next to it.

Whitening is that of the tag or of the directory's configuration. Without a tag it is what all tags of the architecture
agree on, else open_clip's default; ``MODEL/TAG?weights=FILE`` names it. QuickGELU follows the tag too, where open_clip
only warns that model and tag differ: ``ViT-B-32/openai`` runs as those weights were trained.

Of a checkpoint only the visual tower is built and kept.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featsharp.backbones._open_clip_towers import MapTower, ResNetTower, TransformerTower, TrunkTower
from featsharp.backbones.base import Backbone
from featsharp.backbones.loading import fill, first_line, import_optional
from featsharp.backbones.options import Options, parse_whitening
from featsharp.errors import CheckpointError, ConfigError, MissingDependencyError, unknown_name

INSTALL_OPEN_CLIP = 'pip install "featsharp[open_clip]"'
HUB, DIRECTORY = "hf-hub:", "local-dir:"
# The text tower is thrown away: the smallest that there can be, so that it costs nothing and needs no tokenizer.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}


@dataclass(frozen=True)
class Source:
    """Source of a model.

    Attributes:
        config: open_clip's ``model_cfg``: embed_dim, vision_cfg, ...
        preprocess: Its ``preprocess_cfg``; of it ``mean`` and ``std`` are read.
        weights: The checkpoint; None while it is not known.
        tag: What open_clip knows about the pretrained tag, None without one.
        place: Where the configuration was read, for messages.
    """

    config: dict[str, Any]
    preprocess: Mapping[str, Any]
    weights: Path | None = None
    tag: Mapping[str, Any] | None = None
    place: str = "open_clip"


def build(name: str, spec: str, choices: Options) -> Backbone:
    """Build ``open_clip:MODEL/TAG``.

    Options: ``layer``, ``facet``, ``project``, ``summary``, ``pretrained``, ``img_size``, ``weights`` as in
    :class:`featsharp.backbones.options.Options`; the classes of :mod:`featsharp.backbones._open_clip_towers` say what
    they mean for each kind of tower. ``img_size`` is the size that the backbone then calls its own; the weights stay.

    Raises:
        ConfigError: For an unknown model, tag or option, or one that the model does not have.
        CheckpointError: For weights that do not fill the visual tower exactly.
        MissingDependencyError: When open_clip or the weights are absent and the weights cannot be fetched.
    """
    open_clip = import_optional("open_clip", f"backbone {name!r}", INSTALL_OPEN_CLIP)
    source = _find(open_clip, spec, choices)
    model = _build(open_clip, source)
    if choices.pretrained:
        weights = source.weights or _fetch(open_clip, spec, source)
        _load_visual(model, weights, spec)
    backbone = _wrap(open_clip, name, model.visual, source, choices)
    return _with_native_size(backbone, choices.img_size)


def _find(open_clip: Any, spec: str, choices: Options) -> Source:
    """The source that ``spec`` and the option ``weights`` mean."""
    folder = Path(spec.removeprefix(DIRECTORY)).expanduser()
    if spec.startswith(HUB):
        source = _from_hub(open_clip, spec)
    elif folder.is_dir():
        source = _from_directory(open_clip, folder, need_weights=choices.pretrained and choices.weights is None)
    elif spec.startswith((DIRECTORY, "/", "./", "../", "~")):
        raise ConfigError(f"{folder} is not a directory; open_clip:DIR takes one with open_clip_config.json in it")
    else:
        source = _from_list(open_clip, spec, choices)
    if choices.weights is None:
        return source
    path = Path(choices.weights)
    if path.is_dir():
        path = _weights_in(open_clip, path)
    if not path.is_file():
        raise ConfigError(f"weights={choices.weights} is not there; give a checkpoint of open_clip or its directory")
    return replace(source, weights=path)


def _from_list(open_clip: Any, spec: str, choices: Options) -> Source:
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
    if choices.pretrained and choices.weights is None:
        raise ConfigError(
            f"open_clip:{spec} names no weights; write one of "
            f"{', '.join(f'open_clip:{architecture}/{known}' for known in tags) or '?weights=FILE'}, "
            f"or give ?weights=FILE, or ?pretrained=false for random ones"
        )
    known = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    whitenings = {(tuple(one["mean"]), tuple(one["std"])) for one in known if one.get("mean") and one.get("std")}
    agreed = whitenings.pop() if len(whitenings) == 1 else None
    return Source(config, {} if agreed is None else {"mean": agreed[0], "std": agreed[1]})


def _from_directory(open_clip: Any, folder: Path, *, need_weights: bool) -> Source:
    path = folder / open_clip.constants.HF_CONFIG_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        source = Source(content["model_cfg"], content.get("preprocess_cfg") or {}, place=str(path))
        _check_layout(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a configuration with model_cfg ({first_line(error)}); "
            f"open_clip.push_to_hf_hub.save_for_hf writes one"
        ) from error
    return replace(source, weights=_weights_in(open_clip, folder)) if need_weights else source


def _check_layout(source: Source) -> None:
    """Raises KeyError or TypeError where an entry is missing or of another kind."""
    if not isinstance(source.config, dict) or not isinstance(source.preprocess, dict):
        raise TypeError("model_cfg and preprocess_cfg are mappings")
    if not isinstance(source.config["embed_dim"], int) or not isinstance(source.config["vision_cfg"], dict):
        raise TypeError("model_cfg has embed_dim, a number, and vision_cfg, a mapping")


def _weights_in(open_clip: Any, folder: Path) -> Path:
    names = (open_clip.constants.HF_SAFE_WEIGHTS_NAME, open_clip.constants.HF_WEIGHTS_NAME)
    for known in names:
        if (folder / known).is_file():
            return folder / known
    raise ConfigError(f"{folder} has neither {' nor '.join(names)}; name the checkpoint with ?weights=FILE")


def _from_hub(open_clip: Any, spec: str) -> Source:
    """A repository of the Hugging Face hub: its files lie in one local directory once fetched."""
    repository = spec.removeprefix(HUB)
    try:
        path = open_clip.pretrained.download_pretrained_from_hf(repository, filename=open_clip.constants.HF_CONFIG_NAME)
    except (OSError, RuntimeError) as error:
        raise _cannot_fetch(spec, f"open_clip.create_model('{spec}')", error) from error
    return _from_directory(open_clip, Path(path).parent, need_weights=False)


def _fetch(open_clip: Any, spec: str, source: Source) -> Path:
    """The checkpoint on this machine, fetched by open_clip if it is not there yet."""
    model, _, tag = spec.partition("/")
    command = f"open_clip.create_model('{model}', pretrained='{tag}')"
    try:
        if spec.startswith(HUB):
            command = f"open_clip.create_model('{spec}')"
            return Path(open_clip.pretrained.download_pretrained_from_hf(spec.removeprefix(HUB)))
        return Path(open_clip.download_pretrained(dict(source.tag or {})))
    except (OSError, RuntimeError) as error:
        raise _cannot_fetch(spec, command, error) from error


def _cannot_fetch(spec: str, command: str, error: Exception) -> MissingDependencyError:
    return MissingDependencyError(
        f"the files of open_clip model {spec!r} are not on this machine and cannot be fetched ({first_line(error)}); "
        f'with a network, run once: python -c "import open_clip; {command}"; or give a checkpoint: '
        f"open_clip:{spec}?weights=FILE; or take random weights: open_clip:{spec}?pretrained=false"
    )


def _build(open_clip: Any, source: Source) -> Any:
    """The model with seeded random weights and next to no text tower."""
    config = source.config
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    quick_gelu = bool((source.tag or config).get("quick_gelu", False))
    if vision.get("timm_model_name"):
        import_optional("timm", f"the trunk {vision['timm_model_name']!r}", 'pip install "featsharp[timm]"')
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.CustomTextCLIP(
                embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=_NO_TEXT, quick_gelu=quick_gelu
            )
            if vision.get("timm_model_name"):
                model.visual.trunk = _let_size_vary(model.visual.trunk, vision["timm_model_name"])
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


def _wrap(open_clip: Any, name: str, visual: nn.Module, source: Source, choices: Options) -> Backbone:
    defaults = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    whitening = {key: _whitening(source, key) or default for key, default in defaults.items()}
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return TransformerTower(name, visual, choices, **whitening)
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        return ResNetTower(name, visual, choices, **whitening)
    trunk: Any = visual.trunk
    tower = TrunkTower if hasattr(trunk, "num_prefix_tokens") else MapTower
    return tower(name, visual, choices, **whitening, joint_dim=source.config["embed_dim"])


def _whitening(source: Source, key: str) -> tuple[float, float, float] | None:
    """Mean or std of the configuration; None where it does not say."""
    values = source.preprocess.get(key)
    try:
        return parse_whitening(key, values) if values else None
    except ConfigError as error:
        raise ConfigError(f"preprocess_cfg of {source.place}: {error}") from error


def _with_native_size(backbone: Backbone, size: tuple[int, int] | None) -> Backbone:
    """The backbone with another ``input_size``; positions are resampled at each call, which is cheap."""
    if size is None:
        return backbone
    if not backbone.flexible and size != backbone.input_size:
        raise ConfigError(
            f"backbone {backbone.name!r} takes {backbone.input_size[0]}x{backbone.input_size[1]} pixels only; "
            f"leave out img_size"
        )
    fitted = backbone.fit_size(*size)
    if fitted != size:
        raise ConfigError(
            f"img_size of {backbone.name!r} has to be whole patches of {backbone.patch_size}; the nearest is "
            f"{fitted[0]}x{fitted[1]}"
        )
    backbone.input_size = size
    return backbone
