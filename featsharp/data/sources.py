"""Images for training: folders and tar shards with random access, mixed by weight in a reproducible order.

Tar shards are the webdataset kind, but local ones are not streamed: each is indexed once by its headers and then read
by seeking. That way any sample number leads straight to one image, so a run resumes exactly where it stopped and the
order depends on neither the number of ranks nor the number of workers. Shards by URL or from a command are streams.
"""

import functools
import itertools
import logging
import math
import os
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from featsharp.data._order import floor_sum, hash_bits, shuffled
from featsharp.data._tar import count_of_others, index_tar, is_compressed_name, refuse_compressed
from featsharp.data.filters import ImageFilter
from featsharp.data.images import IMAGE_EXTENSIONS, decode_image, is_image_name
from featsharp.data.streams import (
    PIPE,
    SHUFFLE_BUFFER,
    ShardStream,
    StreamPlace,
    expand_braces,
    is_stream,
    told_apart,
)
from featsharp.errors import ConfigError, DataError, InputError
from featsharp.urls import redact_setting

logger = logging.getLogger(__name__)

# Unusable images in a row before a mixture gives up. A filter that keeps one image in 200 never gets there; where it
# keeps none, the error comes after a minute or two.
MAX_FAILURES = 10_000

_PLAIN_FILE = -1  # in place of a shard number
_EXPECTED = (
    f"expected image files ({' '.join(IMAGE_EXTENSIONS)}) or webdataset .tar shards of them, at any depth of a folder"
)
_PERIOD = 1 << 64
_GOLDEN_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the steps that cover a circle most evenly


class WeightedPath(NamedTuple):
    """One entry of ``train_data_dir`` and its kin."""

    path: Path | str  # the latter names shards that are streamed
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
        skipped: The (name, reason) of what was found damaged or refused while indexing.
        num_others: Files and tar members that are no images by name.
        num_shards: Tar files with at least one image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped: list[tuple[str, str]] = []
        self.num_others = 0
        self._shards: list[Path] = []
        self._shard_of = array("q")
        self._offsets = array("q")
        self._sizes = array("q")
        self._names = bytearray()
        self._name_ends = array("q")

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    @property
    def problems(self) -> list[str]:
        """``skipped`` as a line each."""
        return [f"{name}: {reason}" for name, reason in self.skipped]

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
        members, skipped, others = index_tar(path)
        self.skipped += skipped
        self.num_others += others
        for member in members:
            self._append(prefix + member.name, len(self._shards), member.offset, member.size)
        if members:
            self._shards.append(path)


