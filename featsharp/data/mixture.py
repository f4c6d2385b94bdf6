"""Images from several sources, mixed by weight in an order that can be computed from the sample number alone."""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from PIL import Image

from featsharp.data._fetch import FetchConfig
from featsharp.data._order import floor_sum, hash_bits, shuffled
from featsharp.data.entries import is_weight, number_equal, parse_data_dir
from featsharp.data.filters import ImageFilter
from featsharp.data.images import EncodedImage, try_decode
from featsharp.data.skips import count_of_others, describe_kinds
from featsharp.data.sources import ImageSource, open_source
from featsharp.data.streams import SHUFFLE_BUFFER, ShardStream, StreamPosition
from featsharp.errors import ConfigError, DataError, InputError
from featsharp.urls import redact_setting

# Unusable images in a row before an error: never reached by a filter that keeps one image in 200, and after a minute or
# two by one that keeps none.
MAX_FAILURES = 10_000

_PERIOD = 1 << 64
_GOLDEN_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the steps that cover a circle most evenly


class LoadedImage(NamedTuple):
    """An image of a mixture, and the (name, reason) of unusable ones that it replaces."""

    image: Image.Image  # RGB
    name: str
    skipped: list[tuple[str, str]]


class Division(NamedTuple):
    """Division of the sample numbers of a run among its readers (see ``featsharp.data.streams``).

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
        """Compute the reader of sample ``n``."""
        step, rest = divmod(n, self.batch_size * self.world)
        return rest // self.batch_size * self.workers + step % self.workers

    def earlier(self, n: int) -> Iterator[range]:
        """Iterate over the samples before ``n`` of the same reader, one range for each index in a batch."""
        stride = self.batch_size * self.readers
        rounds = n // stride  # whole rounds of all readers before this batch
        index = n % self.batch_size
        first = n - index - rounds * stride
        for other in range(self.batch_size):
            yield range(first + other, first + other + stride * (rounds + (other < index)), stride)


class ImageMixture:
    """An endless sequence of images from several sources, the same for the same seed.

    Sample n comes from a source with probability proportional to its weight (over seeds; within one sequence a
    golden-ratio rotation spreads the sources evenly). Each source is read in shuffled epochs. Both are functions of
    (seed, n) alone, without state, so any sample number costs the same few dozen integer steps. Streams are read by
    each reader independently: the image of sample n depends on the division of the samples, too, and skipping ahead
    means reading up to there.

    An unusable image is replaced by another one of its source, so that the proportions of the sources stay. In files
    and local shards it is drawn from all images of the source, in an order that belongs to the sample, so that sample n
    does not depend on other samples. Streams read on, so that each usable image comes once per epoch; the positions of
    their readers then have to be saved (:meth:`positions`).

    Args:
        sources: At least one.
        weights: One positive number per source; None for equal ones.
        seed: Any integer.
        keep: Filter of images.
        max_failures: Unusable images in a row before an error.

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
        max_failures: int = MAX_FAILURES,
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if not sources or len(weights) != len(sources) or not all(is_weight(weight) for weight in weights):
            raise ConfigError(f"{len(sources)} sources, weights {weights}: one positive number per source is needed")
        self.sources = list(sources)
        self.weights = weights
        self.seed = seed
        self.keep = keep or ImageFilter()
        self.max_failures = max_failures
        self._streams = {index: source for index, source in enumerate(sources) if isinstance(source, ShardStream)}
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
        fetch: FetchConfig = FetchConfig(),  # noqa: B008 (immutable)
    ) -> "ImageMixture":
        """Open all that a ``*_data_dir`` setting names; see :func:`parse_data_dir` and :func:`open_source`.

        Raises:
            DataError: Also when one of the sources has no usable image among the first 10,000 tried.
        """
        entries = parse_data_dir(value)
        labels = number_equal(redact_setting(str(entry.path)) for entry in entries)
        sources = [
            ShardStream(entry.path, shuffle_buffer, label.removeprefix(redact_setting(entry.path)), fetch)
            if isinstance(entry.path, str)
            else open_source(entry.path)
            for entry, label in zip(entries, labels, strict=True)
        ]
        mixture = cls(sources, [entry.weight for entry in entries], seed=seed, keep=keep)
        mixture.check()
        return mixture

    @property
    def has_streams(self) -> bool:
        """Return whether some source can only be read in order."""
        return bool(self._streams)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """The (name, reason) of files and members skipped when the sources were opened."""
        damaged = [entry for source in self.sources for entry in source.skipped]
        others = [
            (f"{source.path}/*", count_of_others(source.num_others)) for source in self.sources if source.num_others
        ]
        return damaged + others

    def check(self) -> None:
        """Raise DataError for a source without a usable image, which the other sources would hide."""
        for source in self.sources:
            skipped: list[tuple[str, str]] = []
            if not any(self._decode(image, skipped) for image in itertools.islice(source.probe(), self.max_failures)):
                first = ": ".join(skipped[0]) if skipped else "nothing in it"
                kinds = describe_kinds(skipped) or "no images"
                raise DataError(f"{source.path}: no usable image found ({kinds}); the first, {first}")

    def close(self) -> None:
        """Close the connections and commands of streams; they are opened again when needed."""
        for stream in self._streams.values():
            stream.close()

    def positions(self, n: int, division: Division) -> dict[str, tuple[int, int]]:
        """Positions of the reader of sample ``n``, which was just loaded, in each stream that it has read."""
        return {
            _position_name(index, division.reader(n), division.readers): stream.position
            for index, stream in self._streams.items()
            if stream.position is not None
        }

    def resume_from(self, positions: Mapping[str, tuple[int, int]]) -> None:
        """Start readers of streams at :meth:`positions` of an earlier process, except for samples before these."""
        self.close()
        self._starts = dict(positions)

    def locate(self, n: int) -> tuple[int, int]:
        """Compute (source index, image index) of sample ``n >= 0``; in a stream that of a single reader."""
        source = self._source_of(n)
        earlier = self._count(source, range(n))
        chosen = self.sources[source]
        if isinstance(chosen, ShardStream):
            return source, earlier
        epoch, position = divmod(earlier, len(chosen))
        return source, shuffled(position, len(chosen), hash_bits(self.seed, source, epoch))

    def load(self, n: int, division: Division = Division()) -> LoadedImage:  # noqa: B008 (immutable)
        """Decode sample ``n``, or a usable image that replaces it.

        Unusable are images that cannot be read or decoded and those that the filter leaves out. Raises DataError when
        all images of the source are, or 10,000 in a row. Samples of streams are to be loaded in ascending order.
        """
        skipped: list[tuple[str, str]] = []
        for encoded in itertools.islice(self._candidates(n, division), self.max_failures):
            image = self._decode(encoded, skipped)
            if image is not None:
                return LoadedImage(image, encoded.name, skipped)
        raise DataError(
            f"sample {n}: {len(skipped)} images in a row cannot be used ({describe_kinds(skipped)}); the last, "
            f"{': '.join(skipped[-1])}; check the data in {self.sources[self._source_of(n)].path}"
        )

    def _source_of(self, n: int) -> int:
        if n < 0:
            raise InputError(f"sample numbers start at 0, got {n}")
        return bisect_right(self._bounds, (_GOLDEN_STEP * n + self._phase) % _PERIOD) - 1

    def _count(self, source: int, samples: range) -> int:
        """Count the samples of a range that come from a source."""
        low, high = self._bounds[source], self._bounds[source + 1]
        # Of the rotation x, floor((x - low) / period) - floor((x - high) / period) is 1 where x lies in [low, high)
        # (modulo the period) and 0 elsewhere; a step may be taken modulo the period, as both floors shift alike.
        step, start = _GOLDEN_STEP * samples.step % _PERIOD, _GOLDEN_STEP * samples.start + self._phase
        count = len(samples)
        return floor_sum(count, _PERIOD, step, start - low) - floor_sum(count, _PERIOD, step, start - high)

    def _candidates(self, n: int, division: Division) -> Iterator[EncodedImage]:
        """Iterate over the image of sample ``n`` and those that may replace it."""
        index = self._source_of(n)
        source = self.sources[index]
        if isinstance(source, ShardStream):
            sample = sum(self._count(index, samples) for samples in division.earlier(n))
            reader, readers = division.reader(n), division.readers
            saved = self._starts.get(_position_name(index, reader, readers))
            start = StreamPosition(*saved) if saved else None
            seed = hash_bits(self.seed, index)
            yield from source.images(sample, seed=seed, reader=reader, readers=readers, start=start)
            return
        _, first = self.locate(n)
        prefix = f"{source.path}/"  # not joined as a path: an absolute member name would win
        yield source.encoded(first, prefix)
        key = hash_bits(self.seed, index, n, 1)
        for position in range(len(source)):
            other = shuffled(position, len(source), key)
            if other != first:
                yield source.encoded(other, prefix)

    def _decode(self, encoded: EncodedImage, skipped: list[tuple[str, str]]) -> Image.Image | None:
        """Decode a usable image, or return None and add an entry to ``skipped``."""
        image = try_decode(encoded, skipped)
        if image is None or not (reason := self.keep(image, encoded.name)):
            return image
        skipped.append((encoded.name, reason))
        return None


def _position_name(source: int, reader: int, readers: int) -> str:
    return f"source {source}, reader {reader} of {readers}"


def _share_bounds(weights: Sequence[float]) -> list[int]:
    """Compute cumulative fractions of the circle of 2^64 steps, from 0 to the full circle, by exact arithmetic."""
    exact = [Fraction(weight) for weight in weights]
    return [int(sum(exact[:count]) / sum(exact) * _PERIOD) for count in range(len(exact) + 1)]
