"""Modules of torch.hub repositories, by name: ``hub:OWNER/REPO[:REF]/ENTRY``, or ``hub:DIR/ENTRY`` for a local clone.

Such a repository is code that runs on this machine. It runs only when the name says ``?trust=true``, when it lies in
torch's hub cache already (nothing is fetched then), or when the name is a directory. A directory is a name that starts
with ``/``, ``./``, ``../`` or ``~``, or that has no owner in it.

What an entry returns is understood by its methods (see :mod:`featsharp.backbones._hub_models`): DINO, DINOv2 and
DINOv3, RADIO; everything else by trying it out, as :func:`featsharp.backbones.from_callable` does.

Not verified against the real repositories, whose code cannot be shipped: this follows their documented interfaces, and
tests run it on modules that have these. Every module is tried on a few images when it is built, so that a change of its
interface is an error there and not wrong features. In detail unverified: that RADIO's ``max_resolution`` holds for each
side, that its conditioner is a plain whitening (checked at run time), and that the blocks of DINOv3 keep ``attn.qkv``.
"""

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featsharp.backbones._hub_models import DinoBackbone, RadioBackbone, is_dino, is_radio
from featsharp.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from featsharp.backbones.from_callable import from_callable
from featsharp.backbones.loading import fill, first_line
from featsharp.backbones.options import Options
from featsharp.errors import CheckpointError, ConfigError, MissingDependencyError, unknown_name

DEFAULT_SIZE = (224, 224)  # for modules that do not say theirs


def build(name: str, spec: str, choices: Options) -> Backbone:
    """Build ``hub:OWNER/REPO[:REF]/ENTRY``.

    Options: ``layer``, ``facet``, ``summary``, ``pretrained``, ``img_size``, ``weights`` as in
    :class:`featsharp.backbones.options.Options`, and

    - ``trust=true``: fetch and run the code of the repository.
    - ``version``, ``adaptor_names``: handed to the entry (RADIO); ``version`` may be a local checkpoint.
    - ``mean``, ``std``: the whitening, three numbers with commas, where the module cannot say it; ImageNet's otherwise.

    ``pretrained=false`` and ``weights=FILE`` (a state dict of the module) call the entry with ``pretrained=False``.

    Raises:
        ConfigError: For a repository that is not trusted, an unknown entry or option, or a module that cannot be
            understood.
        CheckpointError: For weights that do not fill the module exactly.
        MissingDependencyError: When the code, a package that it needs, or the weights cannot be had.
    """
    repository, slash, entry = spec.rpartition("/")
    if not (slash and entry):
        raise ConfigError(f"write hub:OWNER/REPO[:REF]/ENTRY or hub:DIR/ENTRY; got 'hub:{spec}'")
    adaptors = list(choices.adaptor_names)
    arguments: dict[str, Any] = {}
    if choices.version is not None:
        arguments["version"] = choices.version
    if adaptors:
        arguments["adaptor_names"] = adaptors
    if not choices.pretrained or choices.weights is not None:
        arguments["pretrained"] = False
    folder = _local_folder(repository)
    if folder is None and not choices.trust:
        raise ConfigError(
            f"hub:{spec} runs code of the repository https://github.com/{repository.partition(':')[0]} on this "
            f"machine; if you trust it add ?trust=true, or clone it, look at it, and write hub:DIR/{entry}"
        )
    model = _load(spec, repository, folder, entry, arguments)
    if is_radio(model) and "pretrained" in arguments:
        raise ConfigError(f"hub:{spec} is a RADIO model, which takes its checkpoint as ?version=FILE, not as weights")
    if choices.weights is not None:
        _fill_from(model, Path(choices.weights), spec)
    return _wrap(name, model, choices, adaptors)


def _local_folder(repository: str) -> Path | None:
    """The directory with the code: the one that is named, or that of torch's hub cache; None when it is not here."""
    named = re.fullmatch(r"([\w.-]+)/([\w.-]+)(?::(.+))?", repository)
    if repository.startswith(("/", "./", "../", "~")) or named is None:
        folder = Path(repository).expanduser()
        if not (folder / "hubconf.py").is_file():
            raise ConfigError(f"{folder} is no torch.hub repository: there is no hubconf.py in it")
        return folder
    owner, project, ref = named.groups()
    for branch in [ref] if ref else ["main", "master"]:
        folder = Path(torch.hub.get_dir()) / f"{owner}_{project}_{branch.replace('/', '_')}"
        if (folder / "hubconf.py").is_file():
            return folder
    return None


