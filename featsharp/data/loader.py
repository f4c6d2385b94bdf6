"""Batches of training samples, in an order that depends on the seed and the step only.

Sample n of a run is the same for any number of processes and workers: step s of a run with ``world`` ranks takes the
samples ``(s * world + rank) * batch ...``, so a resumed run continues where it stopped and two processes together see
the samples of one with twice the batch. Only for *streams* the image of a sample depends on both numbers, too.
"""

import functools
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from threading import Thread
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from featsharp.data._fetch import end_commands
from featsharp.data.mixture import Division, ImageMixture
from featsharp.data.views import ViewConfig, Views, sample_views
from featsharp.errors import ConfigError, FeatSharpError


class Samples(Protocol):
    """A batch of what an objective learns from, such as :class:`Views`."""

    def to(self, device: torch.device) -> Self:
        """The same samples on another device."""


S = TypeVar("S", bound=Samples)


class Batch(NamedTuple, Generic[S]):
    """Data of one step, and the images skipped for it."""

    samples: S
    skipped: list[tuple[str, str]]  # (name, reason)


class SampleDataset(Protocol[S]):
    """The samples of a run by number, from the images of a mixture; safe for worker processes."""

    mixture: ImageMixture

    def load(self, numbers: Sequence[int], division: Division) -> Batch[S]:
        """Load the samples of a batch in a run with this division (which matters for streams only)."""


# Position of each reader in each stream, which a resumed run needs to continue with the same images. torchdata's
# StatefulDataLoader would save it, but ties all data of a run to one number of workers (docs/experiments.md).
Positions = dict[str, tuple[int, int]]


class ViewDataset:
    """Sample n of an image mixture as a canvas and its homographies.

    Args:
        mixture: Of images.
        size: (h, w) of the base view in pixels.
        config: Ranges of the views.
        seed: Of the random views; independent of the mixture's seed.
    """

    def __init__(self, mixture: ImageMixture, size: tuple[int, int], config: ViewConfig, seed: int) -> None:
        self.mixture, self.size, self.config, self.seed = mixture, size, config, seed

    def __getitem__(self, n: int) -> tuple[Views, list[tuple[str, str]]]:
        return self.sample(n)

    def load(self, numbers: Sequence[int], division: Division) -> Batch[Views]:
        """See :class:`SampleDataset`."""
        return collate_views([self.sample(n, division) for n in numbers])

    def sample(self, n: int, division: Division = Division()) -> tuple[Views, list[tuple[str, str]]]:  # noqa: B008
        """Load sample ``n``; see :meth:`load`."""
        loaded = self.mixture.load(n, division)
        rng = np.random.default_rng((self.seed, n))
        return sample_views(loaded.image, self.size, self.config, rng), loaded.skipped


class StepSampler:
    """The sample numbers of every step from ``first_step`` to ``last_step`` (exclusive) for one rank.

    With ``distinct`` samples, these are repeated in every epoch, in an order drawn from ``seed``.
    """

    def __init__(
        self,
        first_step: int,
        last_step: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        *,
        distinct: int = 0,
        seed: int = 0,
    ) -> None:
        self.steps = range(first_step, last_step)
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.distinct, self.seed = distinct, seed
        self._order: tuple[int, np.ndarray] | None = None  # epoch and its permutation

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = (step * self.world + self.rank) * self.batch_size
            numbers = range(first, first + self.batch_size)
            yield [self._sample(n) for n in numbers] if self.distinct else list(numbers)

    def _sample(self, n: int) -> int:
        epoch, position = divmod(n, self.distinct)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.distinct)
        return int(self._order[1][position])


def load_batches(
    dataset: SampleDataset[S], sampler: StepSampler, num_workers: int, positions: Positions | None = None
) -> Generator[Batch[S]]:
    """Load the batches of ``sampler``, decoded in ``num_workers`` processes (0: in this one).

    When the iterator ends, is closed or fails, workers, connections and commands end too.

    Args:
        dataset: Of samples.
        sampler: Sample numbers of each batch.
        num_workers: Number of processes.
        positions: Start positions of the readers of streams. Updated with each batch that is returned, however far
            ahead the workers are. None starts them at the image of the sample's number.

    Raises:
        DataError: When the data holds too few usable images.
        ConfigError: When samples of a stream are to be repeated, or when the filter fails.
    """
    if sampler.distinct:
        check_repeatable(dataset.mixture)
    positions = {} if positions is None else positions
    dataset.mixture.resume_from(positions)  # not from earlier reads, as this pass has other readers
    division = Division(sampler.batch_size, sampler.world, max(1, num_workers))
    lifeline = Pipe(duplex=False)
    loader: DataLoader[_Loaded[S] | FeatSharpError] = DataLoader(
        _Batches(dataset, division),
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_is,
        # Workers are forked where the system forks: their threads would fight for the cores of the training process.
        worker_init_fn=functools.partial(_prepare_worker, lifeline=lifeline),
        prefetch_factor=2 if num_workers else None,
        # Without its generator the loader would draw from the global one, and a resumed run once more.
        generator=torch.Generator().manual_seed(0),
    )
    batches = iter(loader)  # a reference, as deleting the iterator waits for the workers
    try:
        for loaded in batches:
            if isinstance(loaded, FeatSharpError):
                raise loaded
            positions.update(loaded.positions)
            yield loaded.batch
    finally:
        for end in lifeline:
            end.close()
        dataset.mixture.close()


def check_repeatable(mixture: ImageMixture) -> None:
    """Raise ConfigError where samples cannot be repeated."""
    if mixture.has_streams:
        raise ConfigError(
            "feature_cache.samples repeats samples, which shards by URL or pipe cannot give again; copy them to a disk "
            "or set feature_cache.samples=0"
        )


def collate_views(samples: list[tuple[Views, list[tuple[str, str]]]]) -> Batch[Views]:
    """Stack samples and concatenate their lists of skipped images."""
    views = Views(*(torch.stack(parts) for parts in zip(*(views for views, _ in samples), strict=True)))
    return Batch(views, [entry for _, skipped in samples for entry in skipped])


class _Loaded(NamedTuple, Generic[S]):
    batch: Batch[S]
    positions: Positions  # of the reader, after this batch


class _Batches(Dataset[_Loaded[S] | FeatSharpError]):
    """Whole batches, or the error instead of one: the loader would turn an exception in a worker into text."""

    def __init__(self, dataset: SampleDataset[S], division: Division) -> None:
        self.dataset, self.division = dataset, division

    def __getitem__(self, numbers: list[int]) -> _Loaded[S] | FeatSharpError:
        try:
            batch = self.dataset.load(numbers, self.division)
            return _Loaded(batch, self.dataset.mixture.positions(numbers[-1], self.division))
        except FeatSharpError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch


def _end_with_the_other_end(lifeline: Connection, other: Connection) -> None:
    """End this worker, even one that waits for data, when the training process closes its end or is killed."""
    other.close()  # this worker's copy
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    end_commands()
    os._exit(0)


def _prepare_worker(worker: int, lifeline: tuple[Connection, Connection]) -> None:
    torch.set_num_threads(1)
    Finalize(None, end_commands, exitpriority=0)
    Thread(target=_end_with_the_other_end, args=lifeline, daemon=True).start()
    # Schedulers send SIGTERM to all processes of a group, and workers are needed until the training process has saved.
    # The second one is the loader's, for workers that do not end.
    received: list[int] = []

    def on_term(number: int, frame: object) -> None:
        if received:
            end_commands()
            os._exit(128 + number)
        received.append(number)

    signal.signal(signal.SIGTERM, on_term)
