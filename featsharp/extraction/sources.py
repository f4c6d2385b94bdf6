"""Pictures to extract features of: files, folders, lists, patterns, tars, videos, URLs.

All are a fixed list of keys in a fixed order, read by number, so that work can be divided and taken up again.
"""

import fnmatch
import glob
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from featsharp.data._tar import index_tar, is_compressed_name, leads_outside, refuse_compressed
from featsharp.data.images import decode_image, is_image_name
from featsharp.data.sources import ImageSource, open_source
from featsharp.errors import ConfigError, DataError, InputError, MissingDependencyError
from featsharp.extraction.video import Video
from featsharp.files import is_hidden, list_files, path_in_list, read_lines
from featsharp.urls import is_url, redact_setting

LIST_ENDINGS = (".txt", ".lst")
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
_MAGIC = re.compile(r"[*?\[]")
_EXPECTED = (
    "a picture, a folder, a .tar, a list (.txt, one path a line), a pattern such as 'photos/**/*.jpg', a video "
    f"({' '.join(VIDEO_ENDINGS)}), or a URL of fsspec such as s3://BUCKET/photos"
)


class Pictures(Protocol):
    """Pictures with keys, read by number from any thread.

    Attributes:
        skipped: (name, reason) of what was damaged or refused while listing; names are relative to the source.
    """

    skipped: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name of a picture: its path relative to the source."""

    def size(self, index: int) -> int:
        """Bytes of its file, or of that of its video; -1 where that is not known at once."""

    def picture(self, index: int) -> Image.Image:
        """Read an RGB picture; raises DataError where that fails."""


def open_pictures(source: str | os.PathLike[str], every: int = 1, limit: int | None = None) -> Pictures:
    """List the pictures of a source.

    Args:
        source: A picture; a folder, with tars in it, or a ``.tar``, also with braces (as for training); a list of
            pictures and tars, one path or URL a line, relative to the list; a pattern for :mod:`glob` of pictures and
            tars; a video; or a URL that fsspec knows, of a picture, folder, pattern, tar or video.
        every: Takes every n-th picture only, of a video every n-th frame.
        limit: Takes the first so many of these only.

    Raises:
        InputError: For what is no path, or no number of at least 1.
        DataError: For a source that is missing or holds no picture.
        ConfigError: For a URL that fsspec cannot open.
        MissingDependencyError: For a video without PyAV.
    """
    check_count("every", every)
    if limit is not None:
        check_count("limit", limit)
    text = check_path(
        "source", source, f"{_EXPECTED}; write many paths into a list, and give opened pictures to encoder.encode_image"
    )
    pictures = _open_url(text) if is_url(text) else _open_path(Path(text))
    return pictures if every == 1 and limit is None else _Some(pictures, range(0, len(pictures), every)[:limit])


def check_path(name: str, path: object, expected: str = "a path") -> str:
    """Return the path that a user gave as ``name`` as text; InputError for an empty one, and what is none."""
    if not isinstance(path, (str, bytes, os.PathLike)) or not os.fspath(path):
        given = repr(path) if path is None or isinstance(path, (str, bytes)) else f"a {type(path).__name__}"
        raise InputError(f"{name} takes {expected}; got {given}")
    return os.fsdecode(path)


def check_count(name: str, value: object) -> None:
    """Raise InputError for what is no whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} takes a whole number of at least 1; got {value!r}")


class _Files:
    """Pictures of an index of files."""

    def __init__(self, files: "ImageSource | _RemoteFiles") -> None:
        self.files = files
        root = files.path.as_posix() if isinstance(files, ImageSource) else files.root
        # However the source was spelled, its names are the same.
        self.skipped = [(_relative_to(root, name), reason) for name, reason in files.skipped]

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return self.files.name(index)

    def size(self, index: int) -> int:
        return self.files.size(index)

    def picture(self, index: int) -> Image.Image:
        return decode_image(self.files.read(index), name=self.files.name(index))