def open_source(path: str | os.PathLike[str], *, exclude: str | os.PathLike[str] | None = None) -> ImageSource:
    """Index a folder of images and/or ``.tar`` shards (nested, symbolic links followed), or a ``.tar`` file.

    Ranges in braces name several files: ``shard-{000..099}.tar``.

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
        for name in sorted(_files(source.path, skip, source.skipped)):
            if is_image_name(name):
                source._append(name)
            elif is_compressed_name(name):
                raise refuse_compressed(source.path / name)
            elif name.lower().endswith(".tar"):
                source._append_tar(source.path / name, f"{name}/")
            else:
                source.num_others += 1
    elif "{" in source.path.name and not source.path.exists():
        source = _open_shards(source.path)
    elif not source.path.exists():
        raise DataError(f"{source.path}: no such file or folder; {_EXPECTED}")
    elif is_compressed_name(source.path.name):
        raise refuse_compressed(source.path)
    elif source.path.suffix.lower() == ".tar":
        source._append_tar(source.path, "")
    else:
        raise DataError(f"{source.path}: neither a folder nor a .tar file; {_EXPECTED}")
    if not len(source):
        kinds = _said([*source.skipped, *([("", count_of_others(source.num_others))] if source.num_others else [])])
        found = f"; found: {kinds}" if kinds else ""
        found += f" (the first, {source.problems[0]})" if source.problems else ""
        raise DataError(f"{source.path}: no images found; {_EXPECTED}{found}")
    for problem in source.problems:
        _warn_once(problem)
    return source


def _open_shards(pattern: Path) -> ImageSource:
    """The tars that a name with braces stands for, as a source of their folder."""
    source = ImageSource(pattern.parent)
    names = expand_braces(pattern.name)
    for name in names:
        if not name.lower().endswith(".tar"):
            raise DataError(f"{pattern}: stands for {name}, which is no .tar file; write shard-{{000..099}}.tar")
    if missing := [name for name in names if not (source.path / name).exists()]:
        raise DataError(
            f"{pattern}: {len(missing)} of {len(names)} files are missing, the first {source.path / missing[0]}; "
            "name the shards that are there"
        )
    for name in names:
        source._append_tar(source.path / name, f"{name}/")
    return source


@functools.cache
def _warn_once(problem: str) -> None:
    # Training, validation and statistics often read the same folder.
    logger.warning("%s", problem)


def parse_data_dir(value: object) -> list[WeightedPath]:
    """The entries of a ``*_data_dir`` setting: a path, or a list whose entries are a path or ``[path, weight]``.

    A path is that of a folder or a tar file, or ``http(s)://...`` or ``pipe:COMMAND`` as :class:`ShardStream` takes it.
    ``~`` and environment variables are expanded, except in commands, where that is the shell's. A weight is the share
    of samples that a source gets, whatever its size; it is 1 where none is given. Raises ConfigError for anything else.
    """
    if isinstance(value, (str, os.PathLike)):
        return [_weighted_path(value, 1.0)]
    if not isinstance(value, Sequence) or not value:
        expected = "expected a path or a list of paths or [path, weight] pairs"
        raise ConfigError(f"no data given: {expected}, got {_given(value)}")
    entries = []
    for entry in value:
        if isinstance(entry, (str, os.PathLike)):
            entries.append(_weighted_path(entry, 1.0))
        elif isinstance(entry, Sequence) and len(entry) == 2:
            entries.append(_weighted_path(entry[0], entry[1]))
        else:
            raise ConfigError(
                f"data entry {_given(entry)} is neither a path nor [path, weight]; write [[path, weight], ...]"
            )
    return entries


class Division(NamedTuple):
    """How the sample numbers of a run are divided among its readers (see ``featsharp.data.streams``).

    Rank r of ``world`` takes the samples ``(s * world + r) * batch_size ...`` in step s; its worker s modulo
    ``workers`` decodes them.
    """

    batch_size: int = 1
    world: int = 1
    workers: int = 1

    @property
    def readers(self) -> int:
        return self.world * self.workers

    def reader(self, n: int) -> int:
        """The reader of sample ``n``."""
        step, rest = divmod(n, self.batch_size * self.world)
        return rest // self.batch_size * self.workers + step % self.workers

    def earlier(self, n: int) -> Iterator[range]:
        """The samples before ``n`` of the same reader, one range for each place in a batch."""
        stride = self.batch_size * self.readers
        turn = n // stride  # whole turns of all readers before this batch
        place = n % self.batch_size
        first = n - place - turn * stride
        for other in range(self.batch_size):
            yield range(first + other, first + other + stride * (turn + (other < place)), stride)


class ImageMixture:
    """An endless sequence of images from several sources, the same for the same seed.

    Sample n comes from a source with probability proportional to its weight (over seeds; within one sequence the shares
    are kept as evenly as a golden-ratio rotation can). Each source is walked in shuffled epochs: all of its images,
    in an order of that epoch's own, before any comes again. Both are functions of (seed, n) alone, with nothing stored,
    so any sample number costs the same few dozen integer steps. Streams are walked by each reader on its own: which of
    their images sample n is depends on the division of the samples, too, and going far ahead means reading up to there.

    An unusable image is replaced by another one of its source, so that shares stay what they are. Files and local
    shards draw it from all images of the source, in an order that is the sample's own: each usable image takes an equal
    part in the replacements, and what sample n is does not depend on other samples. Streams read on, so that each
    usable image comes once per epoch whatever lies between; where their readers are has then to be kept
    (:meth:`places`).

    Args:
        sources: At least one.
        weights: One positive number per source; None for equal shares.
        seed: Any integer.
        keep: Tells which images are of use.

    Raises:
        ConfigError: No source, or weights that do not fit.
    """

    def __init__(
        self,
        sources: Sequence[ImageSource | ShardStream],
        weights: Sequence[float] | None = None,
        *,
        seed: int = 0,
        keep: ImageFilter | None = None,
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if not sources or len(weights) != len(sources) or not all(_is_weight(weight) for weight in weights):
            raise ConfigError(f"{len(sources)} sources, weights {weights}: one positive number per source is needed")
        self.sources = list(sources)
        self.weights = weights
        self.seed = seed
        self.keep = keep or ImageFilter()
        self._starts: Mapping[str, tuple[int, int]] = {}
        self._phase = hash_bits(seed) % _PERIOD
        self._bounds = _share_bounds(weights)

    @classmethod
    def from_data_dir(
        cls,
        value: object,
        *,
        seed: int = 0,
        keep: ImageFilter | None = None,
        shuffle_buffer: int = SHUFFLE_BUFFER,
    ) -> "ImageMixture":
        """Open all that a ``*_data_dir`` setting names; see :func:`parse_data_dir` and :func:`open_source`.

        Raises:
            DataError: Also when one of the sources has no usable image among the first 10,000 tried.
        """
        entries = parse_data_dir(value)
        labels = told_apart(redact_setting(str(entry.path)) for entry in entries)
        sources = [
            ShardStream(entry.path, shuffle_buffer, label.removeprefix(redact_setting(entry.path)))
            if isinstance(entry.path, str)
            else open_source(entry.path)
            for entry, label in zip(entries, labels, strict=True)
        ]
        mixture = cls(sources, [entry.weight for entry in entries], seed=seed, keep=keep)
        mixture.check()
        return mixture

    @property
    def has_streams(self) -> bool:
        """Whether some source can only be read in order."""
        return any(isinstance(source, ShardStream) for source in self.sources)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """The (name, reason) of what was passed over when the sources were opened, for the account of a run."""
        found = [entry for source in self.sources for entry in source.skipped]
        others = [(f"{source.path}/*", count_of_others(source.num_others)) for source in self.sources]
        return found + [entry for entry, source in zip(others, self.sources, strict=True) if source.num_others]

    def check(self) -> None:
        """Raise DataError for a source without a usable image: shares of others would hide it for the whole run."""
        for source in self.sources:
            skipped: list[tuple[str, str]] = []
            if not any(self._try(name, read, skipped) for name, read in _probes(source, skipped)):
                first = ": ".join(skipped[0]) if skipped else "nothing in it"
                kinds = _said(skipped) or "no images"
                raise DataError(f"{source.path}: no usable image found ({kinds}); the first, {first}")

    def close(self) -> None:
        """Let go of the connections and commands of streams; they are opened again when needed."""
        for source in self.sources:
            if isinstance(source, ShardStream):
                source.close()

    def places(self, n: int, division: Division) -> dict[str, tuple[int, int]]:
        """Where the reader of sample ``n``, which was just loaded, is in each stream that it has read in."""
        return {
            _place_name(index, division.reader(n), division.readers): source.place
            for index, source in enumerate(self.sources)
            if isinstance(source, ShardStream) and source.place is not None
        }

    def go_on_from(self, places: Mapping[str, tuple[int, int]]) -> None:
        """Start readers of streams at :meth:`places` of an earlier process; a sample before these is found without."""
        self.close()
        self._starts = dict(places)

    def locate(self, n: int) -> tuple[int, int]:
        """(source index, image index) of sample ``n >= 0``; the latter in a stream: place of the only reader."""
        source = self._source_of(n)
        earlier = self._count(source, range(n))
        chosen = self.sources[source]
        if isinstance(chosen, ShardStream):
            return source, earlier
        epoch, position = divmod(earlier, len(chosen))
        return source, shuffled(position, len(chosen), hash_bits(self.seed, source, epoch))

    def load(self, n: int, division: Division = Division()) -> LoadedImage:  # noqa: B008 (immutable)
        """Decode sample ``n``, or the usable image that takes its place.

        Unusable are images that cannot be read or decoded and those that the filter leaves out. Raises DataError when
        all images of the source are, or 10,000 in a row. Samples of streams are to be loaded in ascending order.
        """
        skipped: list[tuple[str, str]] = []
        for name, read in itertools.islice(self._candidates(n, division, skipped), MAX_FAILURES):
            image = self._try(name, read, skipped)
            if image is not None:
                return LoadedImage(image, name, skipped)
        raise DataError(
            f"sample {n}: {len(skipped)} images in a row cannot be used ({_said(skipped)}); the last, "
            f"{': '.join(skipped[-1])}; check the data in {self.sources[self._source_of(n)].path}"
        )

    def _source_of(self, n: int) -> int:
        if n < 0:
            raise InputError(f"sample numbers start at 0, got {n}")
        return bisect_right(self._bounds, (_GOLDEN_STEP * n + self._phase) % _PERIOD) - 1

    def _count(self, source: int, samples: range) -> int:
        """How many of some samples come from a source."""
        low, high = self._bounds[source], self._bounds[source + 1]
        # Of the rotation x, floor((x - low) / period) - floor((x - high) / period) is 1 where x lies in [low, high)
        # (modulo the period) and 0 elsewhere; a step may be taken modulo the period, as both floors shift alike.
        step, start = _GOLDEN_STEP * samples.step % _PERIOD, _GOLDEN_STEP * samples.start + self._phase
        count = len(samples)
        return floor_sum(count, _PERIOD, step, start - low) - floor_sum(count, _PERIOD, step, start - high)

    def _candidates(
        self, n: int, division: Division, skipped: list[tuple[str, str]]
    ) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Names and readers of the image of sample ``n`` and of those that may take its place."""
        index = self._source_of(n)
        source = self.sources[index]
        if isinstance(source, ShardStream):
            sample = sum(self._count(index, samples) for samples in division.earlier(n))
            reader, readers = division.reader(n), division.readers
            start = self._starts.get(_place_name(index, reader, readers))
            for image in source.images(
                sample,
                seed=hash_bits(self.seed, index),
                reader=reader,
                readers=readers,
                start=StreamPlace(*start) if start else None,
            ):
                skipped += image.skipped
                yield image.name, functools.partial(bytes, image.data)
            return
        _, first = self.locate(n)
        yield _named(source, first)
        key = hash_bits(self.seed, index, n, 1)
        for position in range(len(source)):
            other = shuffled(position, len(source), key)
            if other != first:
                yield _named(source, other)

    def _try(self, name: str, read: Callable[[], bytes], skipped: list[tuple[str, str]]) -> Image.Image | None:
        """A usable image, or None and an entry in ``skipped``."""
        image = try_decode(name, read, skipped)
        if image is None or not (reason := self.keep(image, name)):
            return image
        skipped.append((name, reason))
        return None


