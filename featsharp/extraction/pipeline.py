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
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from featsharp.builder import content_key
from featsharp.errors import ConfigError, DataError, InputError
from featsharp.extraction.compression import PCA, fit_pca
from featsharp.extraction.sinks import check_format, file_names, remove_unfinished, save_shard
from featsharp.extraction.sources import open_pictures
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
from featsharp.terminal import progress_bar

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

# A shard has about so many bytes: what a kill can cost, and what is in memory at a time (twice, while one is written).
SHARD_BYTES = 1 << 27
SHARD_PICTURES = (16, 1024)
# Unfinished files of this age, in seconds, are of processes that were killed.
SHARED_AGE = 3600
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda features: features.mean((-2, -1)),
    "max": lambda features: features.amax((-2, -1)),
}


@dataclass(frozen=True)
class Options:
    """Settings of a store: what is kept of a picture, and how.

    Attributes:
        format: "safetensors", "npy", "zarr" or "webdataset".
        dtype: Of the stored numbers: torch.float16, bfloat16 or float32.
        size: (h, w) in pixels that pictures are scaled to; None: as for :meth:`SharpEncoder.encode_image`.
        output_size: (H, W) of the map in cells; None: by the factor.
        normalized: Whether features stay in PHI-S space.
        summary: Whether the backbone's summary is stored, too.
        pool: "mean" or "max" over the map, for one vector a picture; None: the map.
        pca: Components that features are reduced to; the basis is fitted once and saved as pca.safetensors.
        every: Takes every n-th picture or frame only.
        limit: Takes the first so many of these only; None: all.
        shard_size: Pictures that are made and written as one; None: so many as have about 128 MiB.
    """

    format: str = "safetensors"
    dtype: torch.dtype = torch.float16
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
        self.encoder, self.options, self.batch, self.workers = encoder, options, batch, workers
        self.output = Path(output)
        self._sink = check_format(options.format, options.dtype)
        self._check_options()
        self.pictures = open_pictures(source, options.every, options.limit)
        check_writable(self.output)
        keys = [self.pictures.key(index) for index in range(len(self.pictures))]
        self._doubles = find_doubles(keys)
        self._names = file_names(keys, options.format)
        self.shard_size = self._find_shard_size()
        names = hashlib.sha256("\n".join(keys).encode(errors="surrogateescape"))
        start_store(
            self.output,
            {
                "options": {
                    "encoder": f"{encoder.caption} on {encoder.backbone.name}",
                    "weights": content_key(encoder)[:16],
                    "autocast": encoder.backbone.autocast_dtype and dtype_name(encoder.backbone.autocast_dtype),
                    **asdict(options),
                    "dtype": dtype_name(options.dtype),
                    "shard_size": self.shard_size,
                },
                "pictures": len(keys),
                "names": names.hexdigest()[:16],
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
        with ThreadPoolExecutor(max(1, self.workers)) as readers, ThreadPoolExecutor(1) as writer:
            prepared = prefetch(readers, self._prepare, pictures, self.workers + 2 * self.batch)
            made = self._make(shards, prepared, on_picture)
            try:
                for _ in prefetch(writer, self._write, made, 1):  # while the next one is made
                    pass
            finally:
                readers.shutdown(wait=False, cancel_futures=True)

    def _check_options(self) -> None:
        options = self.options
        if options.pool is not None and options.pool not in POOLS:
            raise ConfigError(f"unknown pool {options.pool!r}; use {' or '.join(POOLS)}")
        channels = self.encoder.embed_dim * self.encoder.upsampler.num_maps
        if options.pca is not None and not 1 <= options.pca <= channels:
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
        size = channels * self.options.dtype.itemsize * (1 if self.options.pool else prod(grid))
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
            return str(error).removeprefix(f"{key}: ")

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
                kind = dtype_name(self.options.dtype)
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
        if self._pca is not None:
            features = self._pca(features)
        if options.pool is not None:
            features = POOLS[options.pool](features)
        summary = None if out.summary is None else out.summary.to("cpu", options.dtype)
        return features.to("cpu", options.dtype), summary

    def _sample(self, count: int) -> Iterator[Tensor]:
        """Yield the features of ``count`` pictures, spread over the list, without those that cannot be read."""
        total = len(self.pictures)
        for index in dict.fromkeys(number * total // count for number in range(count)):
            one = self._prepare(index)
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
        ConfigError: For options that do not go together, or a store that was made with others.
        DataError: For a source without pictures.
        FeatSharpError: When the store cannot be written.
    """
    work = Extraction(encoder, source, output, options, batch=batch, workers=workers)
    remove_unfinished(work.output, options.format, older_than=0 if ranks == 1 else SHARED_AGE)
    todo = [shard for shard in work.missing if shard % ranks == rank]
    count = sum(len(work.indices(shard)) for shard in todo)
    with progress_bar("extract", count, unit="picture", wanted=progress and rank == 0) as advance:
        work.run(todo, advance)
    return FeatureStore(output)


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
