"""Images for training: folders and tar shards with random access, mixed by weight in a reproducible order.

Tar shards are the webdataset kind, but they are not streamed: each is indexed once by its headers and then read by
seeking. That way any sample number leads straight to one image, so a run resumes exactly where it stopped and the order
depends on neither the number of ranks nor the number of workers.
"""

import functools
import hashlib
import logging
import math
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from featsharp.data._tar import index_tar, is_compressed_name, refuse_compressed
from featsharp.data.images import IMAGE_EXTENSIONS, decode_image, is_image_name
from featsharp.errors import ConfigError, DataError, InputError

logger = logging.getLogger(__name__)

MIN_SIDE = 8  # pixels; what is smaller carries nothing to learn from
MAX_FAILURES = 100  # unusable images in a row before a mixture gives up

_PLAIN_FILE = -1  # in place of a shard number
_EXPECTED = (
    f"expected image files ({' '.join(IMAGE_EXTENSIONS)}) or webdataset .tar shards of them, at any depth of a folder"
)
_PERIOD = 1 << 64
_GOLDEN_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the steps that cover a circle most evenly


class WeightedPath(NamedTuple):
    """One entry of ``train_data_dir`` and its kin."""

    path: Path
    weight: float = 1.0


class LoadedImage(NamedTuple):
    """An image of a mixture, and the (name, reason) of those that could not be used in its place."""

    image: Image.Image  # RGB
    name: str
    skipped: list[tuple[str, str]]


