"""Tar shards that can only be read from their start, by URL or from a command, as one shuffled sequence per reader.

A *reader* is one decoding process of one rank: rank r with w workers has the readers r * w ... r * w + w - 1. In every
epoch the shards are shuffled and dealt out whole, as far as they go round; those left over (all, where there are fewer
shards than readers) are each shared by several readers, which take every k-th image of them. So all readers together
read every image once per epoch, none repeats what another has, and none is left without data.

The sequence of a reader depends on the seed, its number and the number of readers alone, not on what decodes: any place
in it can be found again by reading up to there without decoding. That costs the transfer, and no memory beyond the
shuffle buffer. Where images are left out, the reader reads on, so that none of the others is used more often. How many
images its samples took is then more than their number, and a run that goes on has to be told (`StreamPlace`).
"""

import base64
import itertools
import logging
import os
import re
import selectors
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import IO, NamedTuple

from featsharp.data._order import hash_bits, shuffled
from featsharp.data._tar import stream_tar
from featsharp.errors import ConfigError, DataError, MissingDependencyError
from featsharp.urls import redact_setting, redact_url

logger = logging.getLogger(__name__)

PIPE = "pipe:"
SHUFFLE_BUFFER = 1000  # encoded images that a reader holds to shuffle among
SHUFFLE_BYTES = 1 << 28  # and bytes of them, but for the last
TIMEOUT = 60.0  # seconds without a byte from a server
ATTEMPTS = 4  # for a shard, before what is left of it is given up
BACKOFF = 1.0  # seconds before the second attempt; twice as many before each further one
MAX_EMPTY_SHARDS = 20  # in a row, before a reader gives up
_OTHER_COMPRESSION = (".zst", ".tzst", ".lz4")
_running: set[tuple[int, subprocess.Popen[bytes]]] = set()  # commands, by the process that started them
_START = 100  # images in the shuffle buffer before the first leaves it
_ASK_AGAIN = {408, 425, 429}  # statuses below 500 of servers that may answer later


class StreamImage(NamedTuple):
    """An encoded image, and the (name, reason) of what was passed over since the one read before it."""

    name: str
    data: bytes
    skipped: list[tuple[str, str]]


class StreamPlace(NamedTuple):
    """Where a reader is: the number of its next sample, and of images that it has read for those before."""

    sample: int
    read: int


def is_stream(path: object) -> bool:
    """Whether an entry of a ``*_data_dir`` setting names shards that are streamed."""
    return isinstance(path, str) and (path.startswith(PIPE) or bool(re.match("https?://", path, re.IGNORECASE)))


