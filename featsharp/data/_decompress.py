"""Streams that may be compressed with gzip, bzip2 or xz, in any number of members (``cat a.gz b.gz``)."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, BinaryIO, Protocol, cast

# Errors of damaged data. OSError may also come from the stream below: see ``Source.error``.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError)

_MAX_XZ_MEMORY = 1 << 28  # a header may claim any; xz -9 needs 65 MiB
_CHUNK = 1 << 16
_MAX_EMPTY = 64  # reads beyond the end


class _Decoder(Protocol):
    """Interface of ``bz2.BZ2Decompressor`` and ``lzma.LZMADecompressor``: for one member."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class Source:
    """A stream whose first bytes can be inspected before they are read.

    Attributes:
        head: The first bytes.
        error: Error that the stream raised, as opposed to damage of the data.
    """

    def __init__(self, file: BinaryIO | IO[bytes]) -> None:
        self._file = file
        self.head = self._unread = file.read(512)
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes; none at the end."""
        if self._unread:
            data, self._unread = self._unread[:size], self._unread[size:]
            return data
        try:
            return self._file.read(size)
        except OSError as error:
            self.error = error
            raise


def decompress(source: Source) -> IO[bytes]:
    """Decompress a stream, recognised by its first bytes; others are returned as they are. Only for ``read(size)``."""
    head = source.head
    stream: object = source
    if head.startswith(b"\x1f\x8b\x08"):
        stream = gzip.GzipFile(fileobj=cast(BinaryIO, source), mode="rb")  # only reads
    elif head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        stream = io.BufferedReader(_Members(source, bz2.BZ2Decompressor))
    elif head.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00\x80")):
        stream = io.BufferedReader(_Members(source, lambda: lzma.LZMADecompressor(memlimit=_MAX_XZ_MEMORY)))
    return cast(IO[bytes], _Bounded(cast(IO[bytes], stream)))


class _Bounded:
    """A stream that is not read far beyond its end: tarfile would skip a member of any size there, part by part."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._empty = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._empty += not data
        if self._empty > _MAX_EMPTY:
            raise EOFError("unexpected end of data")
        return data


class _Members(io.RawIOBase):
    """The members of a bzip2 or xz stream. ``BZ2File`` and ``LZMAFile`` end silently at a damaged one."""

    def __init__(self, source: Source, new: Callable[[], _Decoder]) -> None:
        self._source, self._new = source, new
        self._decoder = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = b""
        while not data:
            compressed = b""
            if self._decoder.eof:
                if not (compressed := self._next_member()):
                    return 0
                self._decoder = self._new()
            elif self._decoder.needs_input and not (compressed := self._source.read(_CHUNK)):
                raise EOFError("unexpected end of compressed data")
            data = self._decoder.decompress(compressed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_member(self) -> bytes:
        """Read the first bytes after a member and its padding with zeros; none at the end."""
        data = self._decoder.unused_data
        while not (start := data.lstrip(b"\0")) and (data := self._source.read(_CHUNK)):
            pass
        return start
