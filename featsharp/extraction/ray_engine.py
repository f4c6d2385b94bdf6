"""Extraction on a Ray cluster: actors with an encoder each make the shards of one store.

Shards are the items of a Ray dataset, as what a shard holds depends on its number alone: one that a lost actor had
begun is made again by another, with the same result. ``ray.data.read_images`` would lose the order, the reasons why
pictures are skipped, and the point at which an interrupted run goes on. The store has to lie on a file system that all
machines see.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

from featsharp.errors import ConfigError, FeatSharpError, MissingDependencyError
from featsharp.extraction.pipeline import Extraction, Options
from featsharp.extraction.sinks import remove_unfinished
from featsharp.extraction.store import FeatureStore
from featsharp.model import SharpEncoder


def extract_with_ray(
    build: Callable[[str], SharpEncoder],
    source: str,
    output: str | os.PathLike[str],
    options: Options,
    *,
    actors: int = 1,
    gpus: float = 0,
    batch: int = 8,
    workers: int = 2,
) -> FeatureStore:
    """Store the features of many pictures, made by the actors of a Ray cluster.

    Args:
        build: Makes the encoder on the device of this name; sent to the actors.
        source: As for :func:`featsharp.extraction.extract`, a place that all machines see.
        output: Folder of the store, on a file system that all machines share.
        options: What to store.
        actors: Number of encoders.
        gpus: GPUs of each, fractions too; 0: each takes CPUs.
        batch: Pictures per pass of the backbone.
        workers: Threads of an actor that read and scale pictures.

    Returns:
        The whole store.

    Raises:
        ConfigError: As for :func:`featsharp.extraction.extract`, and for more than the cluster has.
        FeatSharpError: When an actor fails, for example since it cannot write.
        MissingDependencyError: Without Ray.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError('the engine ray needs: pip install "featsharp[ray]"') from error
    work = Extraction(build("cpu"), source, output, options, batch=batch, workers=workers)
    missing = work.missing
    remove_unfinished(work.output, options.format)
    if not missing:
        return FeatureStore(output)
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    there = ray.cluster_resources()
    wanted = {"GPU": actors * gpus, "CPU": 0 if gpus else actors}
    for kind, amount in wanted.items():
        if amount > there.get(kind, 0):
            raise ConfigError(f"{actors} actors need {amount:g} {kind}s, the cluster has {there.get(kind, 0):g}")
    shards = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
    made = shards.map_batches(
        _Maker,
        fn_constructor_kwargs={
            "build": build,
            "device": "cuda" if gpus else "cpu",
            "arguments": (source, output, options),
            "batch": batch,
            "workers": workers,
        },
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus or None,
        num_cpus=None if gpus else 1,
    )
    try:
        made.materialize()
    except ray.exceptions.RayError as error:
        raise FeatSharpError(f"the cluster could not finish {output}: {error}") from error
    remove_unfinished(work.output, options.format)  # of actors that were lost
    return FeatureStore(output)


class _Maker:
    """An actor: an encoder that makes shards by number."""

    def __init__(
        self,
        build: Callable[[str], SharpEncoder],
        device: str,
        arguments: tuple[Any, ...],
        batch: int,
        workers: int,
    ) -> None:
        self.work = Extraction(build(device), *arguments, batch=batch, workers=workers)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        wanted = {int(shard) for shard in rows["shard"]}
        self.work.run(sorted(wanted & set(self.work.missing)))
        return rows
