"""Every path that README, docs and examples of version 0.1 import can still be imported, wherever the code is now."""

import importlib
import sys

import pytest

from featsharp._moved import MOVED

PATHS = [
    "featsharp.backbones.base:Backbone",
    "featsharp.backbones:Backbone",
    "featsharp.backbones:from_callable",
    "featsharp.backbones:register_backbone",
    "featsharp.backbones:register_prefix",
    "featsharp.builder:load_from_file",
    "featsharp.cli.main:main",
    "featsharp.configs.compose:compose",
    "featsharp.data.images:decode_image",
    "featsharp.data.images:image_to_tensor",
    "featsharp.data.mapped:MappedFeatures",
    "featsharp.evaluation.fidelity:FidelityMeter",
    "featsharp.evaluation.position_bias:",
    "featsharp.evaluation.zoom:ZoomMeter",
    "featsharp.implicit:load_fit",
    "featsharp.model:InputConditioner",
    "featsharp.model:SharpEncoder",
    "featsharp.ops.device:autocast_dtype",
    "featsharp.ops.memory:keep_freed_memory",
    "featsharp.ops.resize:resize",
    "featsharp.ops.resize:size_of",
    "featsharp.ops.tiling:join_tiles",
    "featsharp.ops.tiling:split_tiles",
    "featsharp.testing:check_upsampler",
    "featsharp.train:main",
    "featsharp.train:train",
    "featsharp.training.writers:VizWriter",
    "featsharp.visualization.figures.pca:draw_pca",
    "featsharp.visualization.figures.pca:pca_row",
    "featsharp.visualization.panels:save_picture",
    "featsharp.visualization.style:save",
    "featsharp:SharpEncoder",
    "featsharp:UpsampleFeatures",
    "featsharp:UpsampleLayer",
    "featsharp:__version__",
    "featsharp:create_backbone",
    "featsharp:create_encoder",
    "featsharp:create_upsampler",
    "featsharp:from_callable",
    "featsharp:list_backbones",
    "featsharp:list_upsamplers",
    "featsharp:load_from_file",
    "featsharp:load_published",
    "featsharp:register_backbone",
    "featsharp:register_upsampler",
    "featsharp:save_checkpoint",
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", PATHS)
def test_the_path_is_importable(path):
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    if name:
        assert getattr(found, name) is not None


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_warns_and_gives_the_new_module(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=MOVED[old]):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__spec__.name == MOVED[old]
