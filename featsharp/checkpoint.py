"""The checkpoint file: tensors and plain values only, written atomically, read without running code.

A file is one dictionary: ``format`` and ``version``; ``encoder`` (how to rebuild the sharp encoder, and which backbone
it belongs to); ``model`` (its tensors, without the backbone's); ``config`` (the composed training configuration, or
None); ``training`` (everything a resumed run needs, or None).
"""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from featsharp.errors import CheckpointError

FORMAT = "featsharp"
VERSION = 1
KEYS = ("encoder", "model", "config", "training")


def write_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash or a full disk never costs the file that was there before.

    Raises:
        CheckpointError: When the file cannot be written; whatever was at ``path`` is still intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        raise CheckpointError(
            f"cannot write checkpoint {path}: {_first_line(error)}. An earlier file of that name is unchanged; free "
            "some space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            temporary.unlink()


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint on the CPU with weights-only semantics.

    Raises:
        CheckpointError: When the file is missing, damaged, of another kind, or holds anything but tensors and values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist{_beside(path)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds objects other than tensors and plain values, which could run code; "
            "it was not loaded"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({_first_line(error)}); is it truncated?") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a featsharp checkpoint; `featsharp train` writes them")
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"checkpoint {path} has version {version}, newer than this featsharp; upgrade it")
    lacking = [key for key in KEYS if key not in content]
    if not isinstance(version, int) or lacking:
        raise CheckpointError(f"checkpoint {path} is not complete: it lacks {', '.join(lacking) or 'a version number'}")
    return content


def _beside(path: Path) -> str:
    """The checkpoints in the folder of a missing one."""
    found = sorted(p.name for p in path.parent.glob("*.pth")) if path.parent.is_dir() else []
    return f"; that folder has {', '.join(found[:5])}" if found else ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
