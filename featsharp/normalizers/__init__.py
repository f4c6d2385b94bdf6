"""Feature normalizers: fit, normalise, denormalise; statistics and their cache."""

from featsharp.normalizers.base import NORMALIZERS, Normalizer, create_normalizer, list_normalizers
from featsharp.normalizers.cache import (
    CachedStatistics,
    StatisticsKey,
    cache_path,
    fit_with_cache,
    load_statistics,
    save_statistics,
)
from featsharp.normalizers.identity import NoNormalizer
from featsharp.normalizers.layer_norm import ChannelLayerNorm
from featsharp.normalizers.phi_s import PhiS, PhiSNoAlpha, PhiSOnlyAlpha
from featsharp.normalizers.statistics import FeatureStatistics

__all__ = [
    "NORMALIZERS",
    "CachedStatistics",
    "ChannelLayerNorm",
    "FeatureStatistics",
    "NoNormalizer",
    "Normalizer",
    "PhiS",
    "PhiSNoAlpha",
    "PhiSOnlyAlpha",
    "StatisticsKey",
    "cache_path",
    "create_normalizer",
    "fit_with_cache",
    "list_normalizers",
    "load_statistics",
    "save_statistics",
]
