"""One pass of a larger image: what is encoded, and what a super-resolution function sees and may return."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featsharp.backbones import create_backbone
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError, InputError
from featsharp.upsamplers import create_upsampler
from featsharp.upsamplers.larger_input import IMAGENET_MEAN, IMAGENET_STD, NativeHighRes, SuperResolution

PATCH = 4
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def mean_colour(images):
    """A backbone that is a function of each patch alone."""
    features = F.avg_pool2d(images, PATCH)
    return features, features.amax((2, 3))


class Seen:
    """``encode`` or a super-resolution function that remembers what it got."""

    def __init__(self, function) -> None:
        self.function, self.images = function, []

    def __call__(self, images):
        self.images.append(images)
        return self.function(images)


def double(pixels):
    return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize(
    ("factor", "output_size", "pixels"),
    [(2, None, (24, 40)), (1.5, None, (20, 32)), (1, None, (12, 20)), (2, (7, 5), (28, 20)), (5, (3, 5), (12, 20))],
)
def test_the_larger_image_is_encoded_in_one_pass(factor, output_size, pixels):
    image, encode = torch.randn(2, 3, 75, 61), Seen(mean_colour)
    out = NativeHighRes(3, factor)(image, encode, (12, 20), output_size)
    small, large = (F.interpolate(image, size, mode="bilinear", antialias=True) for size in ((12, 20), pixels))
    for given, expected in zip(encode.images, (small, large), strict=True):
        torch.testing.assert_close(given, expected)
    torch.testing.assert_close(out.low_res, mean_colour(small)[0])
    torch.testing.assert_close(out.summary, mean_colour(small)[1])
    torch.testing.assert_close(out.high_res, mean_colour(large)[0])


def test_a_real_encoder_at_the_size_of_the_image():
    encoder, image = create_encoder("toy-vit", "native-highres", 2), torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        out = encoder(image)
        expected = create_backbone("toy-vit")(image).features
    assert out.low_res.shape == (2, 32, 6, 8)
    torch.testing.assert_close(out.high_res, expected)


def test_another_grid_is_resized():
    """A backbone whose grid is not proportional to its input, such as one with a border."""

    def encode(images):
        return F.avg_pool2d(images, PATCH)[..., : 2 + images.shape[3] // 8], None

    out = NativeHighRes(3, 3)(torch.randn(1, 3, 40, 40), encode, (16, 16))
    assert out.low_res.shape == (1, 3, 4, 4)
    assert out.high_res.shape == (1, 3, 12, 12)


@pytest.mark.parametrize("name", ["native-highres", "super-resolution"])
def test_a_backbone_of_one_size(name):
    options = {"enlarge": double} if name == "super-resolution" else {}
    encoder = create_encoder("toy-vit-fixed", name, 2, upsampler_options=options)
    with pytest.raises(
        ConfigError, match=r"a fixed size; got 128x128.* The upsampler 'tile' encodes .* pieces of 64x64"
    ):
        encoder(torch.randn(1, 3, 128, 128))


@pytest.mark.parametrize(
    ("image_size", "seen_size"), [((24, 40), (12, 20)), ((12, 20), (12, 20)), ((9, 15), (9, 15)), ((30, 7), (12, 7))]
)
def test_super_resolution_sees_the_low_resolution_image(image_size, seen_size):
    pixels = torch.rand(2, 3, *image_size)
    enlarge, encode = Seen(double), Seen(mean_colour)
    out = SuperResolution(3, 2, enlarge=enlarge)((pixels - MEAN) / STD, encode, (12, 20))
    (seen,) = enlarge.images
    shrunk = F.interpolate(pixels, seen_size, mode="bilinear", antialias=True)
    torch.testing.assert_close(seen, shrunk, atol=1e-5, rtol=1e-5)
    large = F.interpolate(double(shrunk), (24, 40), mode="bilinear", antialias=True)
    torch.testing.assert_close(encode.images[1], (large - MEAN) / STD, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.high_res, mean_colour((large - MEAN) / STD)[0], atol=1e-4, rtol=1e-4)


def test_the_whitening_is_the_one_given_and_pixels_stay_in_range():
    pixels = torch.rand(1, 3, 12, 20) * 1.6 - 0.3
    enlarge = Seen(lambda x: double(x) * 3 - 1)
    encode = Seen(mean_colour)
    SuperResolution(3, 2, enlarge=enlarge, mean=[0.5] * 3, std=[0.25] * 3)((pixels - 0.5) / 0.25, encode, (12, 20))
    torch.testing.assert_close(enlarge.images[0], pixels.clamp(0, 1), atol=1e-6, rtol=1e-5)
    expected = (double(pixels.clamp(0, 1)) * 3 - 1).clamp(0, 1)
    torch.testing.assert_close(encode.images[1], (expected - 0.5) / 0.25, atol=1e-5, rtol=1e-5)


def test_a_function_by_name_in_options():
    backbone = create_backbone("toy-vit")
    upsampler = create_upsampler("super-resolution", backbone, 2, options={"enlarge": "torch:relu", "std": [1, 1, 1]})
    image = torch.rand(1, 3, 64, 80) - MEAN
    with torch.no_grad():
        out, native = (method(image, backbone, (64, 80)).high_res for method in (upsampler, NativeHighRes(32, 2)))
    torch.testing.assert_close(out, native, atol=1e-4, rtol=1e-4)  # relu leaves pixels in [0, 1] as they are


def test_a_module_moves_with_the_upsampler_and_stays_frozen():
    network = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.PixelShuffle(2))
    upsampler = SuperResolution(3, 2, enlarge=network).train().to(torch.bfloat16)
    assert upsampler.training
    assert not any(part.training for part in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    image = torch.randn(1, 3, 12, 20, dtype=torch.bfloat16)
    out = upsampler(image, mean_colour, (12, 20)).high_res
    assert out.dtype == torch.bfloat16
    assert out.shape == (1, 3, 6, 10)
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [lambda: NativeHighRes(3, 1.5), lambda: SuperResolution(3, 1.5, enlarge=double)])
def test_half_precision(build, dtype):
    image = F.interpolate(torch.rand(1, 3, 5, 6), (24, 32))
    exact = build()(image, mean_colour, (12, 16)).high_res
    half = build()(image.to(dtype), mean_colour, (12, 16)).high_res
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("build", [lambda: NativeHighRes(3, 3), lambda: SuperResolution(3, 3, enlarge=double)])
def test_an_image_of_one_patch(build):
    out = build()(torch.randn(1, 3, 9, 7), mean_colour, (PATCH, PATCH))
    assert out.low_res.shape == (1, 3, 1, 1)
    assert out.high_res.shape == (1, 3, 3, 3)


@pytest.mark.parametrize(
    ("enlarge", "message"),
    [
        (lambda x: [x], r"has to return images \[1, 3, >=12, >=20\]; got a list"),
        (lambda x: x[0], r"\[1, 3, >=12, >=20\]; got torch.float32 \(3, 12, 20\)"),
        (lambda x: x[..., :-1], r"got torch.float32 \(1, 3, 12, 19\)"),
        (lambda x: x[:, :1], r"got torch.float32 \(1, 1, 12, 20\)"),
        (lambda x: (255 * x).byte(), r"floating point .*; got torch.uint8"),
        (lambda x: x / 0 * 0, "returned NaN or infinite pixels"),
    ],
)
def test_what_super_resolution_must_not_return(enlarge, message):
    with pytest.raises(InputError, match=message):
        SuperResolution(3, 2, enlarge=enlarge)(torch.randn(1, 3, 12, 20), mean_colour, (12, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "option enlarge is a function, or text that names one, such as 'my_module:my_function'; got None"),
        ({"enlarge": double, "std": [1, 0, 1]}, "std above 0"),
        ({"enlarge": double, "mean": [0.5]}, "three numbers each"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ConfigError, match=message):
        create_upsampler("super-resolution", create_backbone("toy-vit"), 2, options=options)
