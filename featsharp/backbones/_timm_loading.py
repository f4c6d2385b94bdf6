"""timm models from names, directories and weight files, with errors for users."""

import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featsharp.backbones.loading import first_line, import_optional
from featsharp.backbones.options import Options
from featsharp.errors import BackboneMismatchError, CheckpointError, ConfigError, MissingDependencyError

INSTALL_TIMM = 'pip install "featsharp[timm]"'
# As timm looks for them in a directory of its own.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# These resample their positions at every call: SAM not when it loads them, NaFlexVit from a table of its own grid.
RESAMPLING_MODULES = ["vision_transformer_sam", "naflexvit"]


def load_timm_model(spec: str, choices: Options) -> nn.Module:
    """The timm model without a classifier, able to change its size where its class can, filled as ``choices`` say.

    Args:
        spec: ``MODEL``, ``MODEL.TAG``, ``hf-hub:ORG/MODEL``, or a directory with ``config.json`` (``DIR`` or
            ``local-dir:DIR``), where the weights are too.
        choices: Of these ``pretrained``, ``weights`` and ``img_size``.

    Raises:
        ConfigError, MissingDependencyError, CheckpointError, BackboneMismatchError: As ``create_timm_backbone``.
    """
    timm = import_optional("timm", f"backbone 'timm:{spec}'", INSTALL_TIMM)
    source, architecture = _find_source(timm, spec, choices.weights)
    weights = _find_weights(source, choices) if choices.pretrained else None
    arguments: dict[str, Any] = {
        "pretrained": choices.pretrained and weights is None,
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    if choices.img_size is not None and not timm.models.is_model_in_modules(architecture, RESAMPLING_MODULES):
        arguments["img_size"] = choices.img_size
    try:
        model = _create_model(timm, source, arguments)
    except OSError as error:
        raise MissingDependencyError(
            f"the weights of timm model {spec!r} are not on this machine and cannot be fetched "
            f"({first_line(error)}); with a network, run once: python -c \"import timm; timm.create_model('{spec}', "
            f'pretrained=True)"; or give a file: timm:{spec}?weights=FILE; or take random weights: '
            f"timm:{spec}?pretrained=false"
        ) from error
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
    directory = _path(spec.removeprefix("local-dir:"))
    if spec.startswith("local-dir:") or directory.is_dir():
        return f"local-dir:{directory}", _architecture(timm, directory)
    if "/" in spec or "\\" in spec:
        raise ConfigError(f"there is no directory {spec!r}; timm:MODEL is a name of timm.list_models() or a directory")
    architecture = spec.split(".")[0]
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(repr(n) for n in nearest)}?" if nearest else "no name is near."
        raise ConfigError(f"unknown timm model {architecture!r}; {hint} timm.list_models() lists all")
    folder = None if weights is None else _path(weights)
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
    pretrained_cfg = content.get("pretrained_cfg", {})
    if not isinstance(pretrained_cfg, dict):
        raise ConfigError(
            f"{config} has pretrained_cfg={pretrained_cfg!r}; it has to be a mapping with mean, std and input_size, as "
            f"timm.models.save_for_hf writes it"
        )
    return architecture


def _path(text: str) -> Path:
    """With the home directory for ``~``, as a shell would have it outside quotes."""
    return Path(os.path.expanduser(text))  # that of Path raises for an unknown user


def _find_weights(source: str, choices: Options) -> Path | None:
    """The local file to load, None for weights that timm finds."""
    if choices.weights is None and not source.startswith("local-dir:"):
        return None
    place = _path(choices.weights or source.removeprefix("local-dir:"))
    if place.is_file():
        return place
    if not place.is_dir():
        raise ConfigError(f"option weights is a file or directory that is there; got {str(place)!r}")
    for name in WEIGHT_FILES:
        if (place / name).is_file():
            return place / name
    others = sorted(path for path in place.iterdir() if path.suffix in SUFFIXES)
    if len(others) != 1:
        present = ", ".join(path.name for path in others) or "none"
        raise ConfigError(
            f"{place} needs one file of weights, such as model.safetensors; found {present}; name the file"
        )
    return others[0]


def _create_model(timm: Any, source: str, arguments: dict[str, Any]) -> nn.Module:
    """The model; random weights are the same at every call. Arguments that its class has not are left out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        while True:
            try:
                return timm.create_model(source, **arguments)
            except TypeError as error:
                unknown = re.findall(r"'(dynamic_img_size|img_size)'", str(error))
                if "unexpected keyword" not in str(error) or not arguments.keys() & unknown:
                    raise
                arguments = {key: value for key, value in arguments.items() if key not in unknown}


def _fill(timm: Any, model: nn.Module, architecture: str, file: Path) -> None:
    """Load all weights but those of the classifier, or say what is wrong.

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
        what = _some(shapes, "; ") if shapes else first_line(error)
        raise BackboneMismatchError(
            f"{file} does not fit timm model {architecture!r}: {what}; name the model that it was saved from"
        ) from error
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    unknown = [key for key in result.unexpected_keys if not key.startswith(heads)]
    if result.missing_keys or unknown:
        raise BackboneMismatchError(
            f"{file} does not fill timm model {architecture!r}: missing {_some(result.missing_keys)}; "
            f"not of this model {_some(unknown)}; name the model that it was saved from"
        )


def _some(texts: Sequence[str], separator: str = ", ", count: int = 5) -> str:
    more = f" and {len(texts) - count} more" if len(texts) > count else ""
    return separator.join(texts[:count]) + more if texts else "none"
