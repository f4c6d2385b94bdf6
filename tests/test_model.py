"""The sharp encoder: its call, its summary, whitening, sizes of every kind, and features that line up with pixels."""

import importlib.util
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import featsharp
from featsharp import SharpEncoder, create_backbone, create_encoder, load_from_file
from featsharp.errors import ConfigError, DataError, InputError
from featsharp.layers.bias_buffer import BiasBuffer
from featsharp.model import InputConditioner
from featsharp.normalizers import FeatureStatistics, create_normalizer
from featsharp.ops.resize import resize
from featsharp.upsamplers import UpsampleFeatures, create_upsampler

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def smooth_images(count: int, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(torch.randn(count, 3, 7, 8), size, mode="bicubic")


def fitted_encoder(upsampler: str = "featsharp", *, bias: bool = False) -> SharpEncoder:
    """toy-vit with PHI-S fitted to its features of random images, and a bias that is not zero."""
    encoder = create_encoder("toy-vit", upsampler, 2, normalizer="phi-s", bias_buffer=bias)
    statistics = FeatureStatistics(32)
    with torch.no_grad():
        statistics.update(encoder.backbone(smooth_images(16, (64, 64))).features)
        if encoder.bias_buffer is not None:
            encoder.bias_buffer.buffer.normal_()
    encoder.normalizer.fit(statistics)
    return encoder


@pytest.mark.parametrize("upsampler", ["bilinear", "tile", "featup", "featsharp"])
def test_the_documented_call(upsampler):
    venc, images = fitted_encoder(upsampler), smooth_images(2, (96, 160))
    with torch.no_grad():
        out = venc(images, denormalize=True, return_summary=True)
        low_res, high_res, summary = out
    assert isinstance(out, UpsampleFeatures)
    assert out._fields == ("low_res", "high_res", "summary")
    grid = (96 // 8, 160 // 8) if upsampler in ("bilinear", "featup") else (96 // 16, 160 // 16)
    assert low_res.shape == (2, 32, *grid)
    assert high_res.shape == (2, 32, 2 * grid[0], 2 * grid[1])
    assert summary.shape == (2, 32)
    assert not venc.training
    assert (venc.embed_dim, venc.factor, venc.patch_size) == (32, 2, 8)


@pytest.mark.parametrize("upsampler", ["bilinear", "featup"])
def test_the_summary_is_the_backbones_own_bit_for_bit(upsampler):
    venc, images = fitted_encoder(upsampler, bias=True), smooth_images(3, (72, 104))
    with torch.no_grad():
        expected = venc.backbone(images).summary
        for denormalize in (False, True):
            assert torch.equal(venc(images, denormalize=denormalize, return_summary=True).summary, expected)
        assert venc(images).summary is None


def test_the_summary_beside_tiles_is_that_of_the_low_resolution_images():
    venc, images = fitted_encoder("tile"), smooth_images(2, (128, 128))
    with torch.no_grad():
        together = venc(images, return_summary=True).summary
        expected = venc.backbone(resize(images, (64, 64))).summary
        torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
        venc.upsampler.max_tile_batch = 2  # now the backbone sees the same batches
        assert torch.equal(venc(images, return_summary=True).summary, expected)


def test_a_backbone_without_summary_says_so():
    venc = create_encoder("toy-cnn", "bilinear", 2)
    images = smooth_images(1, (64, 64))
    assert venc(images).summary is None
    with pytest.raises(InputError, match="'toy-cnn' has no summary; call without return_summary"):
        venc(images, return_summary=True)


def test_normalised_features_have_unit_spread_and_denormalised_ones_those_of_the_backbone():
    venc, images = fitted_encoder("bilinear"), smooth_images(12, (64, 64))
    with torch.no_grad():
        normalised = venc(images).low_res
        original = venc(images, denormalize=True)
        backbone = venc.backbone(images).features
    assert 0.9 < normalised.transpose(0, 1).flatten(1).std(1).mean() < 1.1
    torch.testing.assert_close(original.low_res, backbone, atol=1e-4, rtol=1e-4)
    expected = F.interpolate(backbone, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(original.high_res, expected, atol=1e-4, rtol=1e-4)


def test_the_bias_is_added_in_normalised_space():
    venc, images = fitted_encoder("bilinear", bias=True), smooth_images(2, (64, 64))
    with torch.no_grad():
        expected = venc.normalizer(venc.backbone(images).features) + venc.bias_buffer.at((8, 8))
        out = venc(images)
        torch.testing.assert_close(out.low_res, expected)
        denormalised = venc(images, denormalize=True).low_res
    torch.testing.assert_close(denormalised, venc.normalizer.denormalize(expected), atol=1e-4, rtol=1e-4)


def test_gradient_reaches_bias_and_upsampler_and_never_the_backbone():
    venc = fitted_encoder("featsharp", bias=True).train()
    images = smooth_images(1, (64, 96)).requires_grad_()
    venc(images).high_res.square().mean().backward()
    assert venc.bias_buffer.buffer.grad.abs().sum() > 0
    assert all(p.grad is not None for p in venc.upsampler.parameters())
    assert all(p.grad is None for p in venc.backbone.parameters())
    assert not venc.backbone.training


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 9, 4)])
def test_input_conditioner_equals_torchvision(shape):
    from torchvision.transforms import Normalize

    pixels = torch.rand(shape)
    conditioner = create_encoder("toy-vit", "bilinear", 2).input_conditioner
    torch.testing.assert_close(conditioner(pixels), Normalize(MEAN, STD)(pixels), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(conditioner.invert(conditioner(pixels)), pixels, atol=1e-6, rtol=1e-6)


def test_whitening_twice_warns_once():
    conditioner = InputConditioner(MEAN, STD)
    pixels = torch.linspace(0, 1, 48).reshape(1, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whitened = conditioner(pixels)
    with pytest.warns(UserWarning, match="already whitened"):
        conditioner(whitened)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditioner(whitened)


def test_bytes_are_refused_and_dtypes_kept():
    conditioner = InputConditioner(MEAN, STD)
    with pytest.raises(InputError, match=r"torch\.uint8, divide by 255 first"):
        conditioner(torch.zeros(3, 4, 4, dtype=torch.uint8))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert conditioner(torch.rand(3, 4, 4).to(dtype)).dtype == dtype


@pytest.mark.parametrize("upsampler", ["bilinear", "tile", "featup", "featsharp"])
def test_a_fixed_backbone_takes_an_image_of_any_size(upsampler):
    venc = create_encoder("toy-vit-fixed", upsampler, 2)
    with torch.no_grad():
        out = venc(smooth_images(1, (640, 1024)), return_summary=True)
    assert out.low_res.shape == (1, 32, 8, 8)
    assert out.high_res.shape == (1, 32, 16, 16)
    picture = Image.fromarray(np.zeros((640, 1024, 3), np.uint8))
    assert venc.encode_image(picture).high_res.shape == (1, 32, 16, 16)


def test_sizes_of_the_low_resolution_pass():
    tile, bilinear = (create_encoder("toy-vit", name, 3) for name in ("tile", "bilinear"))
    assert tile.low_res_size((240, 333)) == (80, 112)
    assert bilinear.low_res_size((240, 333)) == (240, 336)
    assert tile.input_size == (192, 192)
    assert bilinear.input_size == (64, 64)
    with torch.no_grad():
        out = tile(smooth_images(1, (100, 100)), low_res_size=(40, 72))
    assert out.low_res.shape[-2:] == (5, 9)
    with pytest.raises(InputError, match="multiples of 8; got 40x70"):
        tile(smooth_images(1, (100, 100)), low_res_size=(40, 70))


@pytest.mark.parametrize("upsampler", ["bilinear", "tile"])
def test_images_from_one_patch_upwards(upsampler):
    venc = create_encoder("toy-vit", upsampler, 2)
    with torch.no_grad():
        assert venc(torch.randn(1, 3, 8, 9)).high_res.shape == (1, 32, 2, 2)
    with pytest.raises(InputError, match="7x64 pixels are smaller than one 8-pixel patch"):
        venc(torch.randn(1, 3, 7, 64))
    with pytest.raises(InputError, match="5x30 pixels are smaller than one 8-pixel patch"):
        venc.encode_image(Image.new("RGB", (30, 5)))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64)])
