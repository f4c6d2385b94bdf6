"""Features are computed once per image, kept in half precision, and never taken for another's."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.training.feature_cache import CachedBackbone
from featsharp.training.uncompiled import UncompiledBackbone


class Counting(Backbone):
    """Mean colours of patches of 8 pixels, times ``scale``; counts the images that it sees."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__("counting", patch_size=8, embed_dim=3, input_size=(32, 32), summary_dim=3)
        self.seen = 0
        self.weight = nn.Parameter(torch.tensor(scale))
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        self.seen += len(images)
        features = nn.functional.avg_pool2d(images, 8) * self.weight
        return BackboneOutput(features, features.mean((2, 3)))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_an_image_is_encoded_once_wherever_it_stands_in_a_batch(tmp_path):
    images = torch.randn(4, 3, 32, 24)
    backbone = Counting()
    expected = backbone(images)
    backbone.seen = 0
    cached = CachedBackbone(backbone, tmp_path)
    first = cached(images[:3])
    again = cached(images[:3].flip(0))
    assert backbone.seen == 3
    assert torch.equal(again.features.flip(0), first.features)
    second = cached(images.flip(0))
    assert len(files(tmp_path)) == 4
    assert torch.equal(second.features[1:].flip(0), first.features)
    assert torch.equal(second.features.flip(0), expected.features.half().float())
    assert torch.equal(second.summary.flip(0), expected.summary.half().float())


class Neighbourly(Counting):
    """Its last bits depend on the whole batch, as those of matrix products do."""

    def extract(self, images: Tensor) -> BackboneOutput:
        features = nn.functional.avg_pool2d(images, 8) + images.mean()
        return BackboneOutput(features, None)


def test_a_batch_that_was_only_half_written_gets_the_same_features(tmp_path):
    """As when a run is killed between two files."""
    images = torch.randn(3, 3, 32, 32)
    backbone = CachedBackbone(Neighbourly(), tmp_path)
    expected = backbone(images).features
    for path in files(tmp_path)[:2]:
        path.unlink()
    assert torch.equal(backbone(images).features, expected)
    assert torch.equal(backbone(images).features, expected)


def test_other_weights_sizes_and_types_are_not_mixed_up(tmp_path):
    images = torch.randn(1, 3, 32, 32)
    for scale in (1.0, 2.0):
        backbone = Counting(scale)
        cached = CachedBackbone(backbone, tmp_path)
        cached(images)
        cached(images.reshape(1, 3, 64, 16))  # the same bytes
        assert backbone.seen == 2
    backbone = Counting()
    backbone.autocast_dtype = torch.bfloat16
    CachedBackbone(backbone, tmp_path)(images)
    assert backbone.seen == 1
    backbone = Counting()
    cached = CachedBackbone(backbone, tmp_path)
    cached(images)
    assert backbone.seen == 0
    with torch.autocast("cpu", torch.bfloat16):
        cached(images)
    assert backbone.seen == 1


def test_features_beyond_half_precision_are_kept_whole(tmp_path):
    backbone = Counting(1e6)
    images = torch.rand(1, 3, 32, 32) + 1
    expected = backbone(images).features
    cached = CachedBackbone(backbone, tmp_path)
    cached(images)
    assert torch.equal(cached(images).features, expected)
    assert backbone.seen == 2


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0{}", b"junk"])
def test_a_damaged_file_is_written_again(tmp_path, damage):
    backbone = Counting()
    cached = CachedBackbone(backbone, tmp_path)
    images = torch.randn(1, 3, 32, 32)
    expected = cached(images).features
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage)
    assert torch.equal(cached(images).features, expected)
    assert backbone.seen == 2
    assert path.read_bytes() == whole


def test_half_precision_autocast_gives_the_type_of_the_images(tmp_path):
    backbone = create_backbone("toy-vit", autocast_dtype=torch.bfloat16)
    images = torch.randn(2, 3, 64, 64)
    expected = backbone(images)
    cached = CachedBackbone(backbone, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        found = [cached(images) for _ in range(2)]
    for out in found:
        assert out.features.dtype == torch.float32
        torch.testing.assert_close(out.features, expected.features, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[0].features, found[1].features)


@pytest.mark.parametrize(
    "wrap",
    [lambda backbone, folder: CachedBackbone(backbone, folder), lambda backbone, _: UncompiledBackbone(backbone)],
)
def test_a_wrapped_backbone_is_known_by_what_is_inside(tmp_path, wrap):
    """To checkpoints, to upsamplers that ask for overlapping patches, and to whoever fits an image to it."""
    backbone = create_backbone("toy-vit", autocast_dtype=torch.bfloat16)
    wrapped = wrap(backbone, tmp_path)
    assert wrapped.describe() == backbone.describe()
    assert wrapped.to(torch.bfloat16).describe() == backbone.describe()
    images = torch.randn(1, 3, 64, 64)
    expected = backbone.float().with_patch_stride(4)(images).features
    torch.testing.assert_close(wrapped.with_patch_stride(4)(images).features, expected, rtol=1e-3, atol=1e-3)
    assert wrapped.fit_size(70, 90) == backbone.fit_size(70, 90)
    assert not wrapped.train().training


def test_a_backbone_outside_the_graphs_can_be_copied_and_pickled():
    wrapped = UncompiledBackbone(Counting(2.0))
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = 2 * nn.functional.avg_pool2d(images, 8)
    for copied in (copy.deepcopy(wrapped).double(), pickle.loads(pickle.dumps(wrapped)).double()):
        torch.testing.assert_close(copied(images).features, expected)
    assert wrapped.backbone.seen == 0
