"""Vision models of Hugging Face transformers by name: ``hf:ORG/MODEL`` or ``hf:DIRECTORY``."""

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.backbones._transformers_families import FAMILIES, Preprocessing, pair
from featsharp.backbones.base import Backbone
from featsharp.backbones.from_callable import from_callable
from featsharp.backbones.loading import first_line, import_optional
from featsharp.backbones.options import Options, parse_whitening
from featsharp.errors import CheckpointError, ConfigError, MissingDependencyError

INSTALL_HF = 'pip install "featsharp[hf]"'

# Where the vision tower lies in the checkpoints of language models that see (PaliGemma, LLaVA), old layout and new.
TOWER_KEYS = {r"^(model\.)?vision_tower\.(vision_model\.)?": ""}
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
SHOWN_KEYS = 6


def build(name: str, source: str, choices: Options) -> Backbone:
    """Build ``hf:ORG/MODEL`` or ``hf:DIRECTORY``, whose ``save_pretrained`` files lie there.

    Of a model with a language part only the vision tower is built and read. Options beside those of
    :class:`featsharp.backbones.options.Options`: ``mean`` and ``std``, a number or three with commas, for a model
    without an image processor; ``trust=true`` runs the model code that comes with the weights, which is otherwise
    refused. Models outside :data:`FAMILIES`, and those with code of their own, go through
    :func:`featsharp.backbones.from_callable`, which finds out their facts; of the choices these have only ``img_size``,
    ``weights`` and ``pretrained``. ``weights`` is a directory or a file with weights in place of the model's own.

    Raises:
        ConfigError: For an option or a choice that the model does not have, no or an unknown configuration, no
            whitening, or code that is not trusted.
        CheckpointError: For weights that cannot be read or are of another architecture; the message lists the keys.
        MissingDependencyError: When transformers or the weights are absent and the weights cannot be fetched.
    """
    transformers = import_optional("transformers", f"backbone {name!r}", INSTALL_HF)
    source = os.path.expanduser(source)
    trust = choices.trust
    with _quiet(transformers):
        place, config = _read_config(transformers, name, source, choices.weights, trust)
        preprocessing = _read_preprocessing(name, place, choices)
        vision = config if _is_foreign(config) else getattr(config, "vision_config", None) or config
        family = None if _is_foreign(config) else FAMILIES.get(vision.model_type)
        model = _build_model(transformers, name, place, config, vision, choices, trust)
    if family is not None:
        return family(name, model, preprocessing, choices)
    return _found_out(name, model, vision, preprocessing, choices)


def _read_config(transformers: Any, name: str, source: str, weights: str | None, trust: bool) -> tuple[str, Any]:
    """Read the configuration, with its place: of the model, or of the weights where the model has none at hand."""
    complete = weights is not None and os.path.isfile(os.path.join(weights, "config.json"))
    if weights is not None and not os.path.exists(weights):
        raise ConfigError(f"weights of backbone {name!r}: there is no file or directory {weights!r}")
    if not source:
        raise ConfigError("hf: needs a model, such as hf:google/siglip2-base-patch16-224, or a directory")
    if os.path.isfile(source):
        raise ConfigError(f"backbone {name!r}: {source!r} is a file; give its directory, or hf:MODEL?weights={source}")
    if not os.path.isdir(source) and not re.fullmatch(HUB_NAME, source):
        raise ConfigError(f"backbone {name!r}: there is no directory {source!r}; on the hub, names are ORG/MODEL")
    try:
        facts, _ = transformers.PreTrainedConfig.get_config_dict(source, local_files_only=complete)
        reason: Exception = FileNotFoundError("it has no config.json")
    except (OSError, ValueError) as error:
        facts, reason = {}, error
    if not facts and complete and weights is not None:
        return _read_config(transformers, name, weights, None, trust)
    if not facts and os.path.isdir(source):
        raise ConfigError(
            f"directory {source!r} has no config.json that transformers can read; save_pretrained writes one"
        ) from reason
    if not facts:
        raise _not_at_hand(name, source, reason) from reason
    if "auto_map" in facts and not trust and facts.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"backbone {name!r} brings model code of its own, which would run on this machine; read it, then allow it "
            f"with {name}{'&' if '?' in name else '?'}trust=true"
        )
    try:
        return source, transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=trust, local_files_only=complete
        )
    except Exception as error:  # whatever values of another kind lead to
        raise ConfigError(f"transformers cannot read the configuration of {name!r}: {first_line(error)}") from error