def test_what_is_no_batch_of_images(shape):
    with pytest.raises(InputError, match=r"takes whitened images \[B, 3, H, W\]"):
        create_encoder("toy-vit", "bilinear", 2)(torch.zeros(shape))


def picture_with_square(size: tuple[int, int], grid: tuple[int, int], cell: tuple[int, int]) -> Image.Image:
    """Grey, with a white square over one cell of a grid laid over the whole picture."""
    pixels = np.full((*size, 3), 100, np.uint8)
    top, bottom = (round((cell[0] + i) * size[0] / grid[0]) for i in (0, 1))
    left, right = (round((cell[1] + i) * size[1] / grid[1]) for i in (0, 1))
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("backbone", ["toy-vit", "toy-vit-fixed"])
@pytest.mark.parametrize("upsampler", ["bilinear", "tile"])
@pytest.mark.parametrize("size", [(217, 341), (500, 101), (64, 64)])
def test_features_line_up_with_the_pixels_of_a_picture(backbone, upsampler, size):
    venc = create_encoder(backbone, upsampler, 2)
    empty = venc.encode_image(Image.fromarray(np.full((*size, 3), 100, np.uint8)))
    rows, cols = empty.low_res.shape[-2:]
    assert empty.high_res.shape[-2:] == (2 * rows, 2 * cols)
    for cell in [(0, 0), (rows - 1, cols // 2), (rows // 3, cols - 1)]:
        out = venc.encode_image(picture_with_square(size, (rows, cols), cell))
        for square, blank, scale in ((out.low_res, empty.low_res, 1), (out.high_res, empty.high_res, 2)):
            deviation = (square - blank).norm(dim=1)[0]
            y, x = divmod(int(deviation.argmax()), deviation.shape[1])
            assert (y // scale, x // scale) == cell


def test_pictures_keep_their_aspect_ratio_and_about_the_native_number_of_tokens():
    venc = create_encoder("toy-vit", "tile", 2)
    out = venc.encode_image(Image.new("RGB", (400, 200)))
    height, width = out.low_res.shape[-2:]
    assert (height, width) == (6, 11)
    assert venc.encode_image(Image.new("RGB", (400, 200)), size=(96, 208)).low_res.shape[-2:] == (6, 13)


def test_a_picture_from_a_file_equals_the_tensor_of_its_pixels(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    venc = fitted_encoder("featup")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = venc(venc.input_conditioner(tensor), denormalize=True, return_summary=True)
    for source in (tmp_path / "picture.png", str(tmp_path / "picture.png"), Image.fromarray(pixels)):
        out = venc.encode_image(source, size=(64, 48), return_summary=True)
        for one, other in zip(out, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_picture_that_is_none(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match=r"empty\.jpg"):
        create_encoder("toy-vit", "bilinear", 2).encode_image(tmp_path / "empty.jpg")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_whole_encoder_in_half_precision(dtype):
    venc = fitted_encoder("featsharp", bias=True)
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((96, 72))
    exact = venc.encode_image(picture, denormalize=False).high_res
    out = venc.to(dtype).encode_image(picture, denormalize=False).high_res
    assert out.dtype == dtype
    assert F.cosine_similarity(out.float(), exact).mean() > 0.98


def test_parts_that_do_not_fit():
    backbone = create_backbone("toy-vit")

    class Wide:
        embed_dim = 64

    with pytest.raises(ConfigError, match="for 64 channels, but backbone 'toy-vit' has 32"):
        SharpEncoder(backbone, create_upsampler("bilinear", Wide(), 2), create_normalizer("none", 32))


def test_assembled_by_hand_equals_built_by_name():
    backbone, images = create_backbone("toy-vit"), smooth_images(1, (64, 80))
    by_hand = SharpEncoder(
        backbone, create_upsampler("tile", backbone, 2), create_normalizer("none", 32), BiasBuffer(32, (8, 8))
    )
    with torch.no_grad():
        assert torch.equal(by_hand(images).high_res, create_encoder("toy-vit", "tile", 2)(images).high_res)


def test_a_probe_trains_on_encoded_images():
    picture = Image.fromarray(np.zeros((60, 90, 3), dtype=np.uint8))
    probe = nn.Conv2d(32, 2, 1)
    probe(create_encoder("toy-vit", "tile", 2).encode_image(picture).high_res).sum().backward()
    assert probe.weight.grad is not None


def test_the_conditioner_has_no_tensors_to_move_or_round():
    conditioner = create_encoder("toy-vit", "tile", 2).bfloat16().input_conditioner
    assert not conditioner.state_dict()
    pixels = torch.rand(3, 8, 8)
    expected = (pixels - torch.tensor(conditioner.mean)[:, None, None]) / torch.tensor(conditioner.std)[:, None, None]
    assert torch.equal(conditioner(pixels), expected)


def test_printed_it_fits_a_screen():
    lines = repr(fitted_encoder("featsharp", bias=True)).splitlines()
    assert len(lines) <= 25
    for part in (
        "backbone): ToyViT(name='toy-vit'",
        "normalizer): PhiS",
        "upsampler): FeatSharp(embed_dim=32, factor=2",
    ):
        assert sum(part in line for line in lines) == 1


@pytest.mark.parametrize("name", ["featsharp", "featsharp-progressive"])
def test_a_linear_map_is_called_one(name):
    blocks = create_encoder("toy-vit", name, 2)
    linear = create_encoder("toy-vit", name, 2, upsampler_options={"attention": False, "ffn": False})
    assert (blocks.caption, linear.caption) == (f"{name} 2x", f"{name}, linear 2x")
    assert "factor=2, linear" in repr(linear)
    assert "linear" not in repr(blocks)


def test_the_caption_of_an_encoder_has_its_method_and_factor():
    assert create_encoder("toy-vit", "tile", 1.5).caption == "tile 1.5x"
    upsampler = create_encoder("toy-vit", "bilinear", 2).upsampler
    assert create_encoder("toy-vit", upsampler).caption == f"{type(upsampler).__name__} 2x"


def test_a_list_of_pictures_of_several_sizes_equals_them_one_by_one(tmp_path):
    encoder = fitted_encoder()
    sizes = [(60, 90), (90, 60), (60, 90), (50, 50), (120, 180)]
    pictures = [Image.effect_noise((w, h), 60 + i).convert("RGB") for i, (h, w) in enumerate(sizes)]
    pictures[1].save(tmp_path / "b.png")
    batches = []
    encoder.backbone.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    together = encoder.encode_image([pictures[0], tmp_path / "b.png", *pictures[2:]], return_summary=True)
    assert sorted(batches) == [5, 5, 15]  # three sizes; three pictures of one aspect ratio share a batch
    for out, picture in zip(together, pictures, strict=True):
        alone = encoder.encode_image(picture, return_summary=True)
        for one, other in zip(out, alone, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert encoder.encode_image([]) == []
    with pytest.raises(ConfigError, match="allocate= makes room for one picture"):
        encoder.encode_image(pictures[:1], allocate=lambda *arguments: None)
    assert encoder.encode_image(pictures[:2])[0].summary is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "upsampler",
    ["featsharp", *(pytest.param(n, marks=pytest.mark.full) for n in ("bilinear", "loftup", "naf", "uplift"))],
)
def test_compiled_with_dynamic_shapes_in_one_graph(upsampler):
    """Without graph breaks; one graph serves all sizes at which position embeddings grow, one where they shrink."""
    encoder = fitted_encoder(upsampler)
    batches = [smooth_images(2, size) for size in [(64, 48), (96, 80), (112, 64), (48, 144)]]
    with torch.no_grad():
        expected = [encoder(images).high_res for images in batches]
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        encoder.compile(fullgraph=True, backend=graphs)
        for images, high_res in zip(batches, expected, strict=True):
            torch.testing.assert_close(encoder(images).high_res, high_res, atol=1e-4, rtol=1e-4)
    assert graphs.frame_count <= 2


def test_a_compiled_encoder_still_minds_its_memory():
    encoder = fitted_encoder()
    images = smooth_images(1, (64, 48))
    expected = encoder(images).high_res
    encoder.compile(backend="aot_eager")
    encoder.max_memory = "100MiB"
    torch.testing.assert_close(encoder(images).high_res, expected, atol=1e-4, rtol=1e-4)
    encoder.max_memory = "1MiB"
    with pytest.raises(InputError, match="least that works"):
        encoder(images)


@pytest.mark.parametrize("max_memory", [None, "1GiB"])
@pytest.mark.parametrize("upsampler", ["identity-1x", "bilinear", "featsharp", "jafar", "tile"])
def test_maps_can_be_saved_viewed_and_changed_one_without_the_other(upsampler, max_memory, tmp_path):
    name, _, one = upsampler.partition("-")
    encoder = create_encoder("toy-vit", name, 1 if one else 2, max_memory=max_memory)
    out = encoder.encode_image(Image.new("RGB", (96, 64)))
    save_file({"low_res": out.low_res, "high_res": out.high_res}, tmp_path / "features.safetensors")
    assert torch.equal(load_file(tmp_path / "features.safetensors")["high_res"], out.high_res)
    before = out.low_res.clone()
    out.high_res.view(-1).zero_()
    assert torch.equal(out.low_res, before)
    assert before.any()


@pytest.mark.parametrize("size", [64, "64x64", (64.0, 64.0), (64,), (64, 64, 3), (True, 64), (64.5, 64), None])
def test_a_size_that_is_not_two_whole_numbers_is_named(size):
    encoder = create_encoder("toy-vit", "bilinear", 2)
    image = Image.new("RGB", (96, 64))
    message = re.escape(f"(height, width), two whole numbers of pixels; got {size!r}")
    if size is not None:
        with pytest.raises(InputError, match=f"^size is {message}"):
            encoder.encode_image(image, size=size)
        with pytest.raises(InputError, match=f"^low_res_size is {message}"):
            encoder(torch.randn(1, 3, 64, 64), low_res_size=size)
    with pytest.raises(InputError, match=f"^input_size is {message}"):
        featsharp.from_callable(nn.Conv2d(3, 8, 16, 16), input_size=size)


@pytest.mark.parametrize("size", [[64, 96], torch.Size((64, 96)), np.array([64, 96]), torch.tensor([64, 96])])
def test_sizes_of_other_libraries_are_taken(size):
    encoder = create_encoder("toy-vit", "tile", 2)
    assert encoder.encode_image(Image.new("RGB", (96, 64)), size=size).high_res.shape == (1, 32, 8, 12)


def test_what_is_no_tensor_or_elsewhere_is_named():
    encoder = create_encoder("toy-vit", "bilinear", 2)
    for wrong in (np.zeros((1, 3, 64, 64), np.float32), "photo.jpg", None):
        with pytest.raises(InputError, match="encode_image takes pictures"):
            encoder(wrong)
        with pytest.raises(InputError, match="takes a tensor of pixels"):
            encoder.input_conditioner(wrong)
    with pytest.raises(InputError, match="the images are on meta, this encoder on cpu"):
        encoder(torch.empty(1, 3, 64, 64, device="meta"))
    with torch.device("meta"), pytest.raises(ConfigError, match="cannot be loaded under torch's default device meta"):
        load_from_file("vits14-focus/featsharp-2x")
