"""Tar shards that can only be read from their start, by URL or from a command, as one shuffled sequence per reader.

A *reader* is one decoding process of one rank: rank r with w workers has the readers r * w ... r * w + w - 1. In every
epoch the shards are shuffled and every reader gets the same number of whole ones; those left over (all, where there are
fewer shards than readers) are each shared by several readers, which take every k-th image of them. So all readers
together read every image once per epoch, and none is left without data.

The sequence of a reader depends on the seed, its number and the number of readers alone, not on whether images decode:
any position in it can be reached again by reading up to there without decoding. That costs the transfer, and no memory
beyond the shuffle buffer. For unusable images the reader reads on, so that none of the others is used more often. It
has then read more images than samples, and a resumed run needs its :class:`StreamPosition`.
"""

import itertools
import logging
import re
import time
from collections.abc import Generator, Iterator
from http.client import HTTPException
from typing import NamedTuple

from PIL import Image

from featsharp.data._fetch import FetchConfig, describe_error, is_temporary, open_address
from featsharp.data._order import hash_bits, shuffled
from featsharp.data._tar import stream_tar
from featsharp.data.entries import PIPE, expand_braces, number_equal
from featsharp.data.images import EncodedImage, try_decode
from featsharp.errors import ConfigError, DataError
from featsharp.urls import redact_setting

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000  # encoded images that a reader holds to shuffle among
SHUFFLE_BYTES = 1 << 28  # and bytes of them, except for the last
MAX_EMPTY_SHARDS = 20  # in a row, before a reader gives up
_OTHER_COMPRESSION = (".zst", ".tzst", ".lz4")
_START = 100  # images in the shuffle buffer before the first leaves it


class StreamPosition(NamedTuple):
    """Position of a reader: the number of its next sample, and of images that it has read before."""

    sample: int
    read: int


class ShardStream:
    """Tar shards by URL or from commands.

    Args:
        path: ``http(s)://...`` or ``pipe:COMMAND``, with ranges in braces for several: ``http://host/{000..099}.tar``.
            A command is run by the shell as it stands, and its output is the tar.
        buffer: Encoded images to shuffle among.
        tag: Added to its name, to distinguish streams whose addresses differ in their secrets alone.
        fetch: Attempts and timeouts.

    Raises:
        ConfigError: For braces that do not pair.
        DataError: For a kind of compression that cannot be read.
        MissingDependencyError: For braces without the package braceexpand.

    Attributes:
        path: As given, without secrets (see :func:`featsharp.urls.redact_setting`).
        num_shards: After the expansion of braces.
        skipped: Always empty: damage is detected only when it is read.
        num_others: 0, for the same reason.
    """

    def __init__(
        self,
        path: str,
        buffer: int = SHUFFLE_BUFFER,
        tag: str = "",
        fetch: FetchConfig = FetchConfig(),  # noqa: B008 (immutable)
    ) -> None:
        if buffer < 1:
            raise ConfigError(f"a shuffle buffer of {buffer} images cannot work; 1 is the least, 1000 is usual")
        self.path = redact_setting(path) + tag
        self.skipped: list[tuple[str, str]] = []
        self.num_others = 0
        shards = expand_braces(path)
        self._shards = [
            Shard(shard, label + tag)
            for shard, label in zip(shards, number_equal(map(redact_setting, shards)), strict=True)
        ]
        if (shard := _plain(shards[0])).lower().endswith(_OTHER_COMPRESSION):
            tool = "lz4" if shard.lower().endswith(".lz4") else "zstd"
            raise DataError(f"{self.path}: this compression cannot be read; write pipe:curl -sf URL | {tool} -dc")
        self._buffer, self._fetch = buffer, fetch
        self._reading: _Reading | None = None

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def images(
        self, sample: int, *, seed: int = 0, reader: int = 0, readers: int = 1, start: StreamPosition | None = None
    ) -> Iterator[EncodedImage]:
        """Iterate over the images of one reader from its ``sample`` on; those that are taken are consumed.

        Calls for growing samples continue reading; each sample that was left out in between skips one image.

        Args:
            sample: Counted for each reader.
            seed: Of the order.
            reader: Number of the reader, from 0 to ``readers - 1``.
            readers: Number of readers.
            start: Position of this reader in an earlier process; used unless it is beyond the sample.

        Raises:
            DataError: After :data:`MAX_EMPTY_SHARDS` shards in a row without an image.
        """
        key = (seed, reader, readers)
        if self._reading is None or self._reading.key != key or self._reading.position.sample > sample:
            self.close()
            self._reading = _Reading(self, key)
            if start is not None and start.sample <= sample:
                self._reading.pass_over(start.read)
                self._reading.position = start
        self._reading.pass_over(sample - self._reading.position.sample)
        self._reading.position = self._reading.position._replace(sample=sample + 1)
        return self._reading.take()

    @property
    def position(self) -> StreamPosition | None:
        """Position of the present reader; None before it reads."""
        return None if self._reading is None else self._reading.position

    def probe(self) -> Iterator[EncodedImage]:
        """Iterate over all images once, in stored order; damage is an image without name and data.

        Ends early after :data:`MAX_EMPTY_SHARDS` shards in a row without an image.
        """
        empty = 0
        for shard in self._shards:
            empty += 1
            for image in _read_shard(shard, self._fetch):
                empty = 0 if image.name else empty
                yield image
            if empty == MAX_EMPTY_SHARDS:
                return

    def close(self) -> None:
        """Close connections and commands."""
        if self._reading is not None:
            self._reading.images.close()
            self._reading = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reading": None}

    def __repr__(self) -> str:
        return f"ShardStream({self.path!r}, {self.num_shards} shards)"

    def _sequence(self, seed: int, reader: int, readers: int) -> Generator[EncodedImage]:
        """Iterate over all images of a reader, epoch after epoch."""
        pending: list[tuple[str, str]] = []
        empty = 0
        for epoch in itertools.count():
            key = hash_bits(seed, epoch)

            def dealt(epoch: int = epoch, key: int = key) -> Iterator[EncodedImage]:
                nonlocal empty
                for share in deal(self.num_shards, reader, readers, epoch, key):
                    images = 0
                    for image in _read_shard(self._shards[share.shard], self._fetch):
                        pending.extend(image.skipped)
                        if not image.name:
                            continue
                        if images % share.every == share.first:
                            yield EncodedImage(image.name, image.data, pending.copy())
                            pending.clear()
                        images += 1
                    empty = 0 if images else empty + 1
                    if empty == MAX_EMPTY_SHARDS:
                        last = ": ".join(pending[-1]) if pending else "no members at all"
                        raise DataError(f"{self.path}: {empty} shards in a row gave no image; the last, {last}")

            yield from shuffle(dealt(), self._buffer, hash_bits(key, reader))


