r"""Regression on stored maps: one cheap pass, or a few, learn what many passes found.

    featsharp extract photos -o targets --backbone vits14-focus --upsampler views --factor 2
    featsharp train +model=vits14-focus +upsampler=featsharp-2x objective=regression objective.store=targets \
        train_data_dir=photos

The store (:mod:`featsharp.extraction`) holds a map of every picture, such as the reconstruction from views; the sharp
map of the same picture, scaled as ``encode_image`` scales it, is compared with it cell by cell. Pictures keep their
aspect ratio, so those of a batch may have different sizes.

Shapes: C channels, (H, W) cells of the sharp map of a picture.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from featsharp.data.images import decode_image
from featsharp.data.loader import Batch
from featsharp.data.mixture import Division, ImageMixture
from featsharp.data.sources import ImageSource
from featsharp.data.views import ViewConfig
from featsharp.errors import ConfigError, DataError, unknown_name
from featsharp.extraction.store import FeatureStore
from featsharp.model import SharpEncoder
from featsharp.ops.resize import size_of
from featsharp.training.objectives.base import (
    DISTANCES,
    LinearSamples,
    Losses,
    Objective,
    ObjectiveConfig,
    autocast,
    check_finite,
    keep_autocast,
    register_objective,
    weighted_sum,
)


class Targets(NamedTuple):
    """Pictures of one size, and their maps."""

    images: Tensor  # [B, 3, height, width], pixels in [0, 1]
    low_res_size: tuple[int, int] | None  # in pixels; None: the backbone's native size
    maps: Tensor  # [B, C, H, W], in the backbone's space


class TargetGroups(tuple[Targets, ...]):
    """A batch of pictures, those of each size together."""

    def to(self, device: torch.device) -> "TargetGroups":
        """The same pictures and maps on another device."""
        return TargetGroups(Targets(x.to(device), size, maps.to(device)) for x, size, maps in self)


class TargetDataset:
    """Pictures of a folder or tar, and their maps in a store; pictures without one are replaced by others.

    Args:
        mixture: Of one source, the one that the store was made of.
        store: Of maps.
        encoder: The one to train; it scales the pictures.

    Raises:
        ConfigError: For a store of another backbone, or of something else than maps in the backbone's space.
        DataError: When the store has no map of any picture.
    """

    def __init__(self, mixture: ImageMixture, store: FeatureStore, encoder: SharpEncoder) -> None:
        self.mixture, self.store, self.encoder = mixture, store, encoder
        source = mixture.sources[0]
        if len(mixture.sources) > 1 or not isinstance(source, ImageSource):
            raise ConfigError("objective 'regression' takes one folder or tar as train_data_dir, the store's source")
        _check_options(store, encoder)
        self.source = source
        self.known = [index for index in range(len(source)) if source.name(index) in store]
        if not self.known:
            near = next(iter(store), "nothing")
            raise DataError(f"{store.path} has no map of any picture of {source.path}; its keys look like {near!r}")

    def load(self, numbers: Sequence[int], division: Division) -> Batch[TargetGroups]:
        """See :class:`featsharp.data.loader.SampleDataset`."""
        groups: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        skipped = []
        for n in numbers:
            index = self.mixture.locate(n)[1]
            if self.source.name(index) not in self.store:
                skipped.append((self.source.name(index), f"not in {self.store.path}"))
                index = self.known[n % len(self.known)]
            pixels, low_res_size, target = self._read(index)
            groups[pixels.shape, low_res_size].append((pixels, target))
        batch = (
            Targets(torch.cat([pixels for pixels, _ in group]), size, torch.stack([target for _, target in group]))
            for (_, size), group in groups.items()
        )
        return Batch(TargetGroups(batch), skipped)

    def _read(self, index: int) -> tuple[Tensor, tuple[int, int] | None, Tensor]:
        key = self.source.name(index)
        prepared = self.encoder.prepare_image(decode_image(self.source.read(index), name=key))
        if prepared.image_size != self.store.image_size(key):
            raise DataError(f"{key} has another size than when its map was made; make the store {self.store.path} anew")
        # A copy: the store's is a map of a file.
        return prepared.pixels, prepared.low_res_size, self.store[key].float().clone()


@dataclass
class RegressionConfig(ObjectiveConfig):
    """Settings of the objective.

    Attributes:
        store: Folder that ``featsharp extract`` wrote, of the pictures of ``train_data_dir``.
        distance: "mse", "l1" or "cosine" (1 - cosine), averaged over cells and, except for the last, over channels.
    """

    name: str = "regression"
    store: str = "???"
    distance: str = "mse"


@register_objective("regression", "predict stored maps of the same pictures, such as those from many views")
class RegressionObjective(Objective[TargetGroups]):
    """Distance to stored maps. Trains every upsampler; has no parameters."""

    config_type = RegressionConfig

    def __init__(self, embed_dim: int, factor: float, config: RegressionConfig) -> None:
        super().__init__()
        if config.distance not in DISTANCES:
            raise unknown_name("distance", config.distance, DISTANCES)
        self.config = config

    def check(self, encoder: SharpEncoder) -> None:
        super().check(encoder)
        if encoder.bias_buffer is not None:
            raise ConfigError("objective 'regression' has no views to learn a bias buffer from; set bias_buffer=false")

    def open_dataset(self, encoder: SharpEncoder, mixture: ImageMixture, views: ViewConfig, seed: int) -> TargetDataset:
        """Open the store; see :class:`TargetDataset`."""
        return TargetDataset(mixture, FeatureStore(self.config.store), encoder)

    def backward(
        self,
        encoder: SharpEncoder,
        samples: TargetGroups,
        low_res_size: tuple[int, int],
        autocast_dtype: torch.dtype | None = None,
        loss_scale: float = 1.0,
    ) -> Losses:
        """See :meth:`Objective.backward`; every size of pictures has a low-resolution pass of its own size."""
        count = sum(len(group.images) for group in samples)
        losses, weights = [], []
        for group in samples:
            image, encode = encoder.input_conditioner(group.images), keep_autocast(encoder, group.images)
            with autocast(image, autocast_dtype):
                prediction = encoder.upsampler(image, encode, group.low_res_size or low_res_size).high_res
            loss = DISTANCES[self.config.distance](prediction.float(), _normalized(encoder, group.maps, prediction))
            check_finite(loss)
            weight = len(group.images) / count
            (loss * weight * loss_scale).backward()
            losses.append(Losses(loss.detach(), loss.detach(), {}))
            weights.append(weight)
        return weighted_sum(losses, weights)

    def linear_samples(
        self, encoder: SharpEncoder, samples: TargetGroups, low_res_size: tuple[int, int]
    ) -> Iterator[LinearSamples]:
        """See :meth:`Objective.linear_samples`."""
        for group in samples:
            image = encoder.input_conditioner(group.images)
            maps = encoder.upsampler.linear_maps(image, encoder.encode, group.low_res_size or low_res_size).float()
            targets = _normalized(encoder, group.maps, maps)
            yield LinearSamples(maps, targets, torch.ones_like(targets[:, :1]))


def _check_options(store: FeatureStore, encoder: SharpEncoder) -> None:
    options, backbone = store.options, encoder.backbone.name
    made_by = options.get("backbone") or str(options.get("encoder", "")).rpartition(" on ")[2]  # older stores
    if made_by != backbone:
        raise ConfigError(f"{store.path} has features of backbone {made_by!r}, not of {backbone!r}; extract them anew")
    changed = [name for name in ("normalized", "pool", "pca", "size") if options.get(name)]
    if changed:
        raise ConfigError(f"objective 'regression' takes maps as they are, without {', '.join(changed)}: {store.path}")


def _normalized(encoder: SharpEncoder, maps: Tensor, prediction: Tensor) -> Tensor:
    if size_of(maps) != size_of(prediction):
        raise ConfigError(
            f"the store has maps of {size_of(maps)} cells where this upsampler makes {size_of(prediction)}; extract "
            f"them with --factor {encoder.factor:g}"
        )
    return encoder.normalizer(maps)
