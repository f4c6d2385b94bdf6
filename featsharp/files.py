"""Files: folders listed by one rule, lists in text files, names that fit, and atomic writing."""

import codecs
import contextlib
import errno
import hashlib
import itertools
import logging
import os
import shutil
import stat
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO

from featsharp.errors import DataError, FeatSharpError

logger = logging.getLogger(__name__)

# Folders of systems and archives, whose pictures are copies, thumbnails or deleted.
HIDDEN_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
# Most bytes of a file's name that common file systems take.
NAME_BYTES = 255

# Errors of writing that belong to one name: another file may well be written.
_OF_ONE_FILE = {
    *(errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EINVAL, errno.EILSEQ),
    *(errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOENT),
}


def cache_folder() -> Path:
    """Return the folder for what can be made or fetched again: $FEATSHARP_CACHE, else featsharp in the user's."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FEATSHARP_CACHE") or user_cache / "featsharp").expanduser()


def list_files(
    root: str | os.PathLike[str],
    problems: list[tuple[str, str]] | None = None,
    *,
    exclude: str | os.PathLike[str] | None = None,
    deep: bool = True,
) -> list[str]:
    """List the files below a folder by the one rule that all readers share.

    Hidden files and folders (:func:`is_hidden`) are left out; ``root`` itself, which the user named, may be hidden.
    Links are followed. A folder that is reached twice, as in a loop of links, counts once, under the first name in the
    order. Pipes, devices and sockets are never opened. A link to nothing is listed: reading it tells the reason.

    Args:
        root: The folder.
        problems: Takes (path, reason) of folders that cannot be listed and of special files; None: they are logged.
        exclude: A folder below ``root`` to leave out.
        deep: Whether to look into folders.

    Returns:
        Paths relative to ``root``, with slashes, sorted.
    """
    found: list[str] = []
    noted: list[tuple[str, str]] = [] if problems is None else problems
    seen = {os.path.realpath(exclude)} if exclude is not None else set()

    def note(error: OSError) -> None:
        noted.append((str(error.filename), f"cannot be listed ({error.strerror})"))

    for folder, folders, files in os.walk(root, followlinks=True, onerror=note):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        inside = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if not is_hidden(name)) if deep else []
        for name in files:
            if is_hidden(name):
                continue
            path = os.path.join(folder, name)
            if is_special(path):  # reading it may never end
                noted.append((path, "link or special file"))
            else:
                found.append((inside / name).as_posix())
    if problems is None:
        for path, reason in noted:
            logger.warning("%s: %s", path, reason)
    return sorted(found)


def is_hidden(name: str) -> bool:
    """Return whether a part of a relative path begins with a dot, or is one of :data:`HIDDEN_FOLDERS`."""
    parts = PurePosixPath(name).parts
    return any((part.startswith(".") and part not in (".", "..")) or part in HIDDEN_FOLDERS for part in parts)


def is_special(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a pipe, a device or a socket, reading which may never end; not for folders."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # no such file
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def read_lines(path: Path) -> list[str]:
    """Read the lines of a list without blanks around them, whatever system wrote it.

    Text is UTF-8 or, with a byte order mark, UTF-16; lines may end as on Windows. Other bytes are kept as
    :func:`os.fsdecode` does, so that names of files in them still lead to these.

    Raises:
        DataError: When it cannot be read.
    """
    try:
        data = path.read_bytes()
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16") if wide else data.decode("utf-8-sig", "surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list ({getattr(error, 'strerror', None) or error})") from error
    return [line.strip() for line in text.splitlines()]


def path_in_list(text: str) -> PurePosixPath:
    """Make the path that a list or an annotation names, also where it was written on Windows."""
    return PurePosixPath(text.replace("\\", "/"))


def fit_name(name: str, ending: str) -> str:
    """Join name and ending in :data:`NAME_BYTES`: a longer name is cut and ends in a hash of the whole."""
    if len(os.fsencode(name + ending)) <= NAME_BYTES:
        return name + ending
    tail = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}{ending}"
    while len(os.fsencode(name + tail)) > NAME_BYTES:
        name = name[:-1]
    return name + tail


def free_name(target: Path, taken: set[str], ending: str) -> Path:
    """Choose the stem of an image's results, which no other image has, also where the disk ignores case.

    It is that of the image, or its whole name, as for photo.png beside photo.jpg, or that with a number.

    Args:
        target: The image's name in the folder of the results.
        taken: The stems so far, as :func:`caseless` has them; the new one is added.
        ending: The longest of the results' names, for which there is room.
    """
    full = target.name
    stem = target.stem if target.stem.strip(".") else full
    for name in itertools.chain([stem, full], (f"{full}-{number}" for number in itertools.count(2))):
        chosen = target.with_name(fit_name(name, ending).removesuffix(ending))
        if (key := caseless(chosen)) not in taken:
            taken.add(key)
            return chosen
    raise AssertionError("there is always a further number")


def caseless(path: PurePath) -> str:
    """Make the text that two paths have in common where they are one on a disk that ignores case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", str(path)).casefold())


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file to write to, which replaces ``path`` at the end of the block.

    After an error ``path`` is unchanged and the temporary file is deleted. A process that is killed leaves a hidden
    ``.NAME.PID.tmp``. The folder is created. A symbolic link stays, the file that it leads to is replaced; permissions
    of an earlier file stay. What is no file, such as /dev/null or a pipe, is never replaced but written to.

    Args:
        path: Of the file at the end; it has another name, ``file.name``, until then.
        sync: Whether to flush the file to the disk first, as a full disk may show only then.

    Raises:
        OSError: When it cannot be written.
    """
    if is_special(path):
        with open(path, "wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(fit_name(f".{path.name}", f".{os.getpid()}.tmp"))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # no earlier file, or not ours
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # renamed, or never created
            temporary.unlink()


def read_file(path: Path) -> bytes:
    """Read a file whole; OSError also for a device or a pipe, which may never end."""
    if is_special(path):
        raise OSError(errno.EINVAL, "a device, not a file", str(path))
    return path.read_bytes()


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically, see :func:`replacing`; errors are those of :func:`cannot_write`."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError, detail: str = "") -> FeatSharpError:
    """Make the error for a file that cannot be written.

    It is a DataError where that is the fault of its name or place, as for a bad image; otherwise (a full disk)
    the next one will fail too.
    """
    kind = DataError if error.errno in _OF_ONE_FILE else FeatSharpError
    advice = "choose another folder" if error.errno in _OF_ONE_FILE else "free some space or choose another folder"
    return kind(f"cannot write {path}{detail}: {error.strerror or error}; {advice}")


def check_writable(folder: Path) -> None:
    """Check, before long work, that files can be written to a folder, which is left as it was.

    Raises:
        FeatSharpError: When it or what has to be created for it cannot be written to.
    """
    created = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        os.close(descriptor)
        os.unlink(name)
    except OSError as error:
        raise FeatSharpError(str(cannot_write(folder, error))) from error
    finally:
        for place in created:
            with contextlib.suppress(OSError):  # never created, or another process has written to it
                place.rmdir()


def remove_leftovers(folder: Path, older_than: float = 0, pattern: str = ".*.tmp") -> None:
    """Delete the unfinished files in ``folder`` of writers that were killed.

    Their age is at least ``older_than`` seconds: where others may be writing now, give more than any file takes. Those
    of :func:`replacing` have names of ``pattern``.
    """
    latest = time.time() - older_than
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # gone, or not ours to delete
            if path.stat().st_mtime <= latest:
                path.unlink()
