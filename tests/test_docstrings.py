"""Everything that users can reach from the package has a docstring, their methods included."""

import inspect
from importlib import import_module

import pytest

import featsharp

# Beside the names of the package: classes that users derive from or hold.
CLASSES = [
    "featsharp.backbones:Backbone",
    "featsharp.extraction:MappedFeatures",
    "featsharp.model:InputConditioner",
    "featsharp.normalizers:Normalizer",
    "featsharp.training.loggers:VizWriter",
    "featsharp.upsamplers:GuidedUpsampler",
    "featsharp.upsamplers:Upsampler",
]
PUBLIC = [f"featsharp:{name}" for name in featsharp.__all__ if name != "__version__"] + CLASSES


@pytest.mark.parametrize("place", PUBLIC)
def test_public_names_are_documented(place):
    module, name = place.split(":")
    thing = getattr(import_module(module), name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        methods = {key: value for key, value in vars(thing).items() if callable(value) or isinstance(value, property)}
        silent = [key for key in methods if not key.startswith("_") and not inspect.getdoc(getattr(thing, key))]
        assert silent == []
