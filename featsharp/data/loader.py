"""Batches of training views, in an order that depends on the seed and the step only.

Sample n of a run is the same whatever the number of processes and workers: step s of a run with ``world`` ranks takes
the samples ``(s * world + rank) * batch ...``, so a resumed run goes on where it stopped and two processes see together
what one would see with twice the batch. Only which image of a *stream* a sample is depends on both numbers, too.
"""

import functools
import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from featsharp.data._tar import NO_IMAGE
from featsharp.data.filters import REJECTED, TOO_SMALL, UNIFORM
from featsharp.data.sources import Division, ImageMixture, count_kinds
from featsharp.data.streams import end_commands
from featsharp.data.views import ViewConfig, Views, sample_views
from featsharp.errors import ConfigError, FeatSharpError

MAX_EXAMPLES = 20  # names of each kind that a log of skipped images keeps
_SHOWN = 3  # of these in a summary
_EXPECTED = (NO_IMAGE, TOO_SMALL, UNIFORM, REJECTED)


class ViewBatch(NamedTuple):
    """One step's data, and what had to be passed over to get it."""

    views: Views
    skipped: list[tuple[str, str]]  # (name, reason)


# Where each reader is in each stream: what a run has to keep to go on with the very same images.
Places = dict[str, tuple[int, int]]


class ViewDataset:
    """Sample n of an image mixture as a canvas and its homographies.

    Args:
        mixture: Where images come from.
        size: (h, w) of the base view in pixels.
        config: Ranges of the views.
        seed: Of the random views; independent of the mixture's own.
    """

    def __init__(self, mixture: ImageMixture, size: tuple[int, int], config: ViewConfig, seed: int) -> None:
        self.mixture, self.size, self.config, self.seed = mixture, size, config, seed

    def __getitem__(self, n: int) -> tuple[Views, list[tuple[str, str]]]:
        return self.sample(n)

    def sample(self, n: int, division: Division = Division()) -> tuple[Views, list[tuple[str, str]]]:  # noqa: B008
        """Sample ``n`` of a run whose samples are divided so (which matters for streams only)."""
        loaded = self.mixture.load(n, division)
        rng = np.random.default_rng((self.seed, n))
        return sample_views(loaded.image, self.size, self.config, rng), loaded.skipped


