"""The rule for types: parts compute in that of their weights, autocast reaches all of them, results have one."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featsharp.builder import create_encoder
from featsharp.errors import InputError
from featsharp.upsamplers import GuidedUpsampler, list_upsamplers
from featsharp.upsamplers.base import weight_dtype
from featsharp.upsamplers.chunked import works_in_chunks


def nearest(image, features, size):
    return F.interpolate(features, size, mode="nearest")


def enlarge(images):
    return F.interpolate(images, scale_factor=2, mode="bicubic")


OPTIONS = {
    "custom": {"function": nearest},
    "super-resolution": {"enlarge": enlarge},
    "anyup": {"guidance_scale": 2.0},  # its encoder takes long at full size
}
# One of each kind: interpolation, tiles, views, guided, trained, local attention, local filter, a function.
QUICK = ("bilinear", "custom", "featsharp", "featup", "jafar", "lift", "tile", "views")
FULL = ("uplift",)  # takes far longer than the others where bfloat16 is slow
NAMES = [
    pytest.param(n, marks=[] if n in QUICK else pytest.mark.full if n in FULL else pytest.mark.slow)
    for n in list_upsamplers()
]


def build(name):
    factor = 1 if name in ("identity", "s2-pooled") else 2
    return create_encoder("toy-vit", name, factor, upsampler_options=OPTIONS.get(name, {}))


@pytest.fixture
def image():
    return F.interpolate(torch.randn(1, 3, 6, 8), (48, 64), mode="bicubic")


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
    least = 0.8 if name == "loftup" else 0.95  # its Fourier features of high frequency amplify rounding
    for out in encode(encoder, image):
        check(out, torch.bfloat16, exact, least=least)
    with torch.autocast("cpu", torch.bfloat16):
        for out in encode(encoder, image):
            check(out, torch.bfloat16, exact, least=least)


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
        assert out.dtype == (weight_dtype(upsampler) or torch.bfloat16)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_default_type_of_torch_decides_nothing(name, dtype, image):
    torch.manual_seed(0)
    encoder = build(name)
    expected = [*encode(encoder, image)]
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        built = build(name)
        out = [*encode(built, image)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in built.state_dict().values() if x.is_floating_point()} == {torch.float32}
    for one, other in zip(out, expected, strict=True):
        check(one, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_default_device_of_torch_does_not_decide_where_is_computed(name, image):
    encoder = build(name)
    expected = [*encode(encoder, image)]
    with torch.device("meta"):  # tensors created without a device then have no values
        out = [*encode(encoder, image)]
    for one, other in zip(out, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class NoDoubles(TorchDispatchMode):
    """Fails where a float64 tensor is made on the device meta, as on MPS, which has no such type."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            assert not (isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64), function
        return out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_devices_without_float64_are_enough(name, image):
    encoder = build(name).to("meta")
    with NoDoubles():
        encoder(image.to("meta"), denormalize=True)


@pytest.mark.parametrize("name", NAMES)
def test_building_on_meta_and_loading_afterwards(name, image):
    encoder = build(name)
    state, ((expected, *_)) = encoder.state_dict(), [*encode(encoder, image)]
    with torch.device("meta"):
        empty, assigned = build(name), build(name)
    assert empty.device.type == "meta"
    shapes = empty(image.to("meta"), return_summary=True)
    assert [x.shape for x in shapes] == [x.shape for x in expected]
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    empty.load_state_dict(state)
    assigned.load_state_dict(state, assign=True)
    for loaded in (empty, assigned):
        assert loaded.device.type == "cpu"
        for out in encode(loaded, image):
            assert torch.equal(out.low_res, expected.low_res)
            torch.testing.assert_close(out.high_res, expected.high_res, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tile", "featsharp", "jafar", "lift"])
def test_every_type_of_autocast_images_and_weights(name, weights, dtype, image):
    """The other methods have the same rule; float64 stays as exact as it is without autocast."""
    encoder = build(name)
    with torch.no_grad():
        exact = encoder(image, return_summary=True)
    encoder.to(weights)
    for images in (image, image.double(), image.half(), image.bfloat16()):
        with torch.autocast("cpu", dtype), torch.no_grad():
            if weights.itemsize == 2 and weights != dtype:
                with pytest.raises(InputError, match=r"weights, which an autocast to b?float16 cannot take; use an"):
                    encoder(images)
            else:
                check(encoder(images, return_summary=True), weights, exact, least=0.95)
            with torch.autocast("cpu", enabled=False):
                check(encoder(images, return_summary=True), weights, exact, least=0.95)


@pytest.mark.parametrize("part", ["backbone", "upsampler"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_part_alone_in_another_type(name, dtype, part, image):
    encoder = build(name)
    with torch.no_grad():
        exact = encoder(image, return_summary=True)
    getattr(encoder, part).to(dtype)
    for out in encode(encoder, image):
        check(out, encoder.dtype, exact, least=0.97)
    assert encoder.dtype == (dtype if part == "upsampler" and [*encoder.upsampler.parameters()] else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_in_another_type(name, dtype, image):
    encoder = build(name)
    with torch.no_grad():
        exact = encoder(image, return_summary=True)
    encoder.to(dtype)
    for out in encode(encoder, image):
        check(out, dtype, exact, least=0.97)


def test_whole_numbers_are_no_whitened_images(image):
    encoder = build("tile")
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with pytest.raises(InputError, match="whitened images are floating point; got torch"):
            encoder(image.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["bilinear", "featup", "tile"])
def test_weights_that_torch_cannot_compute_with_are_refused_by_name(name, dtype, image):
    encoder = build(name)
    encoder.backbone.to(dtype)
    with pytest.raises(InputError, match=r"backbone 'toy-vit' has weights of float8_e\dm\d.*\.to\(torch\.bfloat16\)"):
        encoder(image)
    encoder.backbone.autocast_dtype = torch.bfloat16
    with pytest.raises(InputError, match=r"backbone 'toy-vit' has weights of float8"):
        encoder(image)
    encoder.to(dtype)
    with pytest.raises(InputError, match="this encoder has weights of float8"):
        encoder.encode_image(image[0].sigmoid())
    with torch.no_grad():  # the bits are there, but what they lost is not
        check(encoder.to(torch.float32)(image, return_summary=True), torch.float32)
