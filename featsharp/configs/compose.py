"""Composing a run's configuration from files and command-line overrides; errors name the nearest valid key."""

import dataclasses
import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, TypeVar

from featsharp.backbones.models import MODELS
from featsharp.errors import ConfigError, MissingDependencyError, first_line, unknown_name
from featsharp.names import UpsamplerName, parse_upsampler
from featsharp.training.config import LoopConfig, RunConfig, check_values, flatten
from featsharp.training.distillation import DistillConfig
from featsharp.training.objectives import OBJECTIVES, ObjectiveConfig, config_type
from featsharp.upsamplers import UPSAMPLERS
from featsharp.upsamplers.registration import default_factor

GROUPS = ("model", "upsampler", "datasets", "normalizer", "objective")

# Those whose names need no file.
NAMED = ("model", "upsampler")

C = TypeVar("C", bound=LoopConfig)

# File of the defaults, and groups.
DEFAULTS: dict[type[LoopConfig], tuple[str, tuple[str, ...]]] = {
    RunConfig: ("base_config", GROUPS),
    DistillConfig: ("distill_config", ("datasets", "normalizer")),
}

# Keys whose values the shell may split into several.
DATA_KEYS = ("train_data_dir", "val_data_dir", "dist_train_data_dir")


def compose(overrides: Sequence[str]) -> RunConfig:
    """Compose the typed configuration from overrides like ``["+model=vits14-focus", "num_training_steps=500"]``.

    Raises:
        ConfigError: For an unknown key, a file that a group does not have, a value of the wrong type, or a required
            value that is missing.
    """
    return _compose(overrides, RunConfig, lambda composed: RunConfig(objective=_objective_type(composed.objective)()))


def compose_distillation(overrides: Sequence[str]) -> DistillConfig:
    """Compose the configuration of a distillation; see :func:`compose`."""
    return _compose(overrides, DistillConfig, lambda composed: DistillConfig())


def _compose(overrides: Sequence[str], kind: type[C], schema: Callable[[Any], C]) -> C:
    """Compose a configuration of a ``kind``; ``schema`` makes its defaults for what was composed from files."""
    try:
        from hydra import compose as hydra_compose
        from hydra import initialize_config_module
        from hydra.core.global_hydra import GlobalHydra
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        raise MissingDependencyError('training needs: pip install "featsharp[train]"') from error

    file, groups = DEFAULTS[kind]
    if groups == GROUPS:
        _store_names()
        overrides = _expand_groups(overrides)
    overrides = _quote_texts(overrides, kind)
    _check_overrides(overrides, kind)
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module("featsharp.configs", version_base="1.3"):
            composed = hydra_compose(file, overrides=[_appendable(override) for override in overrides])
        merged = OmegaConf.merge(OmegaConf.structured(schema(composed)), composed)
        # Unresolved, as interpolations of missing values would fail.
        raw: Any = OmegaConf.to_container(merged, resolve=False)
        missing = sorted(key for key, value in flatten(raw).items() if value == "???")
        if missing:
            raise _missing(missing)
        config = OmegaConf.to_object(merged)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"configuration: {_one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError("configuration: a value is nested too deeply") from error
    assert isinstance(config, kind)
    check_values(config)
    return config


def options_of(group: str) -> dict[str, str]:
    """List a config group with descriptions: its files, short names of backbones, names of upsamplers."""
    entries: dict[str, str] = {}
    if group == "model":
        entries = {name: f"{model.description}." for name, model in MODELS.items()}
    elif group == "upsampler":
        entries = {name: f"{UPSAMPLERS[name].description}." for name in UPSAMPLERS}
    folder = files("featsharp.configs").joinpath(group)
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.endswith(".yaml"):
            comments = [
                line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")
            ]
            entries[file.name.removesuffix(".yaml")] = " ".join(c for c in comments if not c.startswith("@"))
    return dict(sorted(entries.items()))


def _quote_texts(overrides: Sequence[str], kind: type[LoopConfig]) -> list[str]:
    r"""Quote what is given for a text where Hydra's grammar would read another value, such as a number, or none.

    A folder ``2024_01`` is no 202401, and paths may have accents, spaces around, "=", "~", "#" or brackets. What is
    written in Hydra's own notation stays: quotes, lists, null, ``a,b``, ``a\=b``, and interpolations.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    texts = {*DATA_KEYS, *(name for name, type_ in _key_types(kind).items() if type_ in (str, str | None))}
    quoted = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if separator and key.lstrip("+") in texts and value.strip() and value[0] not in "'\"[{":
            try:
                parsed = parser.parse_override(override)
                wrong = not parsed.is_sweep_override() and isinstance(parsed.value(), int | float)
            except HydraException:
                wrong = True
            if wrong:
                override = f"{key}={_quote(value)}"
        quoted.append(override)
    return quoted


def _quote(text: str) -> str:
    """Quote a text for Hydra's grammar."""
    # Backslashes count only before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), text)
    return f"'{escaped}'"