def try_decode(name: str, read: Callable[[], bytes], skipped: list[tuple[str, str]]) -> Image.Image | None:
    """The RGB picture of the encoded bytes that ``read`` returns, or None and its name and reason in ``skipped``."""
    try:
        return decode_image(read(), name=name)
    except DataError as error:
        skipped.append((name, str(error).removeprefix(f"{name}: ")))
        return None


def first_images(stream: ShardStream, count: int) -> Iterator[tuple[str, Image.Image]]:
    """Name and RGB picture of the first readable images of a stream; DataError when there is none."""
    found = 0
    skipped: list[tuple[str, str]] = []
    for image in stream.scan():
        skipped += image.skipped
        if not image.name:
            continue
        decoded = try_decode(image.name, functools.partial(bytes, image.data), skipped)
        if decoded is None:
            continue
        found += 1
        yield image.name, decoded
        if found == count:
            return
    if not found:
        first = ": ".join(skipped[0]) if skipped else "it is empty"
        raise DataError(f"{stream.path} holds no readable image; the first problem: {first}")


def count_kinds(skipped: Iterable[tuple[str, str]]) -> Counter[str]:
    """How many (name, reason) entries there are of each kind, the most frequent first.

    A reason starts with its kind; details follow in parentheses or behind a colon or semicolon. One that starts with a
    number stands for so many.
    """
    kinds: Counter[str] = Counter()
    for _, reason in skipped:
        kind = re.split(r" \(|[:;] ", reason, maxsplit=1)[0]
        number, mark, rest = kind.partition(" ")
        if mark and number.isdecimal():
            kinds[rest] += int(number)
        else:
            kinds[kind] += 1
    return Counter(dict(kinds.most_common()))


