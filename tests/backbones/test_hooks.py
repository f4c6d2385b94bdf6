"""Values taken from inside of a model: by several threads at once, and by what torch.compile makes of it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featsharp.backbones import Backbone, create_backbone
from featsharp.backbones.adapters import captured

TIMM = "timm:vit_tiny_patch16_224?pretrained=false&img_size=64"
OPTIONS = ["timm facet=key", "timm facet=query&layer=1,3", "hf layer=1,3", "hf facet=key&layer=0,2"]
THREADS = 4


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=16
    )
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(path)
    return path


@pytest.fixture(params=OPTIONS)
def name(request: pytest.FixtureRequest, hf_model: Path) -> str:
    library, _, query = request.param.partition(" ")
    if library == "timm":
        pytest.importorskip("timm")
    return f"{TIMM}&{query}" if library == "timm" else f"hf:{hf_model}?mean=0.5&std=0.5&{query}"


@torch.no_grad()  # of the thread that calls
def features(backbone: Backbone, images: Tensor) -> Tensor:
    return backbone(images).features


def test_threads_do_not_mix(name):
    backbone = create_backbone(name)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1 + i % 2, 3, 64, 48 + 16 * (i % 3), generator=generator) for i in range(24)]
    wanted = [features(backbone, x) for x in images]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(features, [backbone] * len(images), images))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("inputs", [False, True])
def test_only_calls_of_the_own_thread_are_kept(inputs):
    """Both threads are within the context when the first layer runs, whatever the scheduler does."""
    both_inside, both_ran = threading.Barrier(2, timeout=20), threading.Barrier(2, timeout=20)
    double = nn.Linear(1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)

    @torch.no_grad()
    def call(value: float) -> list[float]:
        with captured([double], inputs=inputs) as found:
            both_inside.wait()
            double(torch.full((1, 1), value))
            both_ran.wait()
        return [tensor.item() for tensor in found]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, [1.0, 3.0])) == ([[1.0], [3.0]] if inputs else [[2.0], [6.0]])
    assert not double._forward_hooks
    assert not double._forward_pre_hooks


@pytest.mark.slow
def test_compiled_features_are_the_same(name):
    plain, compiled = create_backbone(name), create_backbone(name)
    compiled.compile(backend="eager")
    for size in ((64, 64), (64, 96), (64, 64)):
        images = torch.rand(1, 3, *size)
        torch.testing.assert_close(features(compiled, images), features(plain, images))