def _check_overrides(overrides: Sequence[str], kind: type[LoopConfig]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except (HydraException, RecursionError) as error:
        raise ConfigError(
            f"cannot read the overrides: {first_line(error)}; write key=value, and values that have any of "
            "= { } , in quotes of their own: \"key='value'\""
        ) from error
    keys, groups = _key_types(kind), DEFAULTS[kind][1]
    given = Counter(override.key_or_group for override in parsed)
    for override in parsed:
        key = override.key_or_group
        if given[key] > 1 and key in DATA_KEYS:
            raise ConfigError(
                f"{key} is given {given[key]} times. If that was one value with braces, which the shell takes apart, "
                f"quote it: \"{key}='s-{{000..009}}.tar'\""
            )
        if key in groups:
            value = str(override.value())
            if value not in options_of(key):
                raise unknown_name(key, value, options_of(key))
        elif key not in keys and not key.startswith("upsampler.options."):
            near = difflib.get_close_matches(key, {*keys, *groups}, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"valid keys: {', '.join(sorted(keys))}"
            raise ConfigError(f"unknown configuration key {key!r}; {hint}")


def _store_names() -> None:
    """Register short names of backbones and names of upsamplers as configurations, where there is no file."""
    from hydra.core.config_store import ConfigStore

    nodes = [("model", name, {"model": {"name": name}, "output_subdir": MODELS[name].folder}) for name in MODELS]
    nodes += [("upsampler", name, {"upsampler": {"name": name, "factor": default_factor(name)}}) for name in UPSAMPLERS]
    for group, name, node in nodes:
        # Hydra would merge a file into a stored configuration of its name.
        if not files("featsharp.configs").joinpath(group, f"{name}.yaml").is_file():
            ConfigStore.instance().store(name, node, group, package="_global_")


def _expand_groups(overrides: Sequence[str]) -> list[str]:
    """Write factor and options of ``upsampler=NAME-FACTORx?key=value`` as keys, ``GROUP=NAME`` with Hydra's "+"."""
    values = {key.lstrip("+"): value for key, _, value in (text.partition("=") for text in overrides)}
    given = values.get("upsampler.factor")
    appended = {group for group in NAMED if any(text.startswith((f"+{group}=", f"++{group}=")) for text in overrides)}
    expanded: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.lstrip("+")
        if group not in NAMED:
            expanded.append(override)
            continue
        name, factor, options = UpsamplerName(value) if group == "model" else parse_upsampler(value, options_of(group))
        # A name without "+" replaces one that has it.
        expanded.append(f"{group}={name}" if key == group and group in appended else f"+{group}={name}")
        appended.add(group)
        if factor is not None:
            expanded.append(f"++upsampler.factor={factor:.15g}")
            if given not in (None, f"{factor:g}", str(factor)):
                raise ConfigError(f"{override} and upsampler.factor={given} differ; give one factor")
        for option, one in options.items():
            at = f"upsampler.options.{option}"
            if at in values:
                raise ConfigError(f"{override} and {at}={values[at]} give one option twice; give it once")
            expanded.append(f"++{at}={_quote(one) if isinstance(one, str) else json.dumps(one)}")
    return expanded


def _objective_type(settings: Mapping[str, Any]) -> type[ObjectiveConfig]:
    """Return the settings class of the chosen objective; keys of another one are an error."""
    if not isinstance(settings["name"], str):
        raise unknown_name("objective", settings["name"], OBJECTIVES)
    chosen = config_type(settings["name"])
    valid = [field.name for field in dataclasses.fields(chosen)]
    for key in settings:
        if key not in valid:
            raise ConfigError(
                f"objective {settings['name']!r} has no {key!r}, only {', '.join(valid)}. If the key comes from "
                f"+upsampler=, that preset is for another objective; if from you, choose objective=NAME as a whole: "
                f"{', '.join(OBJECTIVES.names())}"
            )
    return chosen


def _appendable(override: str) -> str:
    """Mark options of an upsampler, which have no defaults, and settings of an objective as additions for Hydra.

    The latter since :func:`_objective_type` has better messages for unknown ones.
    """
    return f"++{override}" if override.startswith(("upsampler.options.", "objective.")) else override


def _key_types(schema: Any, prefix: str = "") -> dict[str, Any]:
    """List every key with its type, groups included."""
    types: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        types[prefix + field.name] = field.type
        if dataclasses.is_dataclass(field.type):
            types |= _key_types(field.type, f"{prefix}{field.name}.")
    if schema is RunConfig:
        for name in OBJECTIVES:
            types |= _key_types(config_type(name), "objective.")
    return types


def _one_line(error: Exception) -> str:
    """Format the message of the configuration library without the names of its types."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("object_type", "reference_type"))]
    return "; ".join(line.replace("full_key:", "at key") for line in kept)


def _missing(keys: list[str]) -> ConfigError:
    hints = {
        "model.name": f"+model=NAME, one of {', '.join(options_of('model'))}",
        "upsampler.name": f"+upsampler=NAME-FACTORx, NAME one of {', '.join(options_of('upsampler'))}",
        "teachers": "teachers=NAME or teachers=[NAME,NAME], of " + ", ".join(options_of("model")),
        "train_data_dir": "train_data_dir=FOLDER of images or tars, or the environment variable FEATSHARP_DATA",
    }
    named = [hints[key] for key in hints if key in keys] or [f"{key}=..." for key in keys]
    return ConfigError("the configuration is not complete; add " + "; and ".join(named))
