"""Folders and tar shards of images with random access.

Tar shards are as for webdataset, but local ones are not streamed: each is indexed once by its headers and then read by
seeking. So any sample number maps to one image, a run resumes exactly where it stopped, and the order depends on
neither the number of ranks nor the number of workers. Shards by URL or from a command are streams.
"""

import functools
import json
import logging
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from featsharp.data._order import shuffled
from featsharp.data._tar import index_tar, is_compressed_name, refuse_compressed
from featsharp.data.entries import expand_braces
from featsharp.data.images import IMAGE_EXTENSIONS, EncodedImage, is_image_name
from featsharp.data.skips import count_of_others, describe_kinds
from featsharp.errors import DataError
from featsharp.files import list_files

logger = logging.getLogger(__name__)

_PLAIN_FILE = -1  # in place of a shard number
_NAME_CODE = ("utf-8", "surrogatepass")  # takes any name, whatever the system's encoding
_EXPECTED = (
    f"expected image files ({' '.join(IMAGE_EXTENSIONS)}) or webdataset .tar shards of them, at any depth of a folder"
)


class ImageSource:
    """A fixed list of encoded images in plain files and tar shards; made by :func:`open_source`.

    Reading opens the file each time, so one source may be used from any number of threads and worker processes. The
    index is held in a few flat arrays: about 32 bytes and a name per image.

    Attributes:
        path: The folder or tar file; names are relative to it.
        skipped: The (name, reason) of files and members that were damaged or refused while indexing.
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

    @classmethod
    def of_files(cls, folder: Path, names: Iterable[str]) -> "ImageSource":
        """Make the source of these files of a folder, by relative names; only tars are looked at.

        Raises:
            DataError: For a compressed tar.
        """
        source = cls(folder)
        for name in names:
            if is_compressed_name(name):
                raise refuse_compressed(folder / name)
            if name.lower().endswith(".tar"):
                source._append_tar(folder / name, f"{name}/")
            else:
                source._append(name)
        return source

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    @property
    def problems(self) -> list[str]:
        """Lines of text for ``skipped``."""
        return [f"{name}: {reason}" for name, reason in self.skipped]

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, index: int) -> str:
        """Name of an image relative to ``path``: ``folder/x.jpg``, or ``folder/shard.tar/x.jpg`` inside a tar."""
        self._check(index)
        start = self._name_ends[index - 1] if index else 0
        return bytes(self._names[start : self._name_ends[index]]).decode(*_NAME_CODE)

    def size(self, index: int) -> int:
        """Bytes of an encoded image; -1 for a file that cannot be found (any more)."""
        self._check(index)
        if self._shard_of[index] != _PLAIN_FILE:
            return self._sizes[index]
        try:
            return os.stat(self.path / self.name(index)).st_size
        except (OSError, ValueError):
            return -1

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

    def encoded(self, index: int, prefix: str = "") -> EncodedImage:
        """Read an image, named by ``prefix`` and its relative name; an entry in ``skipped`` where that fails."""
        name = self.name(index)
        try:
            return EncodedImage(prefix + name, self.read(index), [])
        except DataError as error:
            return EncodedImage("", b"", [(prefix + name, str(error).removeprefix(f"{self.path}/{name}: "))])

    def probe(self) -> Iterator[EncodedImage]:
        """Iterate over all images in an order that is spread over the source."""
        for position in range(len(self)):
            yield self.encoded(shuffled(position, len(self), 0), f"{self.path}/")

    def __repr__(self) -> str:
        return f"ImageSource({str(self.path)!r}, {len(self)} images, {self.num_shards} shards)"

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")

    def _append(self, name: str, shard: int = _PLAIN_FILE, offset: int = 0, size: int = 0) -> None:
        self._names += name.encode(*_NAME_CODE)
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

    Braces name several files: ``shard-{000..099}.tar``.

    The order is that of the sorted relative paths, within a shard that of its members. Which files of a folder count
    says :func:`featsharp.files.list_files`; only names with an image extension do, and other members (``.json``,
    ``.cls``, ``.pyd``, ...) are never decoded.
    Damaged shards give the members before the damage and a line in ``problems``.

    Args:
        path: The folder or tar file.
        exclude: A folder below ``path`` to leave out.

    Raises:
        DataError: The path is missing, neither folder nor tar, or without a single image; or a tar is compressed.
    """
    source = ImageSource(Path(path))
    if source.path.is_dir():
        names = list_files(source.path, source.skipped, exclude=exclude)
        results = _find_results(source.path, names)
        for name in names:
            if is_image_name(name) and name not in results:
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
    elif source.path.suffix.lower() == ".tar" and source.path.is_file():
        source._append_tar(source.path, "")
    else:
        raise DataError(f"{source.path}: neither a folder nor a .tar file; {_EXPECTED}")
    if not len(source):
        kinds = describe_kinds(
            [*source.skipped, *([("", count_of_others(source.num_others))] if source.num_others else [])]
        )
        account = f"; found: {kinds}" if kinds else ""
        account += f" (the first, {source.problems[0]})" if source.problems else ""
        raise DataError(f"{source.path}: no images found; {_EXPECTED}{account}")
    for problem in source.problems:
        _warn_once(problem)
    return source


def list_images(folder: Path, problems: list[tuple[str, str]]) -> list[str]:
    """List the image files in a folder as :func:`open_source` does, without what is in tars.

    ``problems`` takes (path, reason) of folders that cannot be listed, and of pipes and devices named like images.
    """
    found: list[tuple[str, str]] = []
    names = list_files(folder, found)
    results = _find_results(folder, names)
    problems += [
        (path, reason) for path, reason in found if os.path.isdir(path) or is_image_name(os.path.basename(path))
    ]
    return [name for name in names if is_image_name(name) and name not in results]


def _open_shards(pattern: Path) -> ImageSource:
    """Index the tars of a name with braces, as a source of their folder."""
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


def _find_results(folder: Path, names: list[str]) -> set[str]:
    """Find the pictures that ``featsharp upsample`` wrote: those beside the file of their features."""
    known = set(names)
    twins = ((name, name.removesuffix(".png") + ".safetensors") for name in names if name.endswith(".png"))
    return {name for name, features in twins if features in known and _holds_features(folder / features)}


def _holds_features(path: Path) -> bool:
    """Return whether a safetensors file has the tensors that ``featsharp upsample`` writes, by its header."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, 1 << 16)))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(header, dict) and {"low_res", "high_res"} <= header.keys()
