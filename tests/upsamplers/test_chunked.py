"""Upsampling within a given amount of memory: the same features, and never more memory than allowed."""

import gc
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from featsharp.backbones import from_callable
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError, InputError
from featsharp.extraction.mapped import MappedFeatures
from featsharp.memory import PeakMeter, parse_memory
from featsharp.ops.resize import resize
from featsharp.upsamplers import GuidedUpsampler
from featsharp.upsamplers.chunked import UNCOUNTED_BYTES, UNCOUNTED_FRACTION, Plan, upsample_in_chunks, upsample_within
from featsharp.upsamplers.featsharp import FeatSharp

CASES = [
    ("identity", 1, {}),
    ("bilinear", 3, {}),
    ("bilinear", 4, {}),
    ("tile", 3, {}),
    ("tile", 2, {"overlap": 2}),
    ("featup", 2, {}),
    ("featup", 6, {}),
    ("jafar", 2, {}),
    ("featsharp", 2, {}),
    ("featsharp", 3, {"inputs": ("bilinear",)}),
    ("featsharp", 4, {"widths": "published", "start": "published"}),
    ("featsharp", 2, {"inputs": ("jafar", "tiles")}),
    ("featsharp", 2, {"attention": False, "inputs": ("bilinear", "rgb", "tiles")}),
    ("featsharp", 2.5, {"attention": False, "ffn": False, "inputs": ("tiles", "bilinear", "details")}),
    ("anyup", 2, {}),
    ("resfu", 2, {}),
    ("featsharp", 2, {"inputs": ("resfu", "tiles")}),
    ("views", 2, {}),
    ("views", 4, {"passes": 8}),
    ("learned-views", 2, {}),
    ("bilinear", 2.5, {}),
    ("tile", 1.5, {}),
    ("featup", 3.5, {}),
    ("featsharp", 1.5, {}),
    ("naf", 2, {}),
    ("naf", 2.5, {}),
    ("loftup", 2, {}),
    ("uplift", 2, {}),
    ("uplift", 3, {}),
]
GENEROUS = 2**30


def build(name, factor, options):
    encoder = create_encoder("toy-vit", name, factor, upsampler_options=options)
    with torch.no_grad():
        for parameter in encoder.upsampler.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def in_chunks(encoder, images, chunk, tile_batch):
    """Features made in chunks of a given size, whatever the memory."""
    size = encoder.low_res_size(images.shape[2:])
    with torch.no_grad():
        first = encoder.encode(resize(images[:1], size))
    plan = Plan(tile_batch, chunk, images.dtype)
    return upsample_in_chunks(encoder.upsampler, images, encoder.encode, size, first, plan)


LONG = [("featup", 6), ("featsharp", 4), ("anyup", 2)]
QUICK = [("tile", 3), ("featup", 2), ("featsharp", 2.5), ("views", 2), ("jafar", 2), ("bilinear", 2.5), ("identity", 1)]


