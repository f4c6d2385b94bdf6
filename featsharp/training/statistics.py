"""The first samples of a run: statistics that the normalizer is fitted to."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone
from featsharp.data.filters import ImageFilter
from featsharp.data.loader import StepSampler, ViewBatch, ViewDataset, load_views
from featsharp.data.sources import ImageMixture, ImageSource
from featsharp.data.views import ViewConfig, base_view
from featsharp.errors import DataError
from featsharp.normalizers import FeatureStatistics, StatisticsKey, fit_with_cache
from featsharp.normalizers.base import Normalizer
from featsharp.training.config import RunConfig
from featsharp.training.distributed import World, copy_from_main, merge_statistics


def open_mixture(data_dir: object, config: RunConfig) -> ImageMixture:
    """The images of ``train_data_dir`` or ``dist_train_data_dir``."""
    keep = ImageFilter(config.data.min_size, config.data.filter)
    return ImageMixture.from_data_dir(data_dir, seed=config.seed, keep=keep, shuffle_buffer=config.data.shuffle_buffer)


def first_samples(
    dataset: ViewDataset, samples: int, batch_size: int, config: RunConfig, world: World
) -> tuple[int, Iterator[ViewBatch]]:
    """The number of batches that hold this process's share of the first samples (or a few more), and the batches."""
    steps = -(-samples // (batch_size * world.size))
    sampler = StepSampler(0, steps, batch_size, world.rank, world.size)
    return steps, load_views(dataset, sampler, config.num_workers)


def fit_normalizer(
    normalizer: Normalizer, backbone: Backbone, whiten: Callable[[Tensor], Tensor], config: RunConfig, world: World
) -> None:
    """Fit to images of ``dist_train_data_dir``, each process on its share, or take the fit from the cache."""
    if not normalizer.needs_fit:
        return
    mixture = open_mixture(config.dist_train_data_dir, config)

    def collect() -> FeatureStatistics:
        return collect_statistics(backbone, whiten, mixture, config, world)

    if not config.normalizer.cache or world.size > 1 or mixture.has_streams:
        # With several processes all must take part, whatever each one's disk holds; streams have no fingerprint.
        normalizer.fit(collect())
        copy_from_main(normalizer.buffers(), world)
        return
    samples = config.normalizer.num_samples
    key = StatisticsKey(
        backbone=backbone.name,
        weights_sha256=backbone.weights_hash(),
        input_size=backbone.input_size,
        data=compute_fingerprint(mixture, samples),
        samples=samples,
        seed=config.seed,
    )
    fit_with_cache(normalizer, key, collect)


@torch.no_grad()
def collect_statistics(
    backbone: Backbone, whiten: Callable[[Tensor], Tensor], mixture: ImageMixture, config: RunConfig, world: World
) -> FeatureStatistics:
    """Statistics of the features of ``normalizer.num_samples`` random crops, merged over all processes."""
    dataset = ViewDataset(mixture, backbone.input_size, ViewConfig(num_views=1), config.seed)
    statistics = FeatureStatistics(backbone.embed_dim)
    settings = config.normalizer
    for views, _ in first_samples(dataset, settings.num_samples, settings.batch_size, config, world)[1]:
        statistics.update(backbone(whiten(base_view(views)[0].to(world.device))).features)
    return merge_statistics(statistics, world)


def compute_fingerprint(mixture: ImageMixture, samples: int) -> str:
    """A tag for the first samples of a mixture without streams: the content of their files, not only their names."""
    digests: dict[tuple[int, int], bytes] = {}
    whole = hashlib.sha256(b"" if mixture.keep == ImageFilter() else repr(mixture.keep).encode())
    for n in range(samples):
        place = mixture.locate(n)
        if place not in digests:
            source = mixture.sources[place[0]]
            assert isinstance(source, ImageSource)
            try:
                content = source.read(place[1])
            except DataError:
                content = b""  # passed over in the statistics, too
            digests[place] = hashlib.sha256(content).digest()
        whole.update(digests[place])
    return whole.hexdigest()[:16]