class StepSampler:
    """The sample numbers of every step from ``first_step`` to ``last_step`` (exclusive) for one rank.

    With ``distinct`` samples, these come again in every epoch, in an order of its own that ``seed`` decides.
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


def load_views(
    dataset: ViewDataset, sampler: StepSampler, num_workers: int, places: Places | None = None
) -> Generator[ViewBatch]:
    """The batches of ``sampler``, decoded in ``num_workers`` processes (0: in this one).

    Args:
        dataset: Of samples.
        sampler: Which of them.
        num_workers: Processes.
        places: Where the readers of streams start. It is kept up to date: it always belongs to the batches that were
            given out, however far ahead the workers are. None starts them at the image of the sample's number.

    When the iterator ends, is closed or fails, so do the workers, the connections and the commands.

    Raises:
        DataError: When the data holds too few usable images.
        ConfigError: When samples are to be repeated that come from a stream, or when the filter fails.
    """
    if sampler.distinct:
        check_repeatable(dataset.mixture)
    places = {} if places is None else places
    dataset.mixture.go_on_from(places)  # not from what was read for another purpose: this pass has readers of its own
    division = Division(sampler.batch_size, sampler.world, max(1, num_workers))
    lifeline = Pipe(duplex=False)
    loader: DataLoader[_Loaded | FeatSharpError] = DataLoader(
        _Batches(dataset, division),
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_is,
        # Workers are forked where the system forks: their threads would fight for the cores of the training process.
        worker_init_fn=functools.partial(_prepare_worker, lifeline=lifeline),
        prefetch_factor=2 if num_workers else None,
        # Without a generator of its own the loader would draw from the global one, and a resumed run once more.
        generator=torch.Generator().manual_seed(0),
    )
    batches = iter(loader)  # held, as letting go of it waits for the workers
    try:
        for loaded in batches:
            if isinstance(loaded, FeatSharpError):
                raise loaded
            places.update(loaded.places)
            yield loaded.batch
    finally:
        for end in lifeline:
            end.close()
        dataset.mixture.close()


def check_repeatable(mixture: ImageMixture) -> None:
    """ConfigError where samples cannot be given again."""
    if mixture.has_streams:
        raise ConfigError(
            "feature_cache.samples repeats samples, which shards by URL or pipe cannot give again; copy them to a disk "
            "or set feature_cache.samples=0"
        )


def collate_views(samples: list[tuple[Views, list[tuple[str, str]]]]) -> ViewBatch:
    """Stack samples and join what they skipped."""
    views = Views(*(torch.stack(parts) for parts in zip(*(views for views, _ in samples), strict=True)))
    return ViewBatch(views, [entry for _, skipped in samples for entry in skipped])


class SkipLog:
    """How often something was passed over, by kind (see ``count_kinds``), and the names of the first few of each kind.

    An image that is met again is counted again, so that counts of several processes and of a run that was resumed add
    up, and what is kept is small however large the data is. Files that never were images are a kind of their own.

    Attributes:
        kinds: Number of each kind.
        examples: Different names of each kind, at most :data:`MAX_EXAMPLES`.
    """

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, skipped: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Count (name, reason) entries; returns those that are worth a line in the log: damage that became an example.

        What a filter leaves out is as the user wants it, and may be most of the data.
        """
        told = []
        for name, reason in skipped:
            ((kind, count),) = count_kinds([(name, reason)]).items()
            self.kinds[kind] += count
            if self._remember(kind, name) and kind not in _EXPECTED:
                full = len(self.examples[kind]) == MAX_EXAMPLES
                told.append((name, f"{reason} (more of this kind are only counted)" if full else reason))
        return told

    def add_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Add what another log had counted when its :meth:`state` was taken."""
        self.kinds.update(state["kinds"])
        for kind, names in state["examples"].items():
            for name in names:
                self._remember(kind, name)

    def state(self) -> dict[str, dict[str, Any]]:
        """Plain values for a checkpoint or another process, not depending on the order of what was added."""
        examples = {kind: sorted(names) for kind, names in sorted(self.examples.items())}
        return {"kinds": dict(sorted(self.kinds.items())), "examples": examples}

    @property
    def count(self) -> int:
        """How often an image or a shard was skipped, without what never was an image."""
        return self.kinds.total() - self.kinds[NO_IMAGE]

    def summary(self) -> str:
        """For example "images skipped 3 times: 2 cannot be decoded (a.png), 1 uniform colour (b.png)"; or empty."""
        said = [f"{count} {kind} ({self._some(kind)})" for kind, count in self.kinds.most_common() if kind != NO_IMAGE]
        parts = [f"images skipped {self.count} times: {', '.join(said)}"] if said else []
        if others := self.kinds[NO_IMAGE]:
            parts.append(f"{others} other files passed over ({NO_IMAGE})")
        return "; ".join(parts)

    def _some(self, kind: str) -> str:
        names = self.examples[kind]
        return ", ".join([*names[:_SHOWN], "..."] if len(names) > _SHOWN else names)

    def _remember(self, kind: str, name: str) -> bool:
        """Keep a name if it is new and there is room; whether it was kept."""
        names = self.examples.setdefault(kind, [])
        if name in names or len(names) >= MAX_EXAMPLES:
            return False
        names.append(name)
        return True


class _Loaded(NamedTuple):
    batch: ViewBatch
    places: Places  # of the reader, after this batch


class _Batches(Dataset[_Loaded | FeatSharpError]):
    """Whole batches, or the error instead of one: an exception in a worker would arrive as the text of a traceback."""

    def __init__(self, samples: ViewDataset, division: Division) -> None:
        self.samples, self.division = samples, division

    def __getitem__(self, numbers: list[int]) -> _Loaded | FeatSharpError:
        try:
            batch = collate_views([self.samples.sample(n, self.division) for n in numbers])
            return _Loaded(batch, self.samples.mixture.places(numbers[-1], self.division))
        except FeatSharpError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch


def _end_with_the_other_end(lifeline: Connection, other: Connection) -> None:
    """End this worker, even one that waits for data, when the training process lets go of it or is killed."""
    other.close()  # this worker's copy
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    end_commands()
    os._exit(0)


def _prepare_worker(worker: int, lifeline: tuple[Connection, Connection]) -> None:
    torch.set_num_threads(1)
    Finalize(None, end_commands, exitpriority=0)
    Thread(target=_end_with_the_other_end, args=lifeline, daemon=True).start()
    # Schedulers send it to all processes of a group, and workers are needed until the training process has saved. The
    # second one is the loader's own, for workers that do not end.
    received: list[int] = []

    def on_term(number: int, frame: object) -> None:
        if received:
            end_commands()
            os._exit(128 + number)
        received.append(number)

    signal.signal(signal.SIGTERM, on_term)
