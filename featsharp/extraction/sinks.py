"""Formats of a store: where the tensors of a shard go. All keep them as plain bytes, as they are in memory.

safetensors: shards/000012.safetensors, tensors by the picture's key (or a name like it where that cannot be one).
npy: NAME.npy a picture. zarr: an array a picture in features.zarr. webdataset: shards/000012.tar with NAME.features.npy
and NAME.json. A second tensor, the summary, is KEY.summary, NAME.summary.npy and so on.
"""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from featsharp.errors import ConfigError, DataError, FeatSharpError, MissingDependencyError
from featsharp.extraction.mapped import Placed, as_bytes, npy_header, safetensors_layout
from featsharp.extraction.store import FEATURES, SUMMARY, Entry, Record
from featsharp.files import caseless, free_name, remove_leftovers, replacing, write_file
from featsharp.names import dtype_name, readable

ZARR = "features.zarr"
# Writes the entries of a shard, whose keys have these names, and says where they are.
Sink = Callable[[Path, int, Sequence[Entry], Mapping[str, str]], list[Record]]


def check_format(name: str, dtype: torch.dtype) -> Sink:
    """Return the sink of a format.

    Raises:
        ConfigError: For an unknown format, or a type that it lacks.
        MissingDependencyError: For zarr without the package.
    """
    if name not in SINKS:
        raise ConfigError(f"unknown format {name!r}; use {', '.join(SINKS)}")
    if dtype == torch.bfloat16 and name != "safetensors":
        raise ConfigError(f"{name} has no bfloat16; use the format safetensors, or float16")
    if name == "zarr":
        _import_zarr()
    return SINKS[name]


def file_names(keys: Sequence[str], format: str) -> dict[str, str]:
    """Choose the name of each picture's files without their ending; of tensors in shards those that are not the key."""
    if format == "safetensors":
        return _tensor_names(keys)
    taken: set[str] = set()
    # zarr takes a backslash for a slash.
    targets = {key: Path(key.replace("\\", "_") if format == "zarr" else key) for key in keys}
    if format == "zarr":  # an array cannot be a group, too: x.jpg beside a folder x
        taken.update(caseless(folder) for folder in {folder for path in targets.values() for folder in path.parents})
        taken.update(folder.removesuffix(f".{SUMMARY}") for folder in list(taken))
    names = {}
    for key, target in targets.items():
        if format == "webdataset":  # takes all before the first dot for the key of a sample
            target = target.with_name(target.stem.replace(".", "_") or "_")
        # Of another picture, or of zarr itself.
        while any(name.casefold().endswith((f".{SUMMARY}", "zarr.json")) for name in (target.stem, target.name)):
            target = target.with_name(f"{target.name}.{FEATURES}")
        names[key] = free_name(target, taken, f".{FEATURES}.npy").as_posix()
    return names


def _tensor_names(keys: Sequence[str]) -> dict[str, str]:
    """Choose names in place of keys that are no text, have a meaning in the format, or are those of a summary."""
    taken, names = set(keys), {}
    for key in keys:
        name = readable(key)
        if name == "__metadata__" or name.endswith(f".{SUMMARY}"):
            name = f"{name}.{FEATURES}"
        if name != key:
            numbered = (f"{name}-{number}" for number in itertools.count(2))
            names[key] = next(free for free in itertools.chain([name], numbered) if free not in taken)
            taken.add(names[key])
    return names


def _save_safetensors(root: Path, shard: int, entries: Sequence[Entry], names: Mapping[str, str]) -> list[Record]:
    file = _shard_file(shard, ".safetensors")
    names = {entry.key: names.get(entry.key, entry.key) for entry in entries}
    tensors = {_join(names[entry.key], kind): tensor for entry in entries for kind, tensor in entry.tensors.items()}
    if len(tensors) < sum(len(entry.tensors) for entry in entries):
        raise DataError(f"two pictures of shard {shard} have one name; rename one of them")
    sizes = {names[entry.key]: "x".join(map(str, entry.image_size)) for entry in entries}
    header, offsets, _ = safetensors_layout(
        {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()},
        {"image_size": json.dumps(sizes), "layout": "CHW"},
    )
    with replacing(root / file, sync=True) as out:
        out.write(header)
        for key in sorted(offsets, key=offsets.__getitem__):
            out.write(as_bytes(tensors[key]))
    return _record(entries, lambda entry, kind, tensor: _placed(file, offsets[_join(names[entry.key], kind)], tensor))


