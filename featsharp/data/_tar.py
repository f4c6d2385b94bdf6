"""Images of tar files, local ones by an index for random access, others as a stream. Nothing is ever extracted.

Only regular members with an image's name are read. All else is skipped and counted: damage, links and devices, paths
that lead out of the archive, and other kinds of files (labels, ``.pyd``, ``.pickle``, ...). Concatenated tars
(``cat a.tar b.tar``) are read to the end of the last one.
"""

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, Self

from featsharp.data._decompress import DAMAGE as DECOMPRESSION_DAMAGE
from featsharp.data._decompress import Source, decompress
from featsharp.data.images import is_image_name
from featsharp.data.skips import count_of_others
from featsharp.errors import DataError

# webdataset's iterator ends silently at a damaged header, a cut or the first of several tars, and tarfile's
# ignore_zeros takes damaged headers for padding: neither lets damage be counted (docs/experiments.md, "Libraries for
# shards").

# A header may claim any size: the most that a stream's members can make us hold in memory.
MAX_MEMBER_BYTES = 1 << 28
MAX_HEADER_BYTES = 1 << 20  # of the headers that hold long names and the like
MAX_PADDING = 1 << 20  # bytes of zeros after an end mark in which the next archive is looked for

_COMPRESSED_EXTENSIONS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
_ZSTD_MAGIC = _COMPRESSED_MAGIC[-1]
# Members that only describe the next one, read as a whole by tarfile.
_DESCRIPTIONS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
_END_MARK = "end mark"
_OTHER = "other"  # verdict on members that are no images and do not pretend to be
_DAMAGE = (tarfile.TarError, ValueError, IndexError, KeyError, OverflowError, MemoryError, RecursionError)


class TarMember(NamedTuple):
    """One image inside a tar file: ``size`` bytes from byte ``offset`` on."""

    name: str
    offset: int
    size: int


class TarIndex(NamedTuple):
    """Contents of a tar file."""

    members: list[TarMember]
    skipped: list[tuple[str, str]]  # (name, reason) of damage and of members that are refused
    others: int  # members that are no images by name


class StreamMember(NamedTuple):
    """Member of a stream: an image's bytes, or the reason for none (``name`` is empty where it is about the tar)."""

    name: str
    data: bytes
    reason: str = ""


def index_tar(path: Path | str, file: IO[bytes] | None = None) -> TarIndex:
    """Index the images of a tar file in stored order.

    A damaged or truncated file gives the members up to the damage and one entry with its position. Raises DataError for
    a compressed tar, which has no random access.

    Args:
        path: Of the file.
        file: It, opened, where ``path`` is that of another file system.
    """
    members: list[TarMember] = []
    skipped: list[tuple[str, str]] = []
    others = 0
    try:
        end = os.stat(path).st_size if file is None else file.seek(0, os.SEEK_END)
        if file is not None:
            file.seek(0)
        with _Tar.open(path, "r:", fileobj=file) as tar:
            for info in tar.all_members():
                # A negative size, of any kind of member, would send tarfile backwards for ever.
                if info.size < 0 or (info.isreg() and info.size > end - info.offset_data):
                    skipped.append((str(path), _cut_inside(info.name)))
                    return TarIndex(members, skipped, others)
                verdict = _verdict(info)
                if verdict == "":
                    members.append(TarMember(info.name, info.offset_data, info.size))
                elif verdict == _OTHER:
                    others += not info.isdir()
                else:
                    skipped.append((f"{path}/{info.name}", verdict))
            if tar.damage:
                skipped.append((str(path), tar.damage))
    # Damaged headers surface as any of these; tarfile wraps only some of them.
    except (*_DAMAGE, OSError) as error:
        if _is_compressed(path, file):
            raise refuse_compressed(Path(path)) from error
        skipped.append((str(path), _not_a_tar(error, len(members))))
    return TarIndex(members, skipped, others)


def stream_tar(file: BinaryIO | IO[bytes], max_bytes: int = MAX_MEMBER_BYTES) -> Iterator[StreamMember]:
    """Read the images of a tar that can only be read once, in stored order, and descriptions of its damage.

    It may be compressed with gzip, bzip2 or xz, also in several members, as when compressed tars were concatenated.
    The last entry has no name when it is about the tar itself. Members that are no images by name are one entry at the
    end, with their number. Errors of reading (OSError) are raised.
    """
    images = others = 0
    source = Source(file)
    try:
        with _Tar.open(fileobj=decompress(source), mode="r|") as tar:
            for info in tar.all_members():
                verdict = _verdict(info)
                if verdict == _OTHER:
                    others += not info.isdir()
                elif verdict or info.size > max_bytes:
                    yield StreamMember(info.name, b"", verdict or f"larger than {max_bytes >> 20} MiB")
                else:
                    content = tar.extractfile(info)
                    assert content is not None  # of a regular member
                    yield StreamMember(info.name, content.read())
                    images += 1
            if tar.damage:
                yield StreamMember("", b"", tar.damage)
    except (*_DAMAGE, *DECOMPRESSION_DAMAGE) as error:
        if source.error:
            raise source.error from None
        cut = images and ("unexpected end" in str(error) or isinstance(error, EOFError))
        yield StreamMember("", b"", _cut_inside("a member") if cut else _not_a_tar(error, images))
    if others:
        yield StreamMember("*", b"", count_of_others(others))