class ShardStream:
    """Tar shards by URL or from commands.

    Args:
        path: ``http(s)://...`` or ``pipe:COMMAND``, with ranges in braces for several: ``http://host/{000..099}.tar``.
            A command is run by the shell as it stands, and its output is the tar.
        buffer: Encoded images to shuffle among.
        tag: Told with its name, to tell it from another stream whose address differs in what is not shown alone.

    Raises:
        ConfigError: For braces that do not pair.
        DataError: For a kind of compression that cannot be read.
        MissingDependencyError: For braces without the package braceexpand.

    Attributes:
        path: As given, but for what may be a secret (see :func:`featsharp.urls.redact_setting`).
        num_shards: After the expansion of braces.
        skipped: Always empty: what is damaged shows when it is read.
        num_others: 0, for the same reason.
    """

    def __init__(self, path: str, buffer: int = SHUFFLE_BUFFER, tag: str = "") -> None:
        if buffer < 1:
            raise ConfigError(f"a shuffle buffer of {buffer} images cannot work; 1 is the least, 1000 is usual")
        self.path = redact_setting(path) + tag
        self.skipped: list[tuple[str, str]] = []
        self.num_others = 0
        shards = expand_braces(path)
        self._shards = [
            Shard(shard, label + tag)
            for shard, label in zip(shards, told_apart(map(redact_setting, shards)), strict=True)
        ]
        if (shard := _plain(shards[0])).lower().endswith(_OTHER_COMPRESSION):
            tool = "lz4" if shard.lower().endswith(".lz4") else "zstd"
            raise DataError(f"{self.path}: this compression cannot be read; write pipe:curl -sf URL | {tool} -dc")
        self._buffer = buffer
        self._reading: _Reading | None = None

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def images(
        self, sample: int, *, seed: int = 0, reader: int = 0, readers: int = 1, start: StreamPlace | None = None
    ) -> Iterator[StreamImage]:
        """The images of one reader that may serve its ``sample``, from its own on; those that are taken are used up.

        Calls for growing samples read on where they are; each sample that was left out in between stands for one image.

        Args:
            sample: Counted for each reader.
            seed: Of the order.
            reader, readers: Which one of how many.
            start: A place that this reader was at in an earlier process; it counts if it is not beyond the sample.

        Raises:
            DataError: When shard after shard holds no image.
        """
        key = (seed, reader, readers)
        if self._reading is None or self._reading.key != key or self._reading.place.sample > sample:
            self.close()
            self._reading = _Reading(self, key)
            if start is not None and start.sample <= sample:
                self._reading.pass_over(start.read)
                self._reading.place = start
        self._reading.pass_over(sample - self._reading.place.sample)
        self._reading.place = self._reading.place._replace(sample=sample + 1)
        return self._reading.take()

    @property
    def place(self) -> StreamPlace | None:
        """Where the present reader is; None before it reads."""
        return None if self._reading is None else self._reading.place

    def scan(self) -> Iterator[StreamImage]:
        """All images in stored order, once; what is wrong with a shard comes as an image without name and data.

        Ends early after as many shards without an image as a reader would give up after.
        """
        empty = 0
        for shard in self._shards:
            empty += 1
            for image in _read_shard(shard):
                empty = 0 if image.name else empty
                yield image
            if empty == MAX_EMPTY_SHARDS:
                return

    def close(self) -> None:
        """Let go of connections and commands."""
        if self._reading is not None:
            self._reading.images.close()
            self._reading = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reading": None}

    def __repr__(self) -> str:
        return f"ShardStream({self.path!r}, {self.num_shards} shards)"

    def _sequence(self, seed: int, reader: int, readers: int) -> Generator[StreamImage]:
        """All images of a reader, epoch after epoch."""
        pending: list[tuple[str, str]] = []
        empty = 0
        for epoch in itertools.count():
            key = hash_bits(seed, epoch)

            def dealt(epoch: int = epoch, key: int = key) -> Iterator[StreamImage]:
                nonlocal empty
                for share in deal(self.num_shards, reader, readers, epoch, key):
                    found = 0
                    for image in _read_shard(self._shards[share.shard]):
                        pending.extend(image.skipped)
                        if not image.name:
                            continue
                        if found % share.every == share.first:
                            yield StreamImage(image.name, image.data, pending.copy())
                            pending.clear()
                        found += 1
                    empty = 0 if found else empty + 1
                    if empty == MAX_EMPTY_SHARDS:
                        last = ": ".join(pending[-1]) if pending else "no members at all"
                        raise DataError(f"{self.path}: {empty} shards in a row gave no image; the last, {last}")

            yield from shuffle(dealt(), self._buffer, hash_bits(key, reader))


class Shard(NamedTuple):
    """An address or command, and what messages call it."""

    address: str
    label: str


class Share(NamedTuple):
    """What a reader takes of a shard: the images ``first``, ``first + every``, ..."""

    shard: int
    first: int
    every: int


def deal(shards: int, reader: int, readers: int, epoch: int, key: int) -> Iterator[Share]:
    """The shares of one reader in one epoch, in its order; those of all readers are each image once."""
    whole = shards - shards % readers
    for place in range(reader, whole, readers):
        yield Share(shuffled(place, shards, key), 0, 1)
    if left := shards - whole:
        group, member = reader % left, reader // left
        every = len(range(group, readers, left))
        # Turned by the epoch, so that a shard with fewer images than readers serves each of them in time.
        yield Share(shuffled(whole + group, shards, key), (member + epoch) % every, every)


def shuffle(
    images: Iterator[StreamImage], size: int, key: int, max_bytes: int = SHUFFLE_BYTES
) -> Iterator[StreamImage]:
    """The same images in another order, with at most ``size`` of them held at a time, and one beyond ``max_bytes``."""
    held: list[StreamImage] = []
    held_bytes = 0
    for draw in itertools.count():
        # Filled up while images leave it: training need not wait for all of the buffer.
        for _ in range(min(2 if draw else _START, size - len(held))):
            if held_bytes >= max_bytes or (image := next(images, None)) is None:
                break
            held.append(image)
            held_bytes += len(image.data)
        if not held:
            return
        place = hash_bits(key, draw) % len(held)
        held[place], held[-1] = held[-1], held[place]
        held_bytes -= len(held[-1].data)
        yield held.pop()


def expand_braces(path: str) -> list[str]:
    """The shards that a path such as ``{000..099}.tar`` stands for.

    Raises:
        ConfigError: For braces that do not pair.
        MissingDependencyError: For braces without the package braceexpand.
    """
    if "{" not in path:
        return [path]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise MissingDependencyError('braces in shard names need: pip install "featsharp[train]"') from error
    try:
        return list(braceexpand(path))
    except ValueError as error:
        said = str(error).partition(":")[0]  # the entry follows
        raise ConfigError(f"data entry {redact_setting(path)!r}: {said}; write ranges as {{000..099}}") from None