def _load(spec: str, repository: str, folder: Path | None, entry: str, arguments: dict[str, Any]) -> nn.Module:
    """Call the entry; random weights are the same at every call."""
    with _explained(spec, repository, folder, entry, arguments), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if folder is None:
            model = torch.hub.load(repository, entry, trust_repo=True, **arguments)
        else:  # the cache too: by its name torch would ask the network for the branch
            model = torch.hub.load(str(folder), entry, source="local", **arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"hub:{spec} returns a {type(model).__name__}, not a module")
    return model.eval()


@contextmanager
def _explained(
    spec: str, repository: str, folder: Path | None, entry: str, arguments: dict[str, Any]
) -> Iterator[None]:
    """Errors of foreign code as ours, with what to do."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"the code of hub:{spec} needs a package ({error}); install it") from error
    except Exception as error:
        # Where it cannot ask for a branch, torch raises a RuntimeError from the URLError.
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            raise MissingDependencyError(
                f"code or weights of hub:{spec} are not on this machine and cannot be fetched ({first_line(error)}); "
                f"with a network, run once: python -c \"import torch; torch.hub.load('{repository}', '{entry}')\"; or "
                f"give a state dict, ?weights=FILE, or take random weights, ?pretrained=false"
            ) from error
        if str(error).startswith("Missing dependencies"):  # torch, about the list of that name in hubconf.py
            raise MissingDependencyError(f"the code of hub:{spec} needs packages; {first_line(error)}") from error
        if str(error).startswith("Cannot find callable") and folder is not None:
            raise unknown_name(f"entry of {folder}:", entry, _entries(folder)) from error
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise ConfigError(
            f"the entry {entry!r} of {repository} fails with {given}: {first_line(error)}; not every entry takes "
            f"pretrained (RADIO takes its checkpoint as ?version=FILE) or version"
        ) from error


def _entries(folder: Path) -> list[str]:
    """Names that hubconf.py defines or imports for others, read without running it."""
    names: list[str] = []
    for node in ast.parse((folder / "hubconf.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
    return [name for name in names if not name.startswith("_")]


def _fill_from(model: nn.Module, path: Path, spec: str) -> None:
    """Fill the module from a state dict, alone in its file or under ``state_dict``, ``model`` or ``teacher``."""
    if not path.is_file():
        raise ConfigError(f"weights={path} is not there; give a file with the state dict of hub:{spec}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading a foreign file raises, the message has to name it
        raise CheckpointError(f"{path} cannot be read as a state dict ({first_line(error)})") from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict")
    fill(model, state, f"{path} is not a checkpoint of hub:{spec}")


def _wrap(name: str, model: nn.Module, choices: Options, adaptors: list[str]) -> Backbone:
    """The module as a backbone of the kind that its methods tell."""
    whitening = {key: value for key in ("mean", "std") if (value := getattr(choices, key)) is not None}
    backbone: Backbone
    if is_radio(model):
        if whitening:
            raise ConfigError(f"backbone {name!r} brings its own whitening; leave out {' and '.join(whitening)}")
        backbone = RadioBackbone(name, model, choices, adaptor_names=adaptors, input_size=choices.img_size)
    elif is_dino(model):
        backbone = DinoBackbone(name, model, choices, input_size=choices.img_size, **whitening)
    else:
        backbone = _by_trial(name, model, choices, whitening)
    if backbone.fit_size(*backbone.input_size) != backbone.input_size:
        height, width = backbone.fit_size(*backbone.input_size)
        raise ConfigError(
            f"img_size of {name!r} has to be whole patches of {backbone.patch_size}; the nearest is {height}x{width}"
        )
    return backbone


def _by_trial(name: str, model: Any, choices: Options, whitening: dict[str, tuple[float, float, float]]) -> Backbone:
    if choices.layer is not None or choices.facet != "token" or choices.summary != "default":
        raise ConfigError(
            f"backbone {name!r} ({type(model).__name__}) is of no kind that is known, so layer, facet and summary do "
            f"not apply; load it with torch.hub and wrap what you want with featsharp.backbones.from_callable"
        )
    return from_callable(
        model.forward_features if callable(getattr(model, "forward_features", None)) else model,
        name=name,
        input_size=choices.img_size or DEFAULT_SIZE,
        mean=whitening.get("mean", IMAGENET_MEAN),
        std=whitening.get("std", IMAGENET_STD),
    )
