"""Feature statistics on disk, keyed by everything that they depend on.

One safetensors file per key: ``statistics.count``, ``statistics.mean``, ``statistics.scatter`` (float64; covariance =
scatter / (count - 1)), and per fitted normalizer its buffers as ``transform.<name>.<buffer>``. The buffers are kept
because a rotation cannot be reproduced from the covariance on another machine. The key is in the file's metadata.

The cache only saves time: a file that cannot be read or written is logged and otherwise ignored.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from featsharp.checkpoint import read_tensors
from featsharp.errors import InputError
from featsharp.files import cache_folder, replacing
from featsharp.normalizers.base import Normalizer
from featsharp.normalizers.statistics import FeatureStatistics

_LOGGER = logging.getLogger(__name__)
_FORMAT = 1


@dataclass(frozen=True)
class StatisticsKey:
    """All that the statistics of a backbone's features depend on.

    Args:
        backbone: Name of the backbone.
        weights_sha256: ``Backbone.weights_hash()``.
        input_size: (h, w) in pixels of the images that were encoded.
        data: A tag that identifies the set of images.
        samples: Number of images requested.
        seed: Seed of the draw of images.
    """

    backbone: str
    weights_sha256: str
    input_size: tuple[int, int]
    data: str
    samples: int
    seed: int

    def to_json(self) -> str:
        """Write the key as text, the same for equal keys."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)

    def digest(self) -> str:
        """Compute SHA-256 of :meth:`to_json`, the name of the cache file."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class CachedStatistics(NamedTuple):
    """Contents of a cache file."""

    statistics: FeatureStatistics
    transforms: dict[str, dict[str, Tensor]]  # normalizer name -> its buffers


def fit_with_cache(
    normalizer: Normalizer,
    key: StatisticsKey,
    collect: Callable[[], FeatureStatistics],
    cache_dir: str | Path | None = None,
) -> None:
    """Fit ``normalizer`` from the cache, or from ``collect()``, whose result is then cached.

    Args:
        normalizer: Fitted in place.
        key: Of the statistics that ``collect`` returns.
        collect: Runs the backbone over the data; called only when the cache holds nothing usable for ``key``.
        cache_dir: See :func:`cache_path`.
    """
    cached = load_statistics(key, cache_dir)
    if cached is not None and cached.statistics.embed_dim != normalizer.embed_dim:
        _LOGGER.warning("ignoring cached statistics of another width than the normalizer's; computing them again")
        cached = None
    if cached is not None and _restore(normalizer, cached.transforms.get(normalizer.name)):
        return
    statistics = cached.statistics if cached is not None else collect()
    normalizer.fit(statistics)
    transforms = dict(cached.transforms) if cached is not None else {}
    transforms[normalizer.name] = dict(normalizer.named_buffers())
    save_statistics(key, CachedStatistics(statistics, transforms), cache_dir)


def load_statistics(key: StatisticsKey, cache_dir: str | Path | None = None) -> CachedStatistics | None:
    """Load the entry of ``key``; None when it is absent, or, with a warning, unusable."""
    from safetensors import SafetensorError

    path = cache_path(key, cache_dir)
    if not path.exists():
        return None
    try:
        tensors, texts = read_tensors(path)
        if texts.get("key") != key.to_json():
            raise InputError("it belongs to another key")
        return _unpack(tensors)
    except (OSError, ValueError, SafetensorError) as error:
        _LOGGER.warning("ignoring the statistics cache %s (%s); computing the statistics again", path, error)
        return None


def save_statistics(key: StatisticsKey, cached: CachedStatistics, cache_dir: str | Path | None = None) -> Path | None:
    """Write a cache file so that readers see the old one or the whole new one.

    Returns:
        The file, or None when it could not be written, which is logged as a warning.
    """
    from safetensors.torch import save

    path = cache_path(key, cache_dir)
    content = save(_pack(cached), metadata={"key": key.to_json()})
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        _LOGGER.warning("cannot write the statistics cache %s (%s); continuing without it", path, error)
        return None
    return path


def cache_path(key: StatisticsKey, cache_dir: str | Path | None = None) -> Path:
    """Path of ``key`` in ``cache_dir``, by default $FEATSHARP_CACHE, else featsharp in the user's cache folder."""
    folder = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
    return folder / "statistics" / f"{key.digest()}.safetensors"


def _restore(normalizer: Normalizer, buffers: dict[str, Tensor] | None) -> bool:
    """Load cached buffers into the normalizer; False when they are absent, of other shapes or not fitted."""
    present = dict(normalizer.named_buffers())
    if buffers is None or {k: v.shape for k, v in buffers.items()} != {k: v.shape for k, v in present.items()}:
        return False
    if not (buffers["fitted"] and all(value.isfinite().all() for value in buffers.values())):
        return False
    normalizer.load_state_dict(buffers, strict=False)  # not strict: trained weights are no part of the fit
    return True


def _pack(cached: CachedStatistics) -> dict[str, Tensor]:
    tensors = {f"statistics.{name}": value for name, value in cached.statistics.state().items()}
    for normalizer, buffers in cached.transforms.items():
        tensors |= {f"transform.{normalizer}.{name}": value.cpu() for name, value in buffers.items()}
    return {name: value.detach().contiguous().clone() for name, value in tensors.items()}


def _unpack(tensors: dict[str, Tensor]) -> CachedStatistics:
    state: dict[str, Tensor] = {}
    transforms: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        if group == "statistics":
            state[rest] = value
        elif group == "transform":
            normalizer, _, buffer = rest.rpartition(".")
            transforms.setdefault(normalizer, {})[buffer] = value
    return CachedStatistics(FeatureStatistics.from_state(state), transforms)
