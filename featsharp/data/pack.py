"""Packing of an image folder into webdataset-style tar shards, the fastest input of large training runs."""

import io
import itertools
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from featsharp.data.images import try_decode
from featsharp.data.sources import ImageSource, open_source
from featsharp.errors import ConfigError, DataError
from featsharp.files import check_writable, list_files, replacing

logger = logging.getLogger(__name__)

_SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")
_LABEL_LENGTH = 80  # with number and extension within the 100 characters that every tar reader supports


@dataclass(frozen=True)
class PackReport:
    """Result of :func:`pack_images`."""

    written: int  # images
    shards: int  # tar files
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of images that do not decode
    problems: list[str] = field(default_factory=list)  # damage of the input besides single images


def pack_images(
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    images_per_shard: int = 1000,
    overwrite: bool = False,
) -> PackReport:
    """Write all images of a folder, as they are encoded, into ``out/shard-000000.tar`` and so on.

    Every image is decoded once as a check; those that fail are left out and reported. Members are named by a running
    number and the image's relative path, ``000000123_cats_tabby.jpg``. The same input gives the same bytes. Shards are
    written atomically: after an error the complete ones stay.

    Args:
        images: A folder (nested), or any other input of :func:`featsharp.data.open_source`.
        out: A folder, created when missing. Inside ``images`` it is not packed.
        images_per_shard: Most images per shard.
        overwrite: Whether to replace the shards of an earlier run; otherwise they are an error.

    Raises:
        ConfigError: ``images_per_shard`` is below 1.
        DataError: No usable images, ``out`` is ``images`` or has tar files already, or writing fails.
    """
    if images_per_shard < 1:
        raise ConfigError(f"images_per_shard is {images_per_shard}; at least 1 is needed")
    out = Path(out)
    old_shards = _check_out(Path(images), out, overwrite)
    check_writable(out)  # before all images are decoded
    source = open_source(images, exclude=out)
    skipped: list[tuple[str, str]] = []
    members = _decodable(source, skipped)
    written = 0
    shards: list[Path] = []
    for first in members:
        batch = itertools.chain([first], itertools.islice(members, images_per_shard - 1))
        path = out / f"shard-{len(shards):06d}.tar"
        written += _write_shard(path, batch, written)
        shards.append(path)
        logger.info("%s written, %d images so far", path, written)
    if not written:
        name, reason = skipped[0]
        raise DataError(f"{source.path}: none of {len(source)} images can be decoded; {name}: {reason}")
    for path in old_shards:
        if path not in shards:
            path.unlink()  # a longer earlier run must not mix with this one
    return PackReport(written, len(shards), skipped, list(source.problems))


def _check_out(images: Path, out: Path, overwrite: bool) -> list[Path]:
    """Check the output folder; return the shards in it that may be replaced."""
    if out.resolve() == images.resolve():
        raise DataError(f"{out}: the output folder is the image folder itself; name another one")
    if not os.path.exists(out):
        return []
    if not out.is_dir():
        raise DataError(f"{out}: exists and is not a folder; name another output folder")
    tars = [out / name for name in list_files(out, deep=False) if name.lower().endswith(".tar")]
    if tars and not overwrite:
        raise DataError(f"{out}: already holds {len(tars)} tar files; name another folder or overwrite")
    if foreign := [path.name for path in tars if not _SHARD_NAME.fullmatch(path.name)]:
        raise DataError(f"{out}: holds {foreign[0]}, a tar file that packing did not write; name another folder")
    if images.resolve() in (path.resolve() for path in tars):
        raise DataError(f"{images}: would be overwritten by the packing; name another output folder")
    return tars


def _decodable(source: ImageSource, skipped: list[tuple[str, str]]) -> Iterator[tuple[str, bytes]]:
    """Iterate over (name, encoded bytes) of the images that decode; the others are added to ``skipped``."""
    for index in range(len(source)):
        encoded = source.encoded(index)
        if try_decode(encoded, skipped) is None:
            logger.warning("%s skipped: %s", *skipped[-1])
        else:
            yield encoded.name, encoded.data


def _write_shard(path: Path, members: Iterable[tuple[str, bytes]], first_number: int) -> int:
    """Write one shard atomically; returns the number of members."""
    count = 0
    try:
        with (
            replacing(path, sync=True) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for name, data in members:
                info = tarfile.TarInfo(_member_name(name, first_number + count))
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                count += 1
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); free space or name another folder, "
            f"the shards before it are complete"
        ) from error
    return count


def _member_name(name: str, number: int) -> str:
    """Name a member uniquely, without a dot before the extension, which webdataset takes as the start of the type."""
    path = PurePosixPath(name)
    label = re.sub(r"[^A-Za-z0-9-]+", "_", str(path.with_suffix(""))).strip("_")[-_LABEL_LENGTH:]
    return f"{number:09d}_{label}{path.suffix.lower()}"