def _plain(shard: str) -> str:
    """An address without query and fragment; empty for a command."""
    return "" if shard.startswith(PIPE) else re.split("[?#]", shard, maxsplit=1)[0]


def told_apart(names: Iterable[str]) -> list[str]:
    """The same names, numbered where several are equal: shards whose addresses differ in their secrets alone."""
    names = list(names)
    total, number = Counter(names), Counter[str]()
    told = []
    for name in names:
        number[name] += 1
        told.append(f"{name} (no. {number[name]})" if total[name] > 1 else name)
    return told


class _Reading:
    """A reader in the middle of its sequence."""

    def __init__(self, stream: ShardStream, key: tuple[int, int, int]) -> None:
        self.key = key
        self.place = StreamPlace(0, 0)
        self.path = stream.path
        self.images: Generator[StreamImage] = stream._sequence(*key)

    def take(self) -> Iterator[StreamImage]:
        """The images from here on; leaving off in between loses none."""
        for image in self.images:
            self.place = self.place._replace(read=self.place.read + 1)
            yield image
        raise DataError(f"{self.path}: cannot be read on after an error")

    def pass_over(self, count: int) -> None:
        """Leave out some images."""
        if count > SHUFFLE_BUFFER:
            logger.info("%s: reading past %d images, to go on behind them", self.path, count)
        for _ in itertools.islice(self.take(), count):
            pass


def _read_shard(shard: Shard) -> Iterator[StreamImage]:
    """The images of a shard in stored order, and what is wrong with it as images without name and data.

    A connection that breaks is opened again, and what was read before is passed over, so that the order of the images
    is the same. When that fails too often, what is left of the shard is given up.
    """
    # Beside a query or fragment the name would be hidden with it, wherever the text is shown.
    between = " " if re.search("[?#]", shard.label) else "/"
    done = 0
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _open(shard.address) as file:
                for member in itertools.islice(stream_tar(file), done, None):
                    done += 1
                    name = shard.label + between + member.name if member.name else shard.label
                    if member.reason:
                        yield StreamImage("", b"", [(name, member.reason)])
                    else:
                        yield StreamImage(name, member.data, [])
            return
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an address that is none
            if attempt == ATTEMPTS or shard.address.startswith(PIPE) or not _may_pass(error):
                yield StreamImage("", b"", [(shard.label, f"cannot be fetched ({_said(error)})")])
                return
            logger.info("%s: %s; trying again", shard.label, _said(error))
            time.sleep(BACKOFF * 2 ** (attempt - 1))


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may help."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in _ASK_AGAIN
    return not isinstance(error, (InvalidURL, ValueError))


@contextmanager
def _open(address: str) -> Iterator[IO[bytes]]:
    if address.startswith(PIPE):
        with _run(address.removeprefix(PIPE)) as output:
            yield output
        return
    # The setting says http or https; redirections cannot lead to files.
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"User-Agent": "featsharp"})
    if at:
        token = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")  # for this host alone
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        yield _Whole(response)  # type: ignore[misc]


@contextmanager
def _run(command: str) -> Iterator[IO[bytes]]:
    """The output of a shell command; OSError when it fails. It is ended when its output is no longer wanted.

    With all that it started, and by SIGKILL: nothing that it could still do is wanted, and it may ignore SIGTERM, also
    because whatever started the training does, as that is inherited.
    """
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    running = (os.getpid(), process)
    _running.add(running)
    try:
        _wait_for_output(process.stdout, command)
        yield process.stdout
        while process.stdout.read(1 << 20):  # what follows the end mark; a writer that is cut off would count as failed
            pass
        if process.wait():
            raise OSError(f"the command ended with status {process.returncode}")
    finally:
        process.stdout.close()
        _end(process)
        _running.discard(running)


def _wait_for_output(output: IO[bytes], command: str) -> None:
    """Wait for the first bytes or the end, without limit: a command may have to wait for a tape. But not in silence."""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while not selector.select(TIMEOUT):
            logger.info("%s%s: still waiting for the first bytes", PIPE, redact_url(command))


def end_commands() -> None:
    """End all commands of this process, which itself is about to end: they would outlive it."""
    for owner, process in list(_running):
        if owner == os.getpid():  # others were inherited
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    # Where the command has ended by itself, its group is gone, or macOS says that it may not be signalled.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Whole:
    """A response that must not end before its announced length: that is a lost connection, not the end of the tar."""

    def __init__(self, response: HTTPResponse) -> None:
        self._response = response

    def read(self, size: int) -> bytes:
        data = self._response.read(size)
        if not data and self._response.length:
            raise OSError(f"connection lost {self._response.length} bytes before the end")
        return data


def _said(error: BaseException) -> str:
    if isinstance(error, (InvalidURL, ValueError)):
        return "the address is not valid"  # the error's own text would show parts of it
    return redact_url(" ".join(str(error).split())) or type(error).__name__
