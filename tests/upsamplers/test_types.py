"""The rule for types: parts compute in that of their weights, autocast reaches all of them, results have one."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.builder import create_encoder
from featsharp.upsamplers import GuidedUpsampler, list_upsamplers
from featsharp.upsamplers.chunked import works_in_chunks


def nearest(image, features, size):
    return F.interpolate(features, size, mode="nearest")


def enlarge(images):
    return F.interpolate(images, scale_factor=2, mode="bicubic")


OPTIONS = {"custom": {"function": nearest}, "super-resolution": {"enlarge": enlarge}}
NAMES = list_upsamplers()


def build(name):
    factor = 1 if name in ("identity", "s2-pooled") else 2
    return create_encoder("toy-vit", name, factor, upsampler_options=OPTIONS.get(name, {}))


@pytest.fixture
def image():
    return F.interpolate(torch.randn(1, 3, 6, 8), (80, 96), mode="bicubic")


def encode(encoder, image):
    """Results with and, where it can be, without the memory of one piece."""
    with torch.no_grad():
        yield encoder(image, return_summary=True)
        if works_in_chunks(encoder.upsampler):
            encoder.max_memory = "1GiB"
            yield encoder(image, return_summary=True)
            encoder.max_memory = None


def check(out, dtype, exact=None, least=0.99):
    assert [x.dtype for x in out] == 3 * [dtype]
    if exact is not None:
        assert F.cosine_similarity(out.high_res.float(), exact.high_res.float()).min() > least


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_images_of_another_type(name, dtype, image):
    encoder = build(name)
    with torch.no_grad():
        exact = encoder(image.to(dtype).float(), return_summary=True)
    for out in encode(encoder, image.to(dtype)):
        check(out, torch.float32, exact)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name, image):
    encoder = build(name)
    with torch.no_grad():
        exact = encoder(image, return_summary=True)
    with torch.autocast("cpu", torch.bfloat16):
        for out in encode(encoder, image):
            check(out, torch.float32, exact)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_that_was_cast_with_and_without_autocast(name, image):
    encoder = build(name)
    with torch.no_grad():
        exact = encoder(image, return_summary=True)
    encoder.to(torch.bfloat16)
    for out in encode(encoder, image):
        check(out, torch.bfloat16, exact, least=0.95)
    with torch.autocast("cpu", torch.bfloat16):
        for out in encode(encoder, image):
            check(out, torch.bfloat16, exact, least=0.95)


@pytest.mark.parametrize("name", NAMES)
def test_features_of_another_type_than_the_weights(name, image):
    """As inside a network under autocast."""
    upsampler = build(name).upsampler
    if not isinstance(upsampler, GuidedUpsampler):
        pytest.skip("needs a backbone")
    features = F.interpolate(torch.randn(1, 32, 3, 3), (5, 6), mode="bicubic")
    with torch.no_grad():
        exact = upsampler.upsample(features.bfloat16().float(), image)
        alone = upsampler.upsample(features.bfloat16(), image.double())
        with torch.autocast("cpu", torch.bfloat16):
            autocast = upsampler.upsample(features.bfloat16(), image)
    for out in (alone, autocast):
        assert out.dtype == torch.bfloat16
        assert F.cosine_similarity(out.float(), exact).min() > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_alone_in_bfloat16(name, image):
    encoder = build(name)
    with torch.no_grad():
        exact = encoder(image, return_summary=True)
    encoder.backbone.to(torch.bfloat16)
    for out in encode(encoder, image):
        check(out, torch.float32, exact)


def test_autocast_reaches_backbone_and_upsampler(image):
    encoder, seen = build("jafar"), {}
    for part in ("backbone", "upsampler"):
        for layer in getattr(encoder, part).modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda m, i, out, part=part: seen.setdefault(part, set()).add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        encoder(image)
    assert seen == {"backbone": {torch.bfloat16}, "upsampler": {torch.bfloat16}}