def _build_model(
    transformers: Any, name: str, place: str, config: Any, vision: Any, choices: Options, trust: bool
) -> nn.Module:
    """The vision model in float32, with weights or seeded random ones."""
    arguments: dict[str, Any] = {"dtype": torch.float32}
    if _is_foreign(config):
        build = transformers.AutoModel
        arguments["trust_remote_code"] = trust
    else:
        try:
            build = transformers.MODEL_MAPPING[type(vision)]
        except KeyError:
            raise ConfigError(
                f"transformers has no model without a head for {name!r} ({vision.model_type}); wrap one with "
                f"featsharp.backbones.from_callable"
            ) from None
        build = build[0] if isinstance(build, tuple) else build
        if vision.model_type == "clip_vision_model" and _wants_projection(config, choices):
            build = transformers.CLIPVisionModelWithProjection
            vision.projection_dim = config.projection_dim
        if "add_pooling_layer" in inspect.signature(build.__init__).parameters:
            arguments["add_pooling_layer"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not choices.pretrained:
            create = build.from_config if build is transformers.AutoModel else build._from_config
            try:
                return create(vision, **arguments)
            except Exception as error:  # whatever values that do not fit lead to
                raise ConfigError(
                    f"transformers cannot build {name!r} from its configuration at {place!r}: {first_line(error)}"
                ) from error
        if vision is not config:
            arguments["key_mapping"] = TOWER_KEYS
        return _load(build, name, choices.weights or place, vision, arguments)


def _is_foreign(config: Any) -> bool:
    """Tell whether its code came with the weights."""
    return not type(config).__module__.startswith("transformers.")


def _wants_projection(config: Any, choices: Options) -> bool:
    """Tell whether CLIP's projection into the space of text is there and used."""
    has = config.model_type == "clip" or "CLIPVisionModelWithProjection" in (config.architectures or ())
    return has and (choices.project or choices.summary not in ("cls", "mean", "none"))


def _load(build: Any, name: str, place: str, config: Any, arguments: dict[str, Any]) -> nn.Module:
    """The model with all its weights from ``place``: a hub name, a directory, or a file.

    Keys that the model has no use for are passed over: the checkpoint may hold heads and a language model.
    """
    try:
        if os.path.isfile(place):
            arguments = {**arguments, "state_dict": _read_file(place)}
        model, report = build.from_pretrained(
            None if os.path.isfile(place) else place,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, with the missing ones
            **arguments,
        )
    except OSError as error:
        raise _not_at_hand(name, place, error) from error
    except Exception as error:  # whatever reading a foreign file raises, the message has to name it
        raise CheckpointError(f"the weights of {name!r} at {place!r} cannot be read: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    mismatched = [f"{key} {_shape(given)}, not {_shape(wanted)}" for key, given, wanted in report["mismatched_keys"]]
    if missing or mismatched:
        spare = sorted(report["unexpected_keys"])
        raise CheckpointError(
            f"the weights at {place!r} are not those of a {type(model).__name__} as {name!r} has it: "
            f"missing {_listed(missing)}; of another shape {_listed(sorted(mismatched))}; without use {_listed(spare)}"
        )
    return model


def _read_file(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _found_out(name: str, model: nn.Module, config: Any, preprocessing: Preprocessing, choices: Options) -> Backbone:
    """A model that this module does not know, as ``from_callable`` understands it."""
    if choices.layer is not None or choices.facet != "token" or choices.project or choices.summary != "default":
        raise ConfigError(
            f"the insides of {name!r} ({type(model).__name__}) are not known; leave out layer, facet, project and "
            f"summary, or wrap the model with featsharp.backbones.from_callable"
        )
    size = choices.img_size or preprocessing.size or _pair_or_none(getattr(config, "image_size", None))
    if size is None:
        raise ConfigError(f"backbone {name!r} does not say its native size; give img_size, such as ?img_size=512")
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        model = _Interpolating(model)
    return from_callable(model, name=name, input_size=size, mean=preprocessing.mean, std=preprocessing.std)


class _Interpolating(nn.Module):
    """Takes images of any size, its positions resampled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images, interpolate_pos_encoding=True)


def _read_preprocessing(name: str, place: str, choices: Options) -> Preprocessing:
    """From the image processor's file, where the options give no ``mean`` and ``std``."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    mean, std = choices.mean, choices.std
    try:
        config = get_image_processor_config(place, local_files_only=os.path.isdir(place))
        size = _processor_size(config)
        whitening = None if mean and std else _processor_whitening(config)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{os.path.join(place, 'preprocessor_config.json')} cannot be read as that of an image processor "
            f"({first_line(error)}); save_pretrained of the processor writes one"
        ) from error
    if mean is None or std is None:
        if whitening is None:
            raise ConfigError(
                f"backbone {name!r} has no preprocessor_config.json with image_mean and image_std; say its whitening "
                f"as options, such as ?mean=0.485,0.456,0.406&std=0.229,0.224,0.225"
            )
        return Preprocessing(mean or whitening[0], std or whitening[1], size)
    return Preprocessing(mean, std, size)


def _processor_whitening(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of pixels in [0, 1]; None where the processor does not say them."""
    whitens = config.get("do_normalize", "image_mean" in config)
    if not config or (whitens and not ("image_mean" in config and "image_std" in config)):
        return None
    # The processor multiplies pixels from 0 to 255 first.
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255
    mean, std = (config["image_mean"], config["image_std"]) if whitens else (0.0, 1.0)
    mean, std = parse_whitening("image_mean", mean), parse_whitening("image_std", std)
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _processor_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(h, w) of the images that a processor makes: of its crop, or what it resizes to."""
    crops = config.get("do_center_crop", "crop_size" in config)
    size = (config.get("crop_size") if crops else None) or config.get("size")
    if isinstance(size, Mapping):
        if size.get("height") and size.get("width"):
            return size["height"], size["width"]
        size = size.get("shortest_edge") or size.get("longest_edge")
    return _pair_or_none(size)


def _pair_or_none(value: Any) -> tuple[int, int] | None:
    return None if value is None else pair(value)


def _not_at_hand(name: str, source: str, error: Exception) -> MissingDependencyError:
    if os.path.isdir(source):
        return MissingDependencyError(
            f"directory {source!r} has no weights of backbone {name!r} ({first_line(error)}); put them there, give "
            f"weights=FILE, or take random ones: pretrained=false"
        )
    return MissingDependencyError(
        f"the files of backbone {name!r} are not on this machine and cannot be fetched ({first_line(error)}); with a "
        f"network, run once: hf download {source}; or copy them into a directory and name it: hf:DIRECTORY"
    )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's reports on what it loads, which list the language model that is left out on purpose."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _listed(keys: Sequence[str]) -> str:
    rest = len(keys) - SHOWN_KEYS
    return f"{', '.join(keys[:SHOWN_KEYS]) or 'none'}{f' and {rest} more' if rest > 0 else ''}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