def _save_npy(root: Path, shard: int, entries: Sequence[Entry], names: Mapping[str, str]) -> list[Record]:
    def save(entry: Entry, kind: str, tensor: Tensor) -> Placed:
        file = Path(_join(names[entry.key], kind) + ".npy")
        header = npy_header(tuple(tensor.shape), tensor.dtype)
        write_file(root / file, header + as_bytes(tensor))
        return _placed(file, len(header), tensor)

    return _record(entries, save)


def _save_zarr(root: Path, shard: int, entries: Sequence[Entry], names: Mapping[str, str]) -> list[Record]:
    zarr = _import_zarr()
    store = zarr.storage.LocalStore(root / ZARR)

    def save(entry: Entry, kind: str, tensor: Tensor) -> Placed:
        path = _join(names[entry.key], kind)
        # One chunk without compression, also where it is all zeros: its file is the tensor.
        array = zarr.create_array(
            store,
            name=path,
            shape=tuple(tensor.shape),
            chunks=tuple(tensor.shape),
            dtype=dtype_name(tensor.dtype),
            compressors=None,
            overwrite=True,
            attributes={"key": readable(entry.key), "image_size": list(entry.image_size)},
            config={"write_empty_chunks": True},
        )
        array[...] = tensor.numpy()
        file = Path(ZARR, path, "c", *["0"] * tensor.ndim)
        if (root / file).stat().st_size != tensor.nbytes:
            raise DataError(f"{root / file} is not the plain chunk that was asked for; is this version of zarr new?")
        return _placed(file, 0, tensor)

    return _record(entries, save)


def _save_webdataset(root: Path, shard: int, entries: Sequence[Entry], names: Mapping[str, str]) -> list[Record]:
    file = _shard_file(shard, ".tar")
    with (
        replacing(root / file, sync=True) as out,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):

        def save(entry: Entry, kind: str, tensor: Tensor) -> Placed:
            header = npy_header(tuple(tensor.shape), tensor.dtype)
            # Each tensor has a name: to webdataset an ending is a field of the sample.
            start = _add_member(tar, f"{names[entry.key]}.{kind}.npy", header + as_bytes(tensor))
            return _placed(file, start + len(header), tensor)

        records = []
        for entry in entries:
            records += _record([entry], save)
            facts = json.dumps({"key": entry.key, "image_size": entry.image_size})
            _add_member(tar, f"{names[entry.key]}.json", facts.encode())
    return records


SINKS: dict[str, Sink] = {
    "safetensors": _save_safetensors,
    "npy": _save_npy,
    "zarr": _save_zarr,
    "webdataset": _save_webdataset,
}


def save_shard(sink: Sink, root: Path, shard: int, entries: Sequence[Entry], names: Mapping[str, str]) -> list[Record]:
    """Write a shard; raises FeatSharpError when that fails: the next one would fail too."""
    try:
        return sink(root, shard, entries, names)
    except OSError as error:
        raise FeatSharpError(
            f"cannot write shard {shard} of {root}: {error.strerror or error}; free some space, then give the same "
            "command again to go on"
        ) from error


def remove_unfinished(root: Path, format: str, older_than: float = 0) -> None:
    """Delete from a store what writers left that were killed at least ``older_than`` seconds ago."""
    everywhere = format in ("npy", "zarr")
    for folder in (root, *root.rglob("*/")) if everywhere else (root, root / "index", root / "shards"):
        remove_leftovers(folder, older_than)
        if format == "zarr":
            remove_leftovers(folder, older_than, "*.partial")  # as zarr names them


def _record(entries: Sequence[Entry], save: Callable[[Entry, str, Tensor], Placed]) -> list[Record]:
    """Call ``save`` with each tensor and its kind, and note where it says that they are."""
    return [
        Record(entry.key, entry.image_size, {kind: save(entry, kind, tensor) for kind, tensor in entry.tensors.items()})
        for entry in entries
    ]


def _join(name: str, kind: str) -> str:
    """Name a tensor: the features of a picture have its own name."""
    return name if kind == FEATURES else f"{name}.{kind}"


def _shard_file(shard: int, ending: str) -> Path:
    return Path("shards", f"{shard:06d}{ending}")


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member without a time; returns the offset of its bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _placed(file: Path, offset: int, tensor: Tensor) -> Placed:
    return Placed(file.as_posix(), offset, dtype_name(tensor.dtype), tuple(tensor.shape))


def _import_zarr():  # type: ignore[no-untyped-def]
    try:
        import zarr
    except ImportError as error:
        raise MissingDependencyError('the format zarr needs: pip install "featsharp[zarr]"') from error
    return zarr
