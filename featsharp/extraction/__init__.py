"""Features of many pictures in files: extraction, stores with random access, memory-mapped maps."""

from featsharp.extraction.mapped import MappedFeatures
from featsharp.extraction.pipeline import Options, extract
from featsharp.extraction.store import FeatureDataset, FeatureStore
from featsharp.extraction.store import open_store as open

__all__ = ["FeatureDataset", "FeatureStore", "MappedFeatures", "Options", "extract", "open"]
