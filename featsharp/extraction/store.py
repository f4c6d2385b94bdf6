"""Stores: folders of features, an entry a picture, written shard by shard and read at random.

``store.json`` says what the features are. ``index/000012.json`` has the keys of a shard, where its tensors lie, and
the pictures that were skipped; it is written after them, so that a shard is there as a whole or not at all. All formats
keep tensors as plain bytes at an offset of some file (see :mod:`featsharp.extraction.sinks`): reading is a memory map.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from featsharp.errors import ConfigError, DataError
from featsharp.extraction.mapped import Placed, map_tensor
from featsharp.files import write_file

VERSION = 1
FEATURES, SUMMARY = "features", "summary"
CACHED_SHARDS = 64  # of the index, in memory


class Entry(NamedTuple):
    """Tensors of a picture: ``tensors`` by name, "features" and perhaps "summary", on the CPU."""

    key: str
    image_size: tuple[int, int]  # (h, w) in pixels
    tensors: dict[str, Tensor]


class Record(NamedTuple):
    """An entry in the index: where its tensors lie."""

    key: str
    image_size: tuple[int, int]
    tensors: dict[str, Placed]


class FeatureStore(Mapping[str, Tensor]):
    """Features by key, memory-mapped; of an unfinished store those that are there.

    Args:
        path: The folder that ``featsharp extract`` wrote.

    Attributes:
        options: What the features are: backbone, upsampler, factor, format, ...
        total: Pictures of the source; fewer are in the store where it is unfinished or some were skipped.
        skipped: The (name, reason) of pictures that could not be read or encoded.
        complete: Whether every shard is there; otherwise the command that made the store goes on with it.

    Raises:
        DataError: For a folder that is no store, or a damaged one.

    Example:
        >>> store = featsharp.extraction.open("features")  # doctest: +SKIP
        >>> store["photos/a.jpg"].shape  # doctest: +SKIP
        torch.Size([384, 32, 32])
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        plan = read_plan(self.path)
        if plan is None:
            raise DataError(f"{path} is no store of features; 'featsharp extract PHOTOS -o {path}' makes one")
        self.options: dict[str, Any] = plan["options"]
        self.total: int = plan["pictures"]
        self._shard_of: dict[str, int] = {}
        self._cache: dict[int, dict[str, Record]] = {}
        self.skipped: list[tuple[str, str]] = [(name, reason) for name, reason in plan["skipped"]]
        shards = list_shards(self.path)
        for shard in shards:
            records, skipped = _read_index(self.path, shard)
            self._shard_of.update(dict.fromkeys(records, shard))
            self.skipped += skipped
        self.complete = len(shards) == -(-self.total // self.options["shard_size"])

    def __getitem__(self, key: str) -> Tensor:
        """Map the features of a picture: [C, h, w], or [C] where they were pooled."""
        return self.tensor(key)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __contains__(self, key: object) -> bool:
        return key in self._shard_of

    def tensor(self, key: str, name: str = FEATURES) -> Tensor:
        """Map a tensor of a picture; changes to it are not written.

        Args:
            key: Of the picture.
            name: "features", or "summary" where the store has summaries.

        Raises:
            KeyError: For a picture or a tensor that the store lacks.
        """
        record = self._record(key)
        if name not in record.tensors:
            raise KeyError(f"{key} has no {name!r} in {self.path}; it has {', '.join(record.tensors)}")
        return map_tensor(self.path, record.tensors[name])

    def image_size(self, key: str) -> tuple[int, int]:
        """Return the (h, w) of a picture in pixels, as it was before it was scaled for the backbone."""
        return self._record(key).image_size

    def dataset(self, name: str = FEATURES) -> "FeatureDataset":
        """Return the entries as a dataset for torch's loaders, by number: (key, tensor)."""
        return FeatureDataset(self, name)

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, {len(self)} of {self.total} pictures)"

    def _record(self, key: str) -> Record:
        if key not in self._shard_of:
            near = next(iter(self._shard_of), None)
            reason = dict(self.skipped).get(key)
            why = f"it was skipped: {reason}" if reason else f"keys look like {near!r}"
            raise KeyError(f"{key!r} is not in {self.path}; {why}")
        return self._records(self._shard_of[key])[key]

    def _records(self, shard: int) -> dict[str, Record]:
        if shard not in self._cache:
            if len(self._cache) >= CACHED_SHARDS:
                self._cache.clear()
            self._cache[shard] = _read_index(self.path, shard)[0]
        return self._cache[shard]


