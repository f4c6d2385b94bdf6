"""From pictures to a store: shards of the list of pictures, each encoded as a whole and written at once.

A shard is a run of the list, so it is the same whoever makes it: a command that was killed goes on with the shards that
are missing, and processes share them without talking to each other. Within a shard, pictures that scale to one size
share batches. Threads read and scale pictures while the backbone works.
"""

import hashlib
import logging
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from featsharp.builder import content_key
from featsharp.errors import ConfigError, DataError, InputError
from featsharp.extraction.compression import PCA, SAMPLE_PICTURES, SAMPLE_VECTORS, fit_pca
from featsharp.extraction.sinks import check_format, file_names, remove_unfinished, save_shard
from featsharp.extraction.sources import check_count, check_path, open_pictures
from featsharp.extraction.store import (
    FEATURES,
    SUMMARY,
    Entry,
    FeatureStore,
    index_file,
    start_store,
    write_index,
)
from featsharp.files import check_writable
from featsharp.model import PreparedImage, SharpEncoder
from featsharp.names import dtype_name
from featsharp.ops.resize import check_size
from featsharp.terminal import progress_bar

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

# A shard has about so many bytes: what a kill can cost, and what is in memory at a time (twice, while one is written).
SHARD_BYTES = 1 << 27
SHARD_PICTURES = (16, 1024)
# Unfinished files of this age, in seconds, are of processes that were killed.
SHARED_AGE = 3600
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda features: features.mean((-2, -1)),
    "max": lambda features: features.amax((-2, -1)),
}


@dataclass(frozen=True)
class Options:
    """Settings of a store: what is kept of a picture, and how.

    Attributes:
        format: "safetensors", "npy", "zarr" or "webdataset".
        dtype: Of the stored numbers: torch.float16, bfloat16 or float32, or its name.
        size: (h, w) in pixels that pictures are scaled to; None: as for :meth:`SharpEncoder.encode_image`.
        output_size: (H, W) of the map in cells; None: by the factor.
        normalized: Whether features stay in PHI-S space.
        summary: Whether the backbone's summary is stored, too.
        pool: "mean" or "max" over the map, for one vector a picture; None: the map.
        pca: Components that features are reduced to, after pooling; the basis is fitted once to the features of some
            pictures, as they would be stored, and saved as pca.safetensors.
        every: Takes every n-th picture or frame only.
        limit: Takes the first so many of these only; None: all.
        shard_size: Pictures that are made and written as one; None: so many as have about 128 MiB.
    """

    format: str = "safetensors"
    dtype: torch.dtype | str = torch.float16
    size: tuple[int, int] | None = None
    output_size: tuple[int, int] | None = None
    normalized: bool = False
    summary: bool = False
    pool: str | None = None
    pca: int | None = None
    every: int = 1
    limit: int | None = None
    shard_size: int | None = None


class _Shard(NamedTuple):
    """The pictures of a shard by their numbers: features, or the reason why there are none."""

    number: int
    entries: dict[int, Entry]
    skipped: dict[int, str]