@pytest.mark.parametrize(
    ("name", "factor", "options"),
    [pytest.param(*case, marks=[] if case[:2] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_small_chunks_make_the_same_features(name, factor, options):
    encoder = build(name, factor, options)
    k = encoder.upsampler.input_upsample_factor
    images = torch.randn(2, 3, int(40 * k) + 3, int(56 * k))
    if name == "uplift":  # the softmax of its long chain of convolutions shows float32's rounding: up to 1.2e-4
        encoder, images = encoder.double(), images.double()
    with torch.no_grad():
        expected = encoder(images, return_summary=True)
    out = in_chunks(encoder, images, (5, 5), 2)
    encoder.max_memory = GENEROUS
    limited = encoder(images, return_summary=True)
    for one, other, wanted in zip(out, limited, expected, strict=True):
        torch.testing.assert_close(one, wanted, atol=3e-5, rtol=1e-4)
        torch.testing.assert_close(other, wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [(1, 1), (2, 9), (11, 2), (3, 3), (100, 4)])
def test_chunks_of_any_shape_see_the_tiles_around_them(chunk):
    """Chunks smaller than the halo, too: what a neighbour overwrote must have been kept."""
    encoder = build("featsharp", 2, {})
    images = torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        expected = encoder(images).high_res
    torch.testing.assert_close(in_chunks(encoder, images, chunk, 3).high_res, expected, atol=3e-5, rtol=1e-4)


def tier(name, factor, options):
    """The slow tests have each method once."""
    return (
        [] if (name, factor) == ("tile", 3) else pytest.mark.slow if (factor, options) == (2, {}) else pytest.mark.full
    )


@pytest.mark.parametrize(("name", "factor", "options"), [pytest.param(*case, marks=tier(*case)) for case in CASES])
def test_memory_stays_below_the_limit_and_the_least_that_works_works(name, factor, options):
    encoder = build(name, factor, options)
    k = encoder.upsampler.input_upsample_factor
    height, width = (48, 64) if (name, factor) in LONG else (88, 120)
    images = torch.randn(2, 3, int(height * k), int(width * k))
    size = encoder.low_res_size((height * k, width * k))

    def peak(limit):
        with torch.no_grad(), PeakMeter() as meter:
            out = upsample_within(encoder.upsampler, images, encode, size, limit)
        return meter.peak - out.low_res.nbytes - out.high_res.nbytes

    encode = encoder.encode
    with pytest.raises(InputError, match="max_memory=1MiB is too little: one pass through the backbone") as error:
        peak(1000)
    least = parse_memory(re.search(r"least that works for this image is (\w+)", str(error.value))[1])
    for limit in (least, 2 * least, 8 * least):
        assert peak(limit) <= limit


@pytest.mark.parametrize(
    "name", ["bilinear", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tile", "featup", "views"))]
)
def test_a_cell_per_pixel(name, tmp_path):
    """The map goes to a file, that of views and of bilinear interpolation larger than the limit.

    The image of which tiles would be cut has 64 times the pixels.
    """
    encoder = build(name, 2, {})
    pixels = torch.rand(3, 600, 800) if name in ("bilinear", "views") else torch.rand(3, 240, 160)
    encoder.max_memory, chosen = "24MiB" if name == "tile" else "32MiB", {"output_size": "pixels"}
    with MappedFeatures(tmp_path / "map.npy") as file, PeakMeter() as meter:
        out = encoder.encode_image(pixels, allocate=file.allocate, **chosen)
    assert meter.peak < encoder.max_memory + 3 * 4 * pixels.numel() + out.low_res.nbytes  # the picture, three times
    assert np.load(tmp_path / "map.npy", mmap_mode="r").shape == (32, *pixels.shape[1:])
    encoder.max_memory = None
    chosen = {"output_size": pixels.shape[1:]}
    torch.testing.assert_close(out.high_res, encoder.encode_image(pixels, **chosen).high_res, atol=3e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_result_larger_than_the_limit():
    upsampler = FeatSharp(256, 4).eval()
    weight = torch.randn(256, 3, 4, 4)

    def encode(images):
        return F.conv2d(images, weight, stride=4), None

    image, place = torch.randn(1, 3, 1200, 912), {}

    def allocate(low_res, shape, dtype):
        place["out"] = torch.empty(shape, dtype=dtype)
        return place["out"]

    limit = 56 * 2**20
    with PeakMeter() as meter:
        out = upsample_within(upsampler, image, encode, (300, 228), limit, allocate=allocate)
    assert out.high_res.nbytes > limit
    assert meter.peak - out.high_res.nbytes - out.low_res.nbytes <= limit


def test_more_memory_means_more_tiles_at_once():
    encoder = build("tile", 4, {})
    batches = []

    def encode(images):
        batches.append(len(images))
        return encoder.encode(images)

    images = torch.randn(1, 3, 4 * 64, 4 * 64)
    with torch.no_grad(), PeakMeter() as meter:
        low_res = encoder.encode(resize(images, (64, 64))).features
    for passes in (4, 9):
        batches.clear()
        room = UNCOUNTED_BYTES + 2 * low_res.nbytes + int((passes + 0.5) * meter.peak)
        upsample_within(encoder.upsampler, images, encode, (64, 64), int(room / (1 - UNCOUNTED_FRACTION)))
        last = [16 % passes] if 16 % passes else []
        assert batches == [1, *(16 // passes) * [passes], *last]


@pytest.mark.slow
def test_denormalised_features_and_gradients():
    encoder = build("featsharp", 2, {})
    encoder.max_memory = "1GiB"
    assert encoder.max_memory == 2**30
    out = encoder(torch.randn(1, 3, 64, 48), denormalize=True)
    assert not out.high_res.requires_grad
    unbounded = build("featsharp", 2, {})
    assert unbounded.max_memory is None


@pytest.mark.slow
def test_half_precision():
    encoder = build("featsharp", 2, {}).to(torch.bfloat16)
    images = torch.randn(1, 3, 64, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = encoder(images).high_res
        encoder.max_memory = "1GiB"
        out = encoder(images).high_res
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [True, False])
def test_under_autocast(trainable):
    """Nothing of the prediction, fake casts of weights above all, may stay in autocast's cache."""
    encoder = build("featsharp", 2, {})
    encoder.upsampler.requires_grad_(trainable)
    images = torch.randn(2, 3, 64, 48)
    with torch.autocast("cpu", torch.bfloat16):
        expected = encoder(images)
        encoder.max_memory = GENEROUS
        out = encoder(images)
        again = encoder(images)
    for one, other in zip(out, expected, strict=True):
        assert type(one) is torch.Tensor or one is None
        assert one is None or one.dtype == other.dtype
    torch.testing.assert_close(out.high_res, expected.high_res.detach(), atol=0.05, rtol=0.05)
    assert torch.equal(out.high_res, again.high_res)


def test_encoders_in_training_and_empty_batches_are_refused():
    encoder = build("featsharp", 2, {})
    encoder.max_memory = GENEROUS
    with pytest.raises(InputError, match="at least one image"):
        encoder(torch.randn(0, 3, 64, 48))
    with pytest.raises(ConfigError, match="for encoders in eval mode; call eval"):
        encoder.train()(torch.randn(1, 3, 64, 48))


@pytest.mark.slow
def test_nothing_stays_behind():
    """Neither fake tensors in the module, nor watchers of its weights."""
    encoder = build("featsharp", 2, {})
    encoder.max_memory = GENEROUS
    images = torch.randn(1, 3, 64, 48)
    encoder(images)
    watchers = len(weakref.finalize._registry)
    for _ in range(3):
        encoder(images)
    gc.collect()
    assert len(weakref.finalize._registry) <= watchers
    assert all(type(value) is torch.Tensor for value in encoder.state_dict().values())


def test_a_backbone_outside_of_pytorch():
    """Its memory does not show; the rest is still bounded."""

    class Numbers(torch.nn.Module):
        def forward(self, images):
            pooled = images.numpy().reshape(len(images), 3, images.shape[2] // 8, 8, -1, 8).mean((3, 5))
            return torch.from_numpy(np.repeat(pooled, 8, 1))

    backbone = from_callable(Numbers(), patch_size=8, input_size=(64, 64))
    encoder = create_encoder(backbone, "featsharp", 2)
    images = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        expected = encoder(images).high_res
    encoder.max_memory = "100MB"
    torch.testing.assert_close(encoder(images).high_res, expected, atol=1e-5, rtol=1e-5)


def test_an_upsampler_that_works_in_one_piece_is_refused():
    class InOnePiece(GuidedUpsampler):
        def upsample_to(self, features, image, size):
            return features.repeat_interleave(2, 2).repeat_interleave(2, 3)

    encoder = create_encoder("toy-vit", InOnePiece(32, 2), max_memory="2GiB")
    with pytest.raises(ConfigError, match="InOnePiece makes its map in one piece"):
        encoder(torch.randn(1, 3, 32, 32))


def test_what_is_no_amount_of_memory():
    with pytest.raises(ConfigError, match="cannot read 'lots' as an amount of memory"):
        create_encoder("toy-vit", "bilinear", 2, max_memory="lots")


def test_results_are_written_where_the_caller_says():
    encoder = build("featsharp", 2, {})
    images = torch.randn(2, 3, 64, 48)
    place = {}

    def allocate(low_res, shape, dtype):
        place["out"] = torch.full(shape, torch.nan, dtype=dtype)
        assert low_res.shape == (2, 32, 4, 3)
        return place["out"]

    with pytest.raises(ConfigError, match="needs a limit on memory"):
        encoder(images, allocate=allocate)
    encoder.max_memory = GENEROUS
    out = encoder(images, allocate=allocate)
    assert out.high_res is place["out"]
    assert out.high_res.isfinite().all()