class ImageSource:
    """A fixed list of encoded images in plain files and tar shards; made by :func:`open_source`.

    Reading opens the file each time, so one source may be used from any number of threads and worker processes. The
    index is held in a few flat arrays: about 32 bytes and a name per image.

    Attributes:
        path: The folder or tar file; names are relative to it.
        problems: What was found damaged while indexing, a line each, file name first.
        num_shards: Tar files with at least one image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self._shards: list[Path] = []
        self._shard_of = array("q")
        self._offsets = array("q")
        self._sizes = array("q")
        self._names = bytearray()
        self._name_ends = array("q")

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, index: int) -> str:
        """Name of an image relative to ``path``: ``folder/x.jpg``, or ``folder/shard.tar/x.jpg`` inside a tar."""
        self._check(index)
        start = self._name_ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._names[start : self._name_ends[index]]))

    def read(self, index: int) -> bytes:
        """Encoded bytes of an image; raises DataError when the file cannot be read (any more)."""
        self._check(index)
        shard, size = self._shard_of[index], self._sizes[index]
        try:
            if shard == _PLAIN_FILE:
                return (self.path / self.name(index)).read_bytes()
            with open(self._shards[shard], "rb") as file:
                file.seek(self._offsets[index])
                data = file.read(size)
        except OSError as error:
            raise DataError(f"{self.path}/{self.name(index)}: cannot be read ({error.strerror or error})") from error
        if len(data) != size:
            raise DataError(f"{self.path}/{self.name(index)}: the tar file has become shorter since it was indexed")
        return data

    def __repr__(self) -> str:
        return f"ImageSource({str(self.path)!r}, {len(self)} images, {self.num_shards} shards)"

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")

    def _append(self, name: str, shard: int = _PLAIN_FILE, offset: int = 0, size: int = 0) -> None:
        self._names += os.fsencode(name)
        self._name_ends.append(len(self._names))
        self._shard_of.append(shard)
        self._offsets.append(offset)
        self._sizes.append(size)

    def _append_tar(self, path: Path, prefix: str) -> None:
        members, problems = index_tar(path)
        self.problems += problems
        for member in members:
            self._append(prefix + member.name, len(self._shards), member.offset, member.size)
        if members:
            self._shards.append(path)


def open_source(path: str | os.PathLike[str], *, exclude: str | os.PathLike[str] | None = None) -> ImageSource:
    """Index a folder of images and/or ``.tar`` shards (nested, symbolic links followed), or one ``.tar`` file.

    The order is that of the sorted relative paths, within a shard that of its members. Only names with an image
    extension count; other members (``.json``, ``.cls``, ``.pyd``, ...) and hidden files are ignored and never decoded.
    Damaged shards give the members before the damage and a line in ``problems``.

    Args:
        path: The folder or tar file.
        exclude: A folder below ``path`` to leave out.

    Raises:
        DataError: The path is missing, neither folder nor tar, or without a single image; or a tar is compressed.
    """
    source = ImageSource(Path(path))
    if source.path.is_dir():
        skip = Path(exclude).resolve() if exclude is not None else None
        for name in sorted(_files(source.path, skip, source.problems)):
            if is_image_name(name):
                source._append(name)
            elif is_compressed_name(name):
                raise refuse_compressed(source.path / name)
            elif name.lower().endswith(".tar"):
                source._append_tar(source.path / name, f"{name}/")
    elif not source.path.exists():
        raise DataError(f"{source.path}: no such file or folder; {_EXPECTED}")
    elif is_compressed_name(source.path.name):
        raise refuse_compressed(source.path)
    elif source.path.suffix.lower() == ".tar":
        source._append_tar(source.path, "")
    else:
        raise DataError(f"{source.path}: neither a folder nor a .tar file; {_EXPECTED}")
    if not len(source):
        found = f" ({'; '.join(source.problems)})" if source.problems else ""
        raise DataError(f"{source.path}: no images found; {_EXPECTED}{found}")
    for problem in source.problems:
        _warn_once(problem)
    return source


@functools.cache
def _warn_once(problem: str) -> None:
    # Training, validation and statistics often read the same folder.
    logger.warning("%s", problem)


def parse_data_dir(value: object) -> list[WeightedPath]:
    """The entries of a ``*_data_dir`` setting: a path, or a list whose entries are a path or ``[path, weight]``.

    ``~`` and environment variables are expanded. A weight is the share of samples that a source gets, whatever its
    size; it is 1 where none is given. Raises ConfigError for anything else.
    """
    if isinstance(value, (str, os.PathLike)):
        return [_weighted_path(value, 1.0)]
    if not isinstance(value, Sequence) or not value:
        raise ConfigError(f"no data given: expected a path or a list of paths or [path, weight] pairs, got {value!r}")
    entries = []
    for entry in value:
        if isinstance(entry, (str, os.PathLike)):
            entries.append(_weighted_path(entry, 1.0))
        elif isinstance(entry, Sequence) and len(entry) == 2:
            entries.append(_weighted_path(entry[0], entry[1]))
        else:
            raise ConfigError(f"data entry {entry!r} is neither a path nor [path, weight]; write [[path, weight], ...]")
    return entries


class ImageMixture:
    """An endless sequence of images from several sources, the same for the same seed.

    Sample n comes from a source with probability proportional to its weight (over seeds; within one sequence the shares
    are kept as evenly as a golden-ratio rotation can). Each source is walked in shuffled epochs: all of its images,
    in an order of that epoch's own, before any comes again. Both are functions of (seed, n) alone, with nothing stored,
    so any sample number costs the same few dozen integer steps.

    Args:
        sources: At least one.
        weights: One positive number per source; None for equal shares.
        seed: Any integer.

    Raises:
        ConfigError: No source, or weights that do not fit.
    """

    def __init__(
        self, sources: Sequence[ImageSource], weights: Sequence[float] | None = None, *, seed: int = 0
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if not sources or len(weights) != len(sources) or not all(_is_weight(weight) for weight in weights):
            raise ConfigError(f"{len(sources)} sources, weights {weights}: one positive number per source is needed")
        self.sources = list(sources)
        self.weights = weights
        self.seed = seed
        self._phase = _hash(seed) % _PERIOD
        self._bounds = _share_bounds(weights)

    @classmethod
    def from_data_dir(cls, value: object, *, seed: int = 0) -> "ImageMixture":
        """Open all that a ``*_data_dir`` setting names; see :func:`parse_data_dir` and :func:`open_source`."""
        entries = parse_data_dir(value)
        return cls([open_source(entry.path) for entry in entries], [entry.weight for entry in entries], seed=seed)

    @property
    def num_images(self) -> int:
        """Images over all sources."""
        return sum(len(source) for source in self.sources)

    def locate(self, n: int) -> tuple[int, int]:
        """(source index, image index) of sample ``n >= 0``."""
        if n < 0:
            raise InputError(f"sample numbers start at 0, got {n}")
        source = bisect_right(self._bounds, (_GOLDEN_STEP * n + self._phase) % _PERIOD) - 1
        low, high = self._bounds[source], self._bounds[source + 1]
        # Count the samples of this source before n: of the rotation x, floor((x - low) / period) -
        # floor((x - high) / period) is 1 where x lies in [low, high) (modulo the period) and 0 elsewhere.
        earlier = _floor_sum(n, _PERIOD, _GOLDEN_STEP, self._phase - low)
        earlier -= _floor_sum(n, _PERIOD, _GOLDEN_STEP, self._phase - high)
        epoch, position = divmod(earlier, len(self.sources[source]))
        return source, _shuffled(position, len(self.sources[source]), _hash(self.seed, source, epoch))

    def load(self, n: int) -> LoadedImage:
        """Decode sample ``n``; an unusable image is replaced by another of the mixture, always the same for this n.

        Unusable are images that cannot be read or decoded, have a side below 8 pixels, or are uniform (no channel spans
        more than one level). Raises DataError after 100 of them in a row.
        """
        skipped: list[tuple[str, str]] = []
        candidate = n
        while len(skipped) < MAX_FAILURES:
            source_index, index = self.locate(candidate)
            source = self.sources[source_index]
            name = f"{source.path}/{source.name(index)}"  # a path join would let an absolute member name win
            try:
                image = decode_image(source.read(index), name=name)
                reason = _unusable(image)
            except DataError as error:
                reason = str(error).removeprefix(f"{name}: ")
            if not reason:
                return LoadedImage(image, name, skipped)
            skipped.append((name, reason))
            candidate = _hash(self.seed, n, len(skipped)) >> 16
        raise DataError(
            f"sample {n}: {len(skipped)} images in a row cannot be used, the last being {name} ({reason}); "
            f"check the data in {', '.join(str(source.path) for source in self.sources)}"
        )


def _files(root: Path, exclude: Path | None, problems: list[str]) -> Iterator[str]:
    """Relative names of all files below ``root`` that are not hidden; each folder once, even if links form a loop."""
    seen: set[str] = set()

    def note(error: OSError) -> None:
        problems.append(f"{error.filename}: cannot be listed ({error.strerror})")

    for folder, folders, files in os.walk(root, followlinks=True, onerror=note):
        real = os.path.realpath(folder)
        if real in seen or (exclude is not None and Path(real) == exclude):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(_visible(folders))
        for file in _visible(files):
            yield Path(folder, file).relative_to(root).as_posix()


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _weighted_path(path: object, weight: object) -> WeightedPath:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(f"data entry with path {path!r}: a folder or .tar file is needed")
    if not _is_weight(weight):
        raise ConfigError(f"data entry {str(path)!r} has weight {weight!r}; a positive number is needed")
    return WeightedPath(Path(os.path.expandvars(path)).expanduser(), float(weight))  # type: ignore[arg-type]


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _unusable(image: Image.Image) -> str:
    """Why an image is of no use for training; empty when it is."""
    if min(image.size) < MIN_SIDE:
        return f"{image.width} x {image.height} pixels, smaller than {MIN_SIDE}"
    ranges = [int(high) - int(low) for low, high in image.getextrema()]  # type: ignore[misc]
    return "uniform colour" if max(ranges) <= 1 else ""


def _share_bounds(weights: Sequence[float]) -> list[int]:
    """Cumulative shares of the circle of 2^64 steps, from 0 to the full circle; exact fractions, so none is lost."""
    parts = [Fraction(weight) for weight in weights]
    return [int(sum(parts[:count]) / sum(parts) * _PERIOD) for count in range(len(parts) + 1)]


def _floor_sum(count: int, modulus: int, step: int, start: int) -> int:
    """Sum over i < count of floor((step * i + start) / modulus), by Euclid's reduction: O(log modulus) steps."""
    total = 0
    while True:
        whole, step = divmod(step, modulus)
        offset, start = divmod(start, modulus)
        total += whole * (count * (count - 1) // 2) + offset * count
        # What is left counts lattice points under a line of slope < 1: count them along the other axis.
        rows, start = divmod(step * count + start, modulus)
        if rows == 0:
            return total
        count, modulus, step = rows, step, modulus


def _shuffled(position: int, length: int, key: int) -> int:
    """Image of ``position`` under a pseudo-random permutation of range(length).

    A Feistel network permutes the next power of two; values beyond the length are sent through it again until they
    fall inside, which keeps it a permutation.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for turn in range(6):
            left, right = right, left ^ (_hash(key, turn, right) & mask)
        value = left << half | right
        if value < length:
            return value


def _hash(*values: int) -> int:
    """64 pseudo-random bits of some integers, the same on every machine and version."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")