class _Some:
    def __init__(self, pictures: Pictures, numbers: range) -> None:
        self.pictures, self.numbers = pictures, numbers
        self.skipped = pictures.skipped

    def __len__(self) -> int:
        return len(self.numbers)

    def key(self, index: int) -> str:
        return self.pictures.key(self.numbers[index])

    def size(self, index: int) -> int:
        return self.pictures.size(self.numbers[index])

    def picture(self, index: int) -> Image.Image:
        return self.pictures.picture(self.numbers[index])


# Local files


def _open_path(path: Path) -> Pictures:
    name = path.name.lower()
    if not path.exists() and glob.has_magic(str(path)):
        found = _find_files(path.as_posix())
        if not found:
            raise DataError(f"{path}: no picture has such a name; the source is {_EXPECTED}")
        return _Files(_local_files(path, found))
    if path.is_dir() or name.endswith(".tar") or is_compressed_name(name) or ("{" in name and not path.exists()):
        return _Files(open_source(path))
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; the source is {_EXPECTED}")
    if name.endswith(VIDEO_ENDINGS):
        return Video(path.name, path)
    if name.endswith(LIST_ENDINGS):
        return _open_list(path)
    return _Files(_local_files(path, [str(path)]))


def _relative_to(root: str, name: str) -> str:
    name = name.replace(os.sep, "/")
    return os.path.basename(root) if name == root else name.removeprefix(f"{root}/").removeprefix("./")


def _is_wanted(name: str) -> bool:
    """Return whether a file counts by its relative name: a picture, or a tar, which may be refused."""
    return is_image_name(name) or ((name.lower().endswith(".tar") or is_compressed_name(name)) and not is_hidden(name))


def _find_files(pattern: str) -> list[str]:
    """List the pictures and tars of a pattern; below ``**``, which glob would follow through loops, as in a folder."""
    if deep := re.fullmatch(r"((?:[^/]*/)*?)\*\*/(.+)", pattern + "/*" * pattern.endswith("**")):
        before, parts = deep[1], ("**", *deep[2].split("/"))
        folders = glob.glob(before) if before else [""]
        found = [at + name for at in folders for name in list_files(at or ".") if _fits(tuple(name.split("/")), parts)]
    else:
        found = glob.glob(pattern)
    fixed = os.path.dirname(pattern[: _MAGIC.search(pattern).start()])  # type: ignore[union-attr]
    return sorted(name for name in found if _is_wanted(os.path.relpath(name, fixed or ".")) and os.path.isfile(name))


