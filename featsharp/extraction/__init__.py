"""Features of pictures written to files."""

from featsharp.extraction.mapped import MappedFeatures

__all__ = ["MappedFeatures"]