def _said(skipped: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in count_kinds(skipped).items())


def _place_name(source: int, reader: int, readers: int) -> str:
    return f"source {source}, reader {reader} of {readers}"


def _named(source: ImageSource, index: int) -> tuple[str, Callable[[], bytes]]:
    # A path join would let an absolute member name win.
    return f"{source.path}/{source.name(index)}", functools.partial(source.read, index)


def _probes(
    source: ImageSource | ShardStream, skipped: list[tuple[str, str]]
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Images from all over a source, or the first of a stream, to see whether there is a usable one."""
    if isinstance(source, ImageSource):
        for position in range(min(MAX_FAILURES, len(source))):
            yield _named(source, shuffled(position, len(source), 0))
        return
    for image in itertools.islice(source.scan(), MAX_FAILURES):
        skipped += image.skipped
        if image.name:
            yield image.name, functools.partial(bytes, image.data)


def _files(root: Path, exclude: Path | None, skipped: list[tuple[str, str]]) -> Iterator[str]:
    """Relative names of all files below ``root`` that are not hidden; each folder once, even if links form a loop."""
    seen: set[str] = set()

    def note(error: OSError) -> None:
        skipped.append((str(error.filename), f"cannot be listed ({error.strerror})"))

    for folder, folders, files in os.walk(root, followlinks=True, onerror=note):
        real = os.path.realpath(folder)
        if real in seen or (exclude is not None and Path(real) == exclude):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(_visible(folders))
        for file in _visible(files):
            path = Path(folder, file)
            if path.exists() and not path.is_file():  # reading a pipe or a device would wait or go on for ever
                skipped.append((str(path), "link or special file"))
                continue
            yield path.relative_to(root).as_posix()


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _given(value: object) -> str:
    """A setting as it was given, but for secrets."""
    if isinstance(value, str):
        return repr(redact_setting(value))
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_given, value))}]"
    return repr(value) if isinstance(value, (int, float, type(None))) else f"a {type(value).__name__}"


def _weighted_path(path: object, weight: object) -> WeightedPath:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(f"data entry with path {path!r}: a folder, a .tar file, a URL or pipe:COMMAND is needed")
    if not _is_weight(weight):
        raise ConfigError(
            f"data entry {redact_setting(str(path))!r} has weight {weight!r}; a positive number is needed"
        )
    share = float(weight)  # type: ignore[arg-type]
    text = os.fspath(path)
    if text.startswith(PIPE):
        return WeightedPath(text, share)
    text = os.path.expandvars(text)
    if not is_stream(text) and (scheme := re.match(r"([A-Za-z][\w+.-]+)://", text)):
        address = redact_setting(text)
        advice = {
            "s3": f"pipe:aws s3 cp {address} -",
            "gs": f"pipe:gsutil cat {address}",
            "file": "the path alone",
        }.get(scheme[1].lower(), "pipe:COMMAND with a command that writes it")
        raise ConfigError(f"data entry {address!r}: {scheme[1]}:// is not read as it is; write {advice}")
    return WeightedPath(text if is_stream(text) else Path(text).expanduser(), share)


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _share_bounds(weights: Sequence[float]) -> list[int]:
    """Cumulative shares of the circle of 2^64 steps, from 0 to the full circle; exact fractions, so none is lost."""
    parts = [Fraction(weight) for weight in weights]
    return [int(sum(parts[:count]) / sum(parts) * _PERIOD) for count in range(len(parts) + 1)]