class FeatureDataset(Dataset[tuple[str, Tensor]]):
    """Entries of a store by number; safe for worker processes."""

    def __init__(self, store: FeatureStore, name: str = FEATURES) -> None:
        self.store, self.name, self.keys = store, name, list(store)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        return self.keys[index], self.store.tensor(self.keys[index], self.name)


# Writing


def read_plan(path: Path) -> dict[str, Any] | None:
    """Read what a store is made of; None where there is none."""
    try:
        plan: dict[str, Any] = json.loads((path / "store.json").read_text("utf-8"))
        if plan["version"] != VERSION:
            raise ConfigError(f"{path} is a store of version {plan['version']}, this featsharp knows {VERSION}")
        return plan
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/store.json is damaged ({error}); use another folder") from error


def start_store(path: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan of a new store, or check that the one that is there has the same.

    Raises:
        ConfigError: For another plan, with what differs, and a folder that holds other files.
        FeatSharpError: When it cannot be written.
    """
    plan = json.loads(json.dumps({"version": VERSION, **plan}))
    there = read_plan(path)
    if there is None and _holds_files(path):
        there = read_plan(path)  # which another process may have written just now
        if there is None:
            raise ConfigError(f"{path} exists and is no store of features; choose another place with -o")
    if there is None:
        write_file(path / "store.json", json.dumps(plan, indent=1).encode())
        return
    flat = ({**p["options"], **{key: value for key, value in p.items() if key != "options"}} for p in (there, plan))
    old, new = flat
    differ = [key for key in new | old if old.get(key) != new.get(key)]
    changed = [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in differ if key not in ("names", "sizes")]
    if "pictures" not in differ and {"names", "sizes"} & set(differ):
        changed.append("pictures of other names" if "names" in differ else "files of the same names have other sizes")
    if changed:
        raise ConfigError(
            f"{path} was made with other options or pictures ({'; '.join(changed)}); give the same ones to go on with "
            "it, or choose another place with -o"
        )


def _holds_files(path: Path) -> bool:
    """Tell whether there is anything but files that are being written."""
    return path.exists() and (not path.is_dir() or any(not file.name.endswith(".tmp") for file in path.iterdir()))


def list_shards(path: Path) -> list[int]:
    """List the numbers of the shards that are whole."""
    return sorted(int(file.stem) for file in (path / "index").glob("[0-9]*.json"))


def write_index(path: Path, shard: int, records: Sequence[Record], skipped: Sequence[tuple[str, str]]) -> None:
    """Declare a shard whole; raises FeatSharpError when that cannot be written."""
    entries = [
        {
            "key": record.key,
            "image_size": record.image_size,
            "tensors": {name: place._asdict() for name, place in record.tensors.items()},
        }
        for record in records
    ]
    text = json.dumps({"entries": entries, "skipped": [list(entry) for entry in skipped]})
    write_file(index_file(path, shard), text.encode())  # JSON escapes what UTF-8 cannot say


def index_file(path: Path, shard: int) -> Path:
    """Name the index of a shard."""
    return path / "index" / f"{shard:06d}.json"


def _read_index(path: Path, shard: int) -> tuple[dict[str, Record], list[tuple[str, str]]]:
    file = index_file(path, shard)
    try:
        content = json.loads(file.read_text("utf-8"))
        records = {
            entry["key"]: Record(
                entry["key"],
                (int(entry["image_size"][0]), int(entry["image_size"][1])),
                {name: Placed(**{**place, "shape": tuple(place["shape"])}) for name, place in entry["tensors"].items()},
            )
            for entry in content["entries"]
        }
        return records, [(name, reason) for name, reason in content["skipped"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is damaged ({error}); delete it, and the command that made the store mends it"
        ) from error


def open_store(path: str | PathLike[str]) -> FeatureStore:
    """Open the features that ``featsharp extract`` wrote; see :class:`FeatureStore`."""
    return FeatureStore(path)