def _fits(name: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Match the parts of a path with those of a pattern, of which ``**`` is any number of folders."""
    if not name or not pattern:
        return not name and not pattern
    if pattern[0] == "**":
        return _fits(name, pattern[1:]) or _fits(name[1:], pattern)
    return fnmatch.fnmatch(name[0], pattern[0]) and _fits(name[1:], pattern[1:])


def _local_files(source: Path, paths: Sequence[str]) -> ImageSource:
    """Pictures and tars as a source of the folder that they share; one that is named twice counts once."""
    absolute = list(dict.fromkeys(os.path.abspath(path) for path in paths))
    folder = Path(os.path.commonpath([os.path.dirname(path) for path in absolute]))
    files = ImageSource.of_files(folder, [Path(path).relative_to(folder).as_posix() for path in absolute])
    if not len(files):
        raise DataError(f"{source}: no pictures in its tars; {'; '.join(files.problems[:3])}")
    return files


def _open_list(path: Path) -> Pictures:
    entries = [line for line in read_lines(path) if line and not line.startswith("#")]
    if not entries:
        raise DataError(f"{path}: the list is empty; write one path of a picture or a tar a line")
    if all(map(is_url, entries)):
        return _Files(_RemoteFiles.of_urls(entries))
    if mixed := [entry for entry in entries if is_url(entry)]:
        raise DataError(f"{path}: paths and URLs in one list ({redact_setting(mixed[0])!r} is a URL); make two lists")
    return _Files(_local_files(path, [str(path.parent / path_in_list(entry)) for entry in entries]))


# URLs


class _RemoteFiles:
    """Pictures in files and tars of an fsspec file system."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self.filesystem, self.root = filesystem, root.rstrip("/")
        self.skipped: list[tuple[str, str]] = []
        self._names: list[str] = []
        self._paths: list[str] = []
        self._offsets, self._sizes = array("q"), array("q")

    @classmethod
    def of_urls(cls, urls: Sequence[str]) -> "_RemoteFiles":
        opened = [_find_filesystem(url) for url in dict.fromkeys(urls)]
        filesystem, paths = opened[0][0], [path for _, path in opened]
        if any(other is not filesystem for other, _ in opened):
            raise ConfigError("the URLs of a list are of several servers or protocols; make a list for each")
        files = cls(filesystem, os.path.commonpath([os.path.dirname(path) for path in paths]))
        for path in paths:
            files.add(path)
        if not len(files):
            raise DataError(f"no pictures in {redact_setting(urls[0])} and the other tars of the list")
        return files

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def size(self, index: int) -> int:
        return self._sizes[index]

    def read(self, index: int) -> bytes:
        start, size = self._offsets[index], self._sizes[index]
        span = {} if start < 0 else {"start": start, "end": start + size}
        try:
            data: bytes = self.filesystem.cat_file(self._paths[index], **span)
        except Exception as error:  # file systems raise what their servers say
            raise DataError(f"{self._names[index]}: cannot be read ({type(error).__name__}: {error})") from error
        return data

    def add(self, path: str, size: int = -1) -> None:
        """Add a picture of so many bytes (-1: not known), or those of a tar."""
        if is_compressed_name(path):
            raise refuse_compressed(Path(path))
        if not path.lower().endswith(".tar"):
            self._append(path, size=size)
            return
        try:
            with self.filesystem.open(path, "rb") as file:
                members, skipped, _ = index_tar(path, file)
        except Exception as error:  # a server may answer later: what it has is not left out
            raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
        self.skipped += skipped
        for member in members:
            self._append(path, member.name, member.offset, member.size)

    def _append(self, path: str, member: str = "", offset: int = -1, size: int = -1) -> None:
        name = path.removeprefix(self.root).lstrip("/") or os.path.basename(path)
        if leads_outside(name):  # names in a zip may
            self.skipped.append((name, "path that leads outside the source"))
            return
        self._names.append(f"{name}/{member}" if member else name)
        self._paths.append(path)
        self._offsets.append(offset)
        self._sizes.append(size)


def _open_url(url: str) -> Pictures:
    filesystem, path = _find_filesystem(url)
    shown = redact_setting(url)
    try:
        if path.lower().endswith(VIDEO_ENDINGS):
            return Video(os.path.basename(path), lambda: filesystem.open(path, "rb"))
        if glob.has_magic(path):
            found = filesystem.glob(path, detail=True)
            root = os.path.dirname(path[: _MAGIC.search(path).start()])  # type: ignore[union-attr]
        elif filesystem.isdir(path):
            found, root = filesystem.find(path, detail=True), path
        elif filesystem.exists(path):
            found, root = {path: {}}, os.path.dirname(path)
        else:
            raise DataError(f"{shown}: not found; the source is {_EXPECTED}")
        files = _RemoteFiles(filesystem, root)
        for name in sorted(found):
            inside = name.removeprefix(files.root).lstrip("/")
            if _is_wanted(inside) or len(found) == 1:
                size = found[name].get("size")
                files.add(name, -1 if size is None else size)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{shown}: cannot be listed ({type(error).__name__}: {error})") from error
    if not len(files):
        raise DataError(f"{shown}: no pictures found; the source is {_EXPECTED}")
    return _Files(files)


def _find_filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingDependencyError("URLs need: pip install fsspec") from error
    try:
        filesystem, path = url_to_fs(url)
    except ImportError as error:
        raise MissingDependencyError(f"{redact_setting(url)}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{redact_setting(url)}: fsspec cannot open it ({type(error).__name__}: {error})") from error
    return filesystem, str(path)