def is_compressed_name(name: str) -> bool:
    """Return whether a file of this name is a compressed tar."""
    return os.path.basename(name).lower().endswith(_COMPRESSED_EXTENSIONS)


def refuse_compressed(path: Path) -> DataError:
    """Make the error for a compressed tar."""
    ending = path.name.lower().rpartition(".")[2]
    tool = {"bz2": "bzip2", "tbz2": "bzip2", "xz": "xz", "txz": "xz", "zst": "zstd", "tzst": "zstd", "lz4": "lz4"}
    return DataError(
        f"{path}: compressed tar files cannot be read at random; decompress it to a plain .tar first, or read it as a "
        f"stream: 'pipe:{tool.get(ending, 'gzip')} -dc {path}'"
    )


class _Header(tarfile.TarInfo):
    """A header of bounded size, whose errors the archive records."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if buf.startswith(_ZSTD_MAGIC):
            raise tarfile.HeaderError("compressed with zstd; decompress it in a command: pipe:... | zstd -dc")
        info = super().frombuf(buf, encoding, errors)
        if info.type in _DESCRIPTIONS and not 0 <= info.size <= MAX_HEADER_BYTES:
            raise tarfile.HeaderError(f"extended header of {info.size} bytes, {MAX_HEADER_BYTES} are the most")
        return info

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            assert isinstance(tarfile_, _Tar)
            tarfile_.note_end(type(error).__name__)
            raise


class _Tar(tarfile.TarFile):
    """An archive that records how it ended: tarfile takes a damaged header after the first for its end."""

    tarinfo = _Header
    _ended_by = ""

    def note_end(self, error: str) -> None:
        """Record the error of the header at the current offset, by its class."""
        rest = f"at byte {self.offset}; all members from there on are lost"
        self._ended_by = {
            "EOFHeaderError": _END_MARK,
            "EmptyHeaderError": "no end-of-archive mark (it may have been cut short between two members)",
            "TruncatedHeaderError": f"cut short (inside a header {rest})",
        }.get(error, f"damaged header ({rest})")

    def all_members(self) -> Iterator[tarfile.TarInfo]:
        """Iterate over all members, and those of archives that follow in the same file."""
        zeros = 0  # read since the last member
        while True:
            info = self.next()
            # tarfile would keep every header, a gigabyte for a million members.
            self.members.clear()  # type: ignore[attr-defined]
            if info is not None:
                zeros = 0
                yield info
            elif self._ended_by == _END_MARK and zeros < MAX_PADDING:
                zeros += tarfile.BLOCKSIZE
                self.offset += tarfile.BLOCKSIZE
            else:
                if zeros and not self._ended_by.startswith("damaged"):
                    self._ended_by = _END_MARK
                return

    @property
    def damage(self) -> str:
        """Description of the damage behind the last readable member; empty for an archive with an end mark."""
        return "" if self._ended_by == _END_MARK else self._ended_by


def _verdict(info: tarfile.TarInfo) -> str:
    """Return "" for an image, ``_OTHER``, or the reason why a member is refused."""
    if info.isdir():
        return _OTHER
    if not info.isreg() or info.issparse():
        return "link or special file"
    if leads_outside(info.name):
        return "path that leads outside the tar"
    return "" if is_image_name(info.name) else _OTHER


def leads_outside(name: str) -> bool:
    """Return whether a path is absolute or climbs, also as Windows reads it."""
    return bool(re.match(r"[/\\]|[A-Za-z]:", name)) or ".." in re.split(r"[/\\]", name)


def _cut_inside(name: str) -> str:
    return f"cut short (inside {name!r}; this member and all after it are lost)"


def _not_a_tar(error: BaseException, images: int) -> str:
    return f"not readable as a tar file ({getattr(error, 'strerror', None) or error}; {images} images before that)"


def _is_compressed(path: Path | str, file: IO[bytes] | None) -> bool:
    try:
        with open(path, "rb") if file is None else contextlib.nullcontext(file) as opened:
            opened.seek(0)
            return opened.read(8).startswith(_COMPRESSED_MAGIC)
    except OSError:
        return False
