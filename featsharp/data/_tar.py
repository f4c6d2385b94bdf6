"""Index of a tar file: where each image lies, read from the headers alone. Nothing is extracted."""

import os
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from featsharp.data.images import is_image_name
from featsharp.errors import DataError

_COMPRESSED_EXTENSIONS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")


class TarMember(NamedTuple):
    """One image inside a tar file: ``size`` bytes from byte ``offset`` on."""

    name: str
    offset: int
    size: int


def index_tar(path: Path) -> tuple[list[TarMember], list[str]]:
    """The images of a tar file in stored order, and what is wrong with the file (empty when nothing is).

    A damaged or truncated file gives the members up to the damage and one line that says where it is. Raises DataError
    for a compressed tar, which cannot be read at random.
    """
    members: list[TarMember] = []
    problems: list[str] = []
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                # tarfile would keep every header, a gigabyte for a million members.
                tar.members.clear()  # type: ignore[attr-defined]
                if info.isreg() and not 0 <= info.size <= end - info.offset_data:
                    problems.append(f"{path}: cut short inside {info.name!r}; this member and all after it are lost")
                    return members, problems
                if not is_image_name(info.name):
                    continue
                if info.isreg() and not info.issparse():
                    members.append(TarMember(info.name, info.offset_data, info.size))
                elif not info.isdir():
                    problems.append(f"{path}: {info.name!r} is a link or special file, not an image; left out")
            assert tar.fileobj is not None
            problems.extend(_unexpected_end(path, tar.fileobj, tar.offset))  # type: ignore[arg-type]
    # Damaged headers surface as any of these; tarfile wraps only some of them.
    except (tarfile.TarError, OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        if _is_compressed(path):
            raise refuse_compressed(path) from error
        problems.append(f"{path}: not readable as a tar file from here on ({error}); {len(members)} images before it")
    return members, problems


def is_compressed_name(name: str) -> bool:
    """Whether a file of this name is a compressed tar."""
    return os.path.basename(name).lower().endswith(_COMPRESSED_EXTENSIONS)


def refuse_compressed(path: Path) -> DataError:
    """The error for a compressed tar."""
    return DataError(f"{path}: compressed tar files cannot be read at random; decompress it to a plain .tar first")


def _unexpected_end(path: Path, file: BinaryIO, offset: int) -> list[str]:
    """tarfile takes a damaged header after the first for the end of the archive: look at what it stopped at."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        return [f"{path}: no end-of-archive mark; the file may have been cut short between two members"]
    if len(block) < tarfile.BLOCKSIZE:
        return [f"{path}: cut short inside a header at byte {offset}; all members from there on are lost"]
    if any(block):
        return [f"{path}: damaged header at byte {offset}; all members from there on are lost"]
    return []


def _is_compressed(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(_COMPRESSED_MAGIC)
    except OSError:
        return False