class Extraction:
    """The work of filling a store, shard by shard.

    Args:
        encoder: On its device.
        source: As for :func:`featsharp.extraction.sources.open_pictures`.
        output: Folder of the store, new or of an earlier run with the same options.
        options: What to store.
        batch: Pictures per pass of the backbone.
        workers: Threads that read and scale pictures.

    Raises:
        InputError: For an argument or option of another kind or range.
        ConfigError: For options that do not go together, or a store with others.
        DataError: For a source without pictures.
    """

    def __init__(
        self,
        encoder: SharpEncoder,
        source: str | os.PathLike[str],
        output: str | os.PathLike[str],
        options: Options = Options(),
        *,
        batch: int = 8,
        workers: int = 2,
    ) -> None:
        check_count("batch", batch)
        check_count("workers", workers)
        self.encoder, self.batch, self.workers = encoder, batch, workers
        self.output = Path(check_path("output", output))
        self.options = options = check_options(options)
        self.dtype = find_dtype(options.dtype)
        self._sink = check_format(options.format, self.dtype)
        self._check_encoder()
        self.pictures = open_pictures(source, options.every, options.limit)
        check_writable(self.output)
        keys = [self.pictures.key(index) for index in range(len(self.pictures))]
        self._doubles = find_doubles(keys)
        self._names = file_names(keys, options.format)
        self.shard_size = self._find_shard_size()
        names = hashlib.sha256("\n".join(keys).encode(errors="surrogatepass"))
        sizes = hashlib.sha256(" ".join(str(self.pictures.size(index)) for index in range(len(keys))).encode())
        start_store(
            self.output,
            {
                "options": {
                    "encoder": f"{encoder.caption} on {encoder.backbone.name}",
                    "backbone": encoder.backbone.name,
                    "weights": content_key(encoder)[:16],
                    "autocast": encoder.backbone.autocast_dtype and dtype_name(encoder.backbone.autocast_dtype),
                    **asdict(options),
                    "dtype": dtype_name(self.dtype),
                    "shard_size": self.shard_size,
                },
                "pictures": len(keys),
                "names": names.hexdigest()[:16],
                "sizes": sizes.hexdigest()[:16],
                "skipped": self.pictures.skipped,
            },
        )
        self._pca: PCA | None = None

    @property
    def shards(self) -> list[int]:
        """Numbers of all shards."""
        return list(range(-(-len(self.pictures) // self.shard_size)))

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        return [shard for shard in self.shards if not index_file(self.output, shard).exists()]

    def indices(self, shard: int) -> range:
        """Numbers of the pictures of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.pictures)))

    def run(self, shards: Iterable[int], on_picture: Callable[[str], object] = lambda text: None) -> None:
        """Make shards, whether they are there or not.

        Args:
            shards: Their numbers.
            on_picture: Called with the number of skipped pictures so far, as text, after each picture.

        Raises:
            FeatSharpError: When the store cannot be written, a full disk included.
        """
        shards = list(shards)
        if self.options.pca is not None and shards:
            self._pca = fit_pca(self.output / "pca.safetensors", self.options.pca, self._sample)
        pictures = (index for shard in shards for index in self.indices(shard))
        with ThreadPoolExecutor(self.workers) as readers, ThreadPoolExecutor(1) as writer:
            prepared = prefetch(readers, self._prepare, pictures, self.workers + 2 * self.batch)
            made = self._make(shards, prepared, on_picture)
            try:
                for _ in prefetch(writer, self._write, made, 1):  # while the next one is made
                    pass
            finally:
                readers.shutdown(wait=False, cancel_futures=True)

    def _check_encoder(self) -> None:
        options = self.options
        channels = self.encoder.embed_dim * self.encoder.upsampler.num_maps
        if options.pca is not None and options.pca > channels:
            raise ConfigError(f"pca takes 1 to {channels} components; got {options.pca}")
        if options.output_size and self.encoder.upsampler.factors == "one":
            raise ConfigError(
                "output_size (--output-size) needs an upsampler, such as bilinear; the backbone's map has one size"
            )
        if options.summary and self.encoder.backbone.summary_dim is None:
            raise ConfigError(f"backbone {self.encoder.backbone.name!r} has no summary; leave out --summary")
        if not options.normalized and not self.encoder.normalizer.invertible:
            raise ConfigError("this encoder's normalizer has no inverse; add --normalized to store normalised features")

    def _find_shard_size(self) -> int:
        if self.options.shard_size is not None:
            return self.options.shard_size
        native = self.encoder.backbone.grid_size(self.encoder.backbone.input_size)
        grid = self.options.output_size or tuple(round(side * self.encoder.factor) for side in native)
        channels = self.options.pca or self.encoder.embed_dim * self.encoder.upsampler.num_maps
        size = channels * self.dtype.itemsize * (1 if self.options.pool else prod(grid))
        least, most = SHARD_PICTURES
        return min(max(SHARD_BYTES // size, least), most)

    def _prepare(self, index: int) -> PreparedImage | str:
        """Read and scale a picture; a reason where that fails."""
        key = self.pictures.key(index)
        if index in self._doubles:
            return "has the name of a picture before it"
        try:
            return self.encoder.prepare_image(self.pictures.picture(index), self.options.size)
        except (DataError, InputError) as error:
            text = str(error).removeprefix(f"{key}: ")
            # Without the place, which the same command may spell otherwise next time.
            return text.partition(f"/{key}: ")[2] or text

    def _make(
        self, shards: Iterable[int], prepared: Iterator[PreparedImage | str], on_picture: Callable[[str], object]
    ) -> Iterator[_Shard]:
        """Encode the pictures of each shard, from what :meth:`_prepare` returned for them."""
        skipped_before = 0

        def keep_readable(shard: _Shard) -> Iterator[tuple[int, PreparedImage]]:
            for index, one in zip(self.indices(shard.number), prepared, strict=False):
                if isinstance(one, str):
                    shard.skipped[index] = one
                else:
                    yield index, one
                skipped = skipped_before + len(shard.skipped)
                on_picture(f"{skipped} skipped" if skipped else "")

        for number in shards:
            shard = _Shard(number, {}, {})
            for batch in batches(keep_readable(shard), self.batch):
                self._encode(batch, shard)
            skipped_before += len(shard.skipped)
            yield shard

    def _encode(self, group: list[tuple[int, PreparedImage]], shard: _Shard) -> None:
        """Add the features of pictures of one size to a shard."""
        low_res_size = group[0][1].low_res_size
        try:
            features, summary = self._features(torch.cat([one.pixels for _, one in group]), low_res_size)
        except InputError as error:  # what this shape of picture cannot have, an output size for example
            shard.skipped.update((index, str(error)) for index, _ in group)
            return
        for row, (index, one) in enumerate(group):
            tensors = {FEATURES: features[row].clone()}
            if summary is not None:
                tensors[SUMMARY] = summary[row].clone()
            if all(tensor.isfinite().all() for tensor in tensors.values()):
                shard.entries[index] = Entry(self.pictures.key(index), one.image_size, tensors)
            else:
                kind = dtype_name(self.dtype)
                shard.skipped[index] = f"the features are NaN or infinite, or too large for {kind}"

    @torch.no_grad()
    def _features(self, pixels: Tensor, low_res_size: tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
        """Features [B, C, H, W] or [B, C] and summaries [B, C_s] of one batch, as they are stored."""
        options, encoder = self.options, self.encoder
        out = encoder(
            encoder.input_conditioner(pixels.to(encoder.device)),
            denormalize=not options.normalized,
            return_summary=options.summary,
            low_res_size=low_res_size,
            output_size=options.output_size,
        )
        features = out.high_res
        if options.pool is not None:
            features = POOLS[options.pool](features)
        if self._pca is not None:
            features = self._pca(features)
        summary = None if out.summary is None else out.summary.to("cpu", self.dtype)
        return features.to("cpu", self.dtype), summary

    def _sample(self) -> Iterator[Tensor]:
        """Yield the features to fit a basis to, of pictures spread over the list but those that will be skipped."""
        total, count = len(self.pictures), SAMPLE_PICTURES
        if self.options.pool is not None:  # one vector of each
            count = max(count, SAMPLE_VECTORS * (self.options.pca or 0))
        for index in dict.fromkeys(number * total // count for number in range(count)):
            one = self._prepare(index)
            with suppress(InputError):
                if not isinstance(one, str):
                    yield self._features(one.pixels, one.low_res_size)[0]

    def _write(self, shard: _Shard) -> None:
        entries = [shard.entries[index] for index in sorted(shard.entries)]
        skipped = [(self.pictures.key(index), shard.skipped[index]) for index in sorted(shard.skipped)]
        for name, reason in skipped:
            logger.warning("%s skipped: %s", name, reason)
        records = save_shard(self._sink, self.output, shard.number, entries, self._names)
        write_index(self.output, shard.number, records, skipped)


def extract(
    encoder: SharpEncoder,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: Options = Options(),
    *,
    batch: int = 8,
    workers: int = 2,
    rank: int = 0,
    ranks: int = 1,
    progress: bool = True,
) -> FeatureStore:
    """Store the features of many pictures; what is already in the store is not made again.

    Args:
        encoder: On its device.
        source: A picture, folder, list, pattern, tar, video or URL; see
            :func:`featsharp.extraction.sources.open_pictures`.
        output: Folder of the store.
        options: What to store.
        batch: Pictures per pass of the backbone.
        workers: Threads that read and scale pictures.
        rank: Number of this process among ``ranks``, each of which makes its own shards.
        ranks: Number of processes.
        progress: Whether to show a bar on stderr.

    Returns:
        The store, with the shards of other processes where they have finished.

    Raises:
        InputError: For an argument or option of another kind or range.
        ConfigError: For options that do not go together, or a store that was made with others.
        DataError: For a source without pictures.
        FeatSharpError: When the store cannot be written.
    """
    check_count("ranks", ranks)
    if rank not in range(ranks):
        raise InputError(f"rank takes 0 to {ranks - 1}, as there are {ranks} ranks; got {rank!r}")
    work = Extraction(encoder, source, output, options, batch=batch, workers=workers)
    remove_unfinished(work.output, options.format, older_than=0 if ranks == 1 else SHARED_AGE)
    todo = [shard for shard in work.missing if shard % ranks == rank]
    count = sum(len(work.indices(shard)) for shard in todo)
    with progress_bar("extract", count, unit="picture", wanted=progress and rank == 0) as advance:
        work.run(todo, advance)
    store = FeatureStore(output)
    if store.complete and ranks > 1:  # nobody writes shards any more; a process that starts now may check the folder
        remove_unfinished(work.output, options.format, older_than=1)
    return store


def check_options(options: Options) -> Options:
    """Check what can be checked without an encoder; returned are sizes as tuples.

    Raises:
        InputError: For a value of another kind or range.
        ConfigError: For an unknown way to pool.
    """
    for name in ("pca", "limit", "shard_size"):
        if getattr(options, name) is not None:
            check_count(name, getattr(options, name))
    check_count("every", options.every)
    for name in ("normalized", "summary"):
        if not isinstance(getattr(options, name), bool):
            raise InputError(f"{name} is True or False; got {getattr(options, name)!r}")
    sizes = {}
    for name, unit in (("size", "pixels"), ("output_size", "cells")):
        if getattr(options, name) is not None:
            sizes[name] = check_size(name, getattr(options, name), unit)
            if min(sizes[name]) < 1:
                raise InputError(f"{name} has sides of at least 1; got {getattr(options, name)!r}")
    if options.pool is not None and options.pool not in POOLS:
        raise ConfigError(f"unknown pool {options.pool!r}; use {' or '.join(POOLS)}")
    return replace(options, size=sizes.get("size"), output_size=sizes.get("output_size"))


def find_dtype(given: torch.dtype | str) -> torch.dtype:
    """Return the type that :class:`Options` names; InputError for another one."""
    name = str(given).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype takes {', '.join(DTYPES)}, of torch or by name; got {given!r}")
    return DTYPES[name]


def find_doubles(keys: Sequence[str]) -> set[int]:
    """Find the numbers of keys that occur before, as members of a tar may."""
    first: dict[str, int] = {}
    return {index for index, key in enumerate(keys) if first.setdefault(key, index) != index}


def prefetch(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield ``function`` of every item in order, computed in a pool, at most ``ahead`` of them in advance."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batches(pictures: Iterable[tuple[int, PreparedImage]], size: int) -> Iterator[list[tuple[int, PreparedImage]]]:
    """Yield numbered pictures in lists of one shape each, full ones as soon as they are, then the rest."""
    groups: dict[object, list[tuple[int, PreparedImage]]] = defaultdict(list)
    for index, picture in pictures:
        shape = (picture.pixels.shape, picture.low_res_size)
        groups[shape].append((index, picture))
        if len(groups[shape]) == size:
            yield groups.pop(shape)
    yield from groups.values()