def first_images(stream: ShardStream, count: int) -> Iterator[tuple[str, Image.Image]]:
    """Iterate over name and RGB picture of the first readable images of a stream; DataError when there is none."""
    given = 0
    skipped: list[tuple[str, str]] = []
    for encoded in stream.probe():
        image = try_decode(encoded, skipped)
        if image is None:
            continue
        given += 1
        yield encoded.name, image
        if given == count:
            return
    if not given:
        first = ": ".join(skipped[0]) if skipped else "it is empty"
        raise DataError(f"{stream.path} holds no readable image; the first problem: {first}")


class Shard(NamedTuple):
    """An address or command, and its name in messages."""

    address: str
    label: str


class Share(NamedTuple):
    """A reader's part of a shard: the images ``first``, ``first + every``, ..."""

    shard: int
    first: int
    every: int


def deal(shards: int, reader: int, readers: int, epoch: int, key: int) -> Iterator[Share]:
    """Iterate over the shares of one reader in one epoch; those of all readers together have each image once."""
    whole = shards - shards % readers
    for position in range(reader, whole, readers):
        yield Share(shuffled(position, shards, key), 0, 1)
    if left := shards - whole:
        group, member = reader % left, reader // left
        every = len(range(group, readers, left))
        # Rotated by the epoch, so that a shard with fewer images than readers serves each of them in time.
        yield Share(shuffled(whole + group, shards, key), (member + epoch) % every, every)


def shuffle(
    images: Iterator[EncodedImage], size: int, key: int, max_bytes: int = SHUFFLE_BYTES
) -> Iterator[EncodedImage]:
    """Shuffle images, with at most ``size`` of them held at a time, and one beyond ``max_bytes``."""
    held: list[EncodedImage] = []
    held_bytes = 0
    for draw in itertools.count():
        # Two in for each one out: training need not wait for a full buffer.
        for _ in range(min(2 if draw else _START, size - len(held))):
            if held_bytes >= max_bytes or (image := next(images, None)) is None:
                break
            held.append(image)
            held_bytes += len(image.data)
        if not held:
            return
        chosen = hash_bits(key, draw) % len(held)
        held[chosen], held[-1] = held[-1], held[chosen]
        held_bytes -= len(held[-1].data)
        yield held.pop()


def _plain(shard: str) -> str:
    """Strip query and fragment off an address; empty for a command."""
    return "" if shard.startswith(PIPE) else re.split("[?#]", shard, maxsplit=1)[0]


class _Reading:
    """A reader in the middle of its sequence."""

    def __init__(self, stream: ShardStream, key: tuple[int, int, int]) -> None:
        self.key = key
        self.position = StreamPosition(0, 0)
        self.path = stream.path
        self.images: Generator[EncodedImage] = stream._sequence(*key)

    def take(self) -> Iterator[EncodedImage]:
        """Iterate over the images from here on; stopping in between loses none."""
        for image in self.images:
            self.position = self.position._replace(read=self.position.read + 1)
            yield image
        raise DataError(f"{self.path}: cannot be read on after an error")

    def pass_over(self, count: int) -> None:
        """Skip some images."""
        if count > SHUFFLE_BUFFER:
            logger.info("%s: reading past %d images, to go on behind them", self.path, count)
        for _ in itertools.islice(self.take(), count):
            pass


def _read_shard(shard: Shard, fetch: FetchConfig) -> Iterator[EncodedImage]:
    """Iterate over the images of a shard in stored order, and over its damage as images without name and data.

    A connection that breaks is opened again, and members that were read before are skipped, so that the order stays.
    When that fails too often, the rest of the shard is given up.
    """
    # Beside a query or fragment the name would be hidden with it, wherever the text is shown.
    between = " " if re.search("[?#]", shard.label) else "/"
    done = 0
    for attempt in range(1, fetch.attempts + 1):
        try:
            with open_address(shard.address, fetch.timeout) as file:
                for member in itertools.islice(stream_tar(file), done, None):
                    done += 1
                    name = shard.label + between + member.name if member.name else shard.label
                    if member.reason:
                        yield EncodedImage("", b"", [(name, member.reason)])
                    else:
                        yield EncodedImage(name, member.data, [])
            return
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an invalid address
            if attempt == fetch.attempts or shard.address.startswith(PIPE) or not is_temporary(error):
                yield EncodedImage("", b"", [(shard.label, f"cannot be fetched ({describe_error(error)})")])
                return
            logger.info("%s: %s; trying again", shard.label, describe_error(error))
            time.sleep(fetch.backoff * 2 ** (attempt - 1))
