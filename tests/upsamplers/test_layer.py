"""Guided upsamplers as layers of a network that is trained end to end."""

import pytest
import torch
from torch import nn

from featsharp import UpsampleLayer, load_from_file
from featsharp.builder import create_encoder, save_checkpoint
from featsharp.errors import ConfigError, InputError
from featsharp.upsamplers import UPSAMPLERS
from featsharp.upsamplers.base import GuidedUpsampler

GUIDED = [
    entry.name
    for entry in UPSAMPLERS.entries()
    if issubclass(entry.factory, GuidedUpsampler) and entry.factory.trainable
]


def gradients(layer: nn.Module) -> list[torch.Tensor]:
    """Of a loss to the features, the image and every weight."""
    torch.manual_seed(1)
    features, image = torch.randn(2, 16, 3, 5, requires_grad=True), torch.randn(2, 3, 24, 40, requires_grad=True)
    out = layer(features, image)
    (out * torch.randn_like(out)).sum().backward()
    needs_image = "image" in layer.upsampler.needs
    found = [features.grad, *([image.grad] if needs_image else []), *(p.grad for p in layer.parameters())]
    for p in layer.parameters():
        p.grad = None
    return found


@pytest.mark.parametrize("name", GUIDED)
def test_recomputing_changes_no_gradient(name):
    """Dropout and batch statistics included."""
    layer = UpsampleLayer(name, 16, 2, options={"flavour": "featup"} if name == "featup" else None).train()
    kept = gradients(layer)
    layer.recompute = True
    assert all(grad is not None for grad in kept)
    for one, other in zip(gradients(layer), kept, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["jafar", "lift"])
def test_recomputing_keeps_nothing_inside(name):
    features, image = torch.randn(1, 16, 8, 8, requires_grad=True), torch.randn(1, 3, 64, 64)

    def kept_bytes(recompute: bool) -> int:
        layer, total = UpsampleLayer(name, 16, 2, recompute=recompute).train(), 0

        def pack(x):
            nonlocal total
            total += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            layer(features, image)
        return total

    assert kept_bytes(True) == features.nbytes + image.nbytes
    assert kept_bytes(False) > 5 * kept_bytes(True)


def test_a_trained_upsampler_becomes_a_layer(tmp_path):
    save_checkpoint(create_encoder("toy-vit", "featup", 2), tmp_path / "last.pth")
    encoder = load_from_file(tmp_path / "last.pth")
    layer = UpsampleLayer(encoder.upsampler)
    features, image = torch.randn(1, 32, 4, 4), torch.randn(1, 3, 32, 32)
    assert torch.equal(layer(features, image, (7, 9)), encoder.upsampler.upsample(features, image, (7, 9)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("featsharp", 16, 2), "FeatSharp needs a backbone .it looks at image, tiles. and cannot be a layer"),
        (("featup",), "how many channels"),
        (("featup-2x", 16, 4), "has factor 2, but factor=4"),
        (("featupp", 16, 2), "did you mean 'featup'"),
        ((UPSAMPLERS["bilinear"].factory(16, 2), 16), "brings its own channels"),
    ],
)
def test_what_cannot_be_a_layer(arguments, said):
    with pytest.raises(ConfigError, match=said):
        UpsampleLayer(*arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_have_the_type_of_the_weights_and_integers_are_refused(dtype):
    features, image = torch.randn(1, 8, 4, 6), torch.rand(1, 3, 32, 48)
    layer = UpsampleLayer("resize-conv", 8, 2).to(dtype)
    assert layer(features, image).dtype == dtype
    assert UpsampleLayer("bilinear", 8, 2)(features.to(dtype), image).dtype == dtype
    for wrong in ((features.long(), image), (features, (255 * image).to(torch.uint8)), (features, image.numpy())):
        with pytest.raises(InputError, match="must be a floating-point tensor"):
            layer(*wrong)
