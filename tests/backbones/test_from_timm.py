"""timm models by name: families, facts, layers, facets, positions, summaries, files and errors.

Every model is the real class; at full width it is cut to two blocks.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from featsharp.backbones import create_backbone
from featsharp.backbones.from_timm import TimmSAM, TimmStages, TimmViT
from featsharp.backbones.options import Options
from featsharp.errors import BackboneMismatchError, CheckpointError, ConfigError, InputError, MissingDependencyError
from featsharp.train import main

timm = pytest.importorskip("timm")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Name, arguments; patch size, width, native size, prefix tokens, summary, whitening.
FAMILIES = {
    "supervised": ("vit_small_patch16_224.augreg_in21k_ft_in1k", {}, (16, 384, 224, 1, 384, HALF)),
    "dino/16": ("vit_small_patch16_224.dino", {}, (16, 384, 224, 1, 384, IMAGENET)),
    "dino/8": ("vit_small_patch8_224.dino", {}, (8, 384, 224, 1, 384, IMAGENET)),
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", {}, (14, 384, 518, 1, 384, IMAGENET)),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2.lvd142m", {}, (14, 384, 518, 5, 384, IMAGENET)),
    "dinov3": ("vit_small_patch16_dinov3.lvd1689m", {}, (16, 384, 256, 5, 384, IMAGENET)),
    "dinov3 apart": ("vit_small_plus_patch16_dinov3.lvd1689m", {"qkv_fused": False}, (16, 384, 256, 5, 384, IMAGENET)),
    "siglip": ("vit_so400m_patch14_siglip_384.webli", {}, (14, 1152, 378, 0, 1152, HALF)),
    "siglip2": ("vit_base_patch16_siglip_256.v2_webli", {}, (16, 768, 256, 0, 768, HALF)),
    "clip": ("vit_base_patch16_clip_224.openai", {}, (16, 768, 224, 1, 768, CLIP)),
    "mae": ("vit_base_patch16_224.mae", {}, (16, 768, 224, 1, 768, IMAGENET)),
    "eva02": ("eva02_small_patch14_224.mim_in22k", {}, (14, 384, 224, 1, 384, CLIP)),
    "eva": ("eva_large_patch14_196.in22k_ft_in22k_in1k", {}, (14, 1024, 196, 1, 1024, CLIP)),
    "deit distilled": ("deit_tiny_distilled_patch16_224.fb_in1k", {}, (16, 192, 224, 2, 192, IMAGENET)),
    "radio": ("naflexvit_base_patch16_radio_v3.c_radio", {}, (16, 768, 512, 8, 768, CLIP)),
    "beit": ("beit_base_patch16_224.in22k_ft_in22k_in1k", {"img_size": 64}, (16, 768, 64, 1, 768, HALF)),
}


def build(family: str, **arguments):
    """The real model of two blocks, with the weights and arguments of a wide spread, so that nothing is trivial."""
    name, own, _ = FAMILIES[family]
    torch.manual_seed(0)
    dynamic = {} if family in ("beit", "radio") else {"dynamic_img_size": True}
    model = timm.create_model(name, depth=2, num_classes=0, **dynamic, **own, **arguments)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "bias" in key or "token" in key or "pos_embed" in key or "reg" in key:
                value.normal_(std=0.2)
            elif "gamma" in key:
                value.fill_(0.5)
    return model.eval()


# One of each kind of tokens and positions.
QUICK = ("dinov2 registers", "dinov3", "siglip2", "eva02", "radio", "deit distilled")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return build(family)


@pytest.fixture(scope="module")
def backbone(family, model) -> TimmViT:
    return TimmViT(family, model)


def images_for(backbone, count: int = 1) -> Tensor:
    p = backbone.patch_size
    size = (3 * p, 5 * p) if backbone.flexible else backbone.input_size
    coarse = torch.randn(count, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size, mode="bicubic")


def tiny(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, **kwargs)


def tokens_of(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2)


# Families


def test_facts_are_those_of_the_configuration(family, backbone):
    patch_size, width, native, prefix, summary, (mean, std) = FAMILIES[family][2]
    assert (backbone.patch_size, backbone.embed_dim, backbone.input_size) == (patch_size, width, (native, native))
    assert (backbone.num_prefix_tokens, backbone.summary_dim) == (prefix, summary)
    assert (backbone.mean, backbone.std) == (mean, std)
    assert backbone.flexible == (family != "beit")
    assert backbone.embeds_patches == (family != "radio")  # a NaFlexVit embeds patches that it has cut out before
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.modules())


def test_features_are_the_models_own_tokens(family, model, backbone):
    images = images_for(backbone, 2)
    out = backbone(images)
    tokens = model.forward_features(images)
    assert torch.equal(tokens_of(out.features), tokens[:, FAMILIES[family][2][3] :])
    if "siglip" in family:
        assert torch.equal(out.summary, model.attn_pool(tokens))
    elif family in ("eva", "eva02", "beit"):  # their norm follows the mean over patches
        torch.testing.assert_close(out.summary, model.fc_norm(tokens[:, 1:].mean(1)))
    else:
        assert torch.equal(out.summary, tokens[:, 0])


def test_tokens_run_row_by_row(backbone):
    images, p = images_for(backbone), backbone.patch_size
    changed = images.clone()
    changed[..., p : 2 * p, 2 * p : 3 * p] *= -2
    change = (backbone(changed).features - backbone(images).features).norm(dim=1)[0]
    assert divmod(int(change.argmax()), change.shape[1]) == (1, 2)


def test_layers_go_through_the_final_norm(family, model, backbone):
    images = images_for(backbone)
    chosen = TimmViT(family, model, Options(layer=(-1, 0)))
    assert chosen.embed_dim == 2 * backbone.embed_dim
    features, summary = chosen(images)
    last, first = features.chunk(2, 1)
    assert torch.equal(last, backbone(images).features)
    assert torch.equal(summary, backbone(images).summary)
    seen = []
    hook = model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.forward_features(images)
    hook.remove()
    torch.testing.assert_close(tokens_of(first), model.norm(seen[0])[:, model.num_prefix_tokens :])


def test_facets_are_what_the_attention_projects(family, model, backbone):
    """Against the attention itself: the query, key and value that reach its product, before norms and rotation."""
    images = images_for(backbone)
    block, seen = model.blocks[1], []
    hook = block.attn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.forward_features(images)
    hook.remove()
    attention, tokens = block.attn, seen[0][:, model.num_prefix_tokens :]
    if attention.qkv is None:
        expected = [attention.q_proj(tokens), attention.k_proj(tokens), attention.v_proj(tokens)]
    else:
        bias = 0
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        expected = (attention.qkv(tokens) + bias).chunk(3, -1)
    for facet, own in zip(("query", "key", "value"), expected, strict=True):
        chosen = TimmViT(family, model, Options(facet=facet))
        out = chosen(images)
        assert chosen.embed_dim == own.shape[-1] == out.features.shape[1]
        torch.testing.assert_close(tokens_of(out.features), own, atol=1e-5, rtol=1e-5)
        assert torch.equal(out.summary, backbone(images).summary)


def test_the_value_facet_is_what_attention_of_one_token_passes_on():
    """Without our formula: an image of one patch, in a model without prefix, attends to its own value alone."""
    model = tiny(class_token=False, global_pool="", dynamic_img_size=True)
    seen = []
    hook = model.blocks[0].attn.proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    value = TimmViT("mine", model, Options(layer=(0,), facet="value"))
    image = torch.randn(1, 3, 16, 16)
    features = value(image).features
    model.forward_features(image)
    hook.remove()
    torch.testing.assert_close(features[..., 0, 0], seen[0][:, 0], atol=1e-6, rtol=1e-5)


def test_another_size_resamples_the_positions_as_documented():
    """Bicubic with a = -0.5 stretched by the factor (antialias), half-pixel centres, by its formula for one patch."""
    model = tiny(dynamic_img_size=True)
    stored = model.pos_embed[0, 1:].reshape(14, 14, 192).double()
    resampled = model._pos_embed(torch.zeros(1, 5, 7, 192))[0, 1:].reshape(5, 7, 192)

    def taps(index: int, count: int) -> Tensor:
        scale = 14 / count
        distance = (torch.arange(14) + 0.5 - (index + 0.5) * scale).abs().double() / scale
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
        return weights / weights.sum()

    expected = torch.einsum("y,x,yxc->c", taps(3, 5), taps(6, 7), stored)
    torch.testing.assert_close(resampled[3, 6].double(), expected, atol=1e-6, rtol=1e-4)


def resized_to_square(table: np.ndarray, side: int, align_corners: bool) -> np.ndarray:
    """Bilinear without antialias, [n, n, C] to [side, side, C], axis by axis from the definition."""
    count = len(table)
    for axis in (0, 1):
        rows = []
        for index in range(side):
            place = index * (count - 1) / (side - 1) if align_corners else (index + 0.5) * count / side - 0.5
            place = min(max(place, 0), count - 1)
            first = min(int(place), count - 2)
            low, high = np.take(table, first, axis), np.take(table, first + 1, axis)
            rows.append(low + (place - first) * (high - low))
        table = np.stack(rows, axis)
    return table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "grid"), [("base", (32, 64)), ("base", (5, 3)), ("base", (32, 32)), ("large", (5, 3)), ("large", (16, 24))]
)
def test_radio_crops_its_positions_from_a_square_of_the_longer_side(size, grid):
    """Of an all-zero image the patches are their positions, which the blocks then see."""
    model = timm.create_model(f"naflexvit_{size}_patch16_radio_v3", depth=1)
    y, x = torch.meshgrid(torch.linspace(0, 3, 128), torch.linspace(0, 2, 128), indexing="ij")
    phase = torch.rand(3, model.embed_dim, generator=torch.Generator().manual_seed(0)) * 6
    with torch.no_grad():
        model.embeds.pos_embed[0] = torch.sin(y[..., None] * phase[0] + x[..., None] * phase[1] + phase[2])
        model.embeds.proj.bias.zero_()
    backbone, seen = TimmViT("radio", model), []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = backbone(torch.zeros(1, 3, 16 * grid[0], 16 * grid[1])).features
    handle.remove()
    assert features.shape[2:] == grid
    table = model.embeds.pos_embed[0].double().numpy()
    expected = resized_to_square(table, max(grid), align_corners=size == "base")[: grid[0], : grid[1]]
    positions = seen[0][0, 8:].unflatten(0, grid).double().numpy()
    np.testing.assert_allclose(positions, expected, atol=1e-5)
    if grid[0] != grid[1]:
        stretched = F.interpolate(model.embeds.pos_embed.permute(0, 3, 1, 2), grid, mode="bilinear")[0]
        assert np.abs(positions - stretched.permute(1, 2, 0).numpy()).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dinov3", "eva02", "radio"])
def test_half_precision(name, dtype):
    exact = TimmViT(name, build(name))
    images = images_for(exact)
    half = TimmViT(name, build(name)).to(dtype)(images.to(dtype))
    assert half.features.dtype == dtype
    for one, other in zip(half, exact(images), strict=True):
        assert F.cosine_similarity(one.float(), other).min() > 0.99


def test_hybrids_have_the_stride_of_their_network():
    backbone = create_backbone("timm:vit_tiny_r_s16_p8_224?pretrained=false&img_size=64")
    assert (backbone.patch_size, backbone.embed_dim, backbone.input_size) == (32, 192, (64, 64))
    assert not backbone.embeds_patches
    images = torch.randn(1, 3, 64, 96)
    out = backbone(images)
    assert out.features.shape == (1, 192, 2, 3)
    assert torch.equal(tokens_of(out.features), backbone.model.forward_features(images)[:, 1:])
    model = timm.create_model("vit_base_r26_s32_224", depth=1, num_classes=0, dynamic_img_size=True)
    assert TimmViT("r26", model)(torch.zeros(1, 3, 32, 64)).features.shape == (1, 768, 1, 2)
    assert TimmViT("r26", model).input_size == (224, 224)


def test_registers_are_skipped_and_the_class_token_is_the_summary():
    model = tiny(reg_tokens=4, dynamic_img_size=True)
    out = TimmViT("mine", model)(images := torch.randn(1, 3, 48, 80))
    tokens = model.forward_features(images)
    assert tokens.shape[1] == 5 + 15
    torch.testing.assert_close(out.features[0, :, 1, 2], tokens[0, 5 + 5 + 2])
    torch.testing.assert_close(out.summary, tokens[:, 0])


class NoResampling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.interpolate:
            raise AssertionError("resampled at the native size")
        return function(*args, **(kwargs or {}))


def test_native_size_is_whole_patches_and_uses_the_stored_embedding():
    model = tiny(img_size=100, dynamic_img_size=True)  # 6 whole patches of 16
    backbone = TimmViT("mine", model)
    assert backbone.input_size == (96, 96)

    with NoResampling():
        backbone(torch.zeros(1, 3, 96, 96))
    with pytest.raises(AssertionError, match="resampled"), NoResampling():
        backbone(torch.zeros(1, 3, 96, 112))


def test_fixed_models_are_known_as_such():
    assert not TimmViT("mine", tiny()).flexible
    with pytest.raises(InputError, match="takes a fixed size; got 64x48, the nearest is 64x64"):
        TimmViT("beit", build("beit"))(torch.zeros(1, 3, 64, 48))


# Summaries


def test_without_class_token_the_summary_is_the_models_pool():
    model = tiny(class_token=False, global_pool="map", dynamic_img_size=True)
    backbone = TimmViT("mine", model)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(backbone(images).summary, model.attn_pool(model.forward_features(images)))
    with pytest.raises(ConfigError, match="no summary 'cls'; it has pool, mean, none"):
        TimmViT("mine", model, Options(summary="cls"))
    silent = TimmViT("mine", tiny(class_token=False, global_pool="", dynamic_img_size=True))
    assert silent.summary_dim is None
    assert silent(images).summary is None


@pytest.mark.parametrize("layers", [None, (0,)])
def test_summaries_by_name(layers):
    model = tiny(global_pool="avg", dynamic_img_size=True)
    images = torch.randn(2, 3, 32, 48)
    tokens = model.forward_features(images)

    def summary(kind: str) -> Tensor | None:
        backbone = TimmViT("mine", model, Options(summary=kind, layer=layers))
        out = backbone(images)
        assert backbone.summary_dim == (None if out.summary is None else out.summary.shape[1])
        if kind == "mean":
            torch.testing.assert_close(out.summary, out.features.flatten(2).sum(2) / 6)
        return out.summary

    assert torch.equal(summary("default"), summary("pool"))
    assert torch.equal(summary("cls"), tokens[:, 0])
    torch.testing.assert_close(summary("pool"), model.fc_norm(tokens[:, 1:].mean(1)))
    assert summary("mean").shape == (2, 192)
    assert summary("none") is None


def test_a_layer_without_summary_ends_there():
    model = tiny(dynamic_img_size=True)
    ran = []
    model.blocks[1].register_forward_hook(lambda *given: ran.append(1))
    images = torch.randn(1, 3, 32, 32)
    for facet in ("token", "key"):
        TimmViT("mine", model, Options(layer=(0,), facet=facet, summary="none"))(images)
    assert not ran
    TimmViT("mine", model, Options(layer=(0,), facet="key"))(images)
    assert ran


# SAM


def sam(**arguments):
    torch.manual_seed(0)
    model = timm.create_model("samvit_base_patch16.sa1b", depth=3, num_classes=0, global_attn_indexes=[2], **arguments)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "rel_pos" in key or "pos_embed" in key or "bias" in key:
                value.normal_(std=0.2)
    return model.eval()


def trunk(model, images: Tensor) -> list[Tensor]:
    """Outputs of the blocks [B, h, w, C], by the steps of the model."""
    tokens = model.patch_embed(images)
    tokens = tokens + model.pos_embed
    outputs = []
    for block in model.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    return outputs


def test_sam_gives_its_trunk():
    model = sam(img_size=(240, 320))
    backbone = TimmSAM("sam", model)
    assert (backbone.patch_size, backbone.embed_dim, backbone.input_size) == (16, 768, (240, 320))
    assert (backbone.mean, backbone.std) == IMAGENET
    assert backbone.summary_dim is None
    assert not backbone.flexible
    images = torch.randn(1, 3, 240, 320)
    features, summary = backbone(images)
    outputs = trunk(model, images)
    assert torch.equal(features, outputs[2].permute(0, 3, 1, 2))
    assert summary is None
    both = TimmSAM("sam", model, Options(layer=(2, 0), summary="mean"))(images)
    assert torch.equal(both.features, torch.cat([outputs[2], outputs[0]], 3).permute(0, 3, 1, 2))
    torch.testing.assert_close(both.summary, both.features.flatten(2).mean(2))
    with pytest.raises(InputError, match="takes a fixed size; got 240x240, the nearest is 240x320"):
        backbone(torch.zeros(1, 3, 240, 240))


@pytest.mark.parametrize("layer", [1, 2])
def test_facets_of_sam_are_whole_maps_with_and_without_windows(layer):
    model = sam(img_size=(240, 320), embed_dim=96, num_heads=4)  # 15x20 tokens: windows of 14 are padded
    images = torch.randn(1, 3, 240, 320)
    normalised = model.blocks[layer].norm1(trunk(model, images)[layer - 1])
    expected = model.blocks[layer].attn.qkv(normalised).chunk(3, -1)
    for facet, own in zip(("query", "key", "value"), expected, strict=True):
        features = TimmSAM("sam", model, Options(layer=(layer,), facet=facet))(images).features
        torch.testing.assert_close(features, own.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)


def test_sam_by_name_is_native_at_1024_and_resamples_for_another_size(tmp_path):
    model = sam()
    assert TimmSAM("sam", model).input_size == (1024, 1024)
    timm.models.save_for_hf(model, tmp_path / "sam", safe_serialization=True)
    backbone = create_backbone(f"timm:{tmp_path / 'sam'}?img_size=160x96")
    assert isinstance(backbone, TimmSAM)
    assert backbone.input_size == (160, 96)
    images = torch.randn(1, 3, 160, 96)
    (expected,) = model.forward_intermediates(images, indices=[2], intermediates_only=True)
    assert torch.equal(backbone(images).features, expected)
    with pytest.raises(ConfigError, match="no summary 'cls'; it has mean, none"):
        create_backbone(f"timm:{tmp_path / 'sam'}?summary=cls")


# Maps


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["convnext_atto", "resnet18", "test_efficientnet", "test_mambaout", "caformer_s18", "hieradet_small"]
)
def test_networks_give_their_last_stage(name):
    backbone = create_backbone(f"timm:{name}?pretrained=false")
    assert isinstance(backbone, TimmStages)
    last = backbone.model.feature_info[-1]
    assert (backbone.patch_size, backbone.embed_dim) == (last["reduction"], last["num_chs"])
    assert backbone.flexible
    images = torch.randn(2, 3, 64, 96)
    features, summary = backbone(images)
    assert features.shape == (2, backbone.embed_dim, 2, 3)
    assert summary.shape == (2, backbone.summary_dim)
    assert torch.equal(summary, backbone.model.forward_head(backbone.model.forward_features(images), pre_logits=True))
    if name in ("convnext_atto", "resnet18"):
        assert torch.equal(features, backbone.model.forward_features(images))


def test_facts_of_networks():
    backbone = create_backbone("timm:resnet18?pretrained=false")
    assert (backbone.patch_size, backbone.embed_dim, backbone.input_size) == (32, 512, (224, 224))
    assert (backbone.mean, backbone.std) == IMAGENET
    assert backbone.summary_dim == 512
    sized = create_backbone("timm:resnet18?pretrained=false&img_size=96x160&layer=2")
    assert (sized.patch_size, sized.embed_dim, sized.input_size) == (8, 128, (96, 160))


def test_a_stage_is_that_of_the_network():
    backbone = create_backbone("timm:convnext_atto?pretrained=false&layer=1&summary=none")
    images = torch.randn(1, 3, 72, 40)  # whole tokens of this stage, not of the last one
    model = backbone.model
    expected = model.stages[1](model.stages[0](model.stem(images)))
    assert torch.equal(backbone(images).features, expected)
    resnet = create_backbone("timm:resnet18?pretrained=false&layer=-2&summary=mean")
    assert resnet.patch_size == 16
    features, summary = resnet(images := torch.randn(1, 3, 48, 64))
    model = resnet.model
    stem = model.maxpool(model.act1(model.bn1(model.conv1(images))))
    assert torch.equal(features, model.layer3(model.layer2(model.layer1(stem))))
    torch.testing.assert_close(summary, features.flatten(2).mean(2))


@pytest.mark.parametrize(
    ("name", "layer", "shift"), [("convnext_atto", 1, 0.0), ("resnet18", 1, 1.5), ("resnet18", 2, 3.5)]
)
def test_where_a_token_looks(name, layer, shift):
    """Centroid of the gradient with all weights alike and positive, against the centre of the token's pixels."""
    backbone = create_backbone(f"timm:{name}?pretrained=false&layer={layer}&summary=none").double()
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.fill_(1 / module.weight[0].numel())
                if module.bias is not None:
                    module.bias.zero_()
        for parent in list(backbone.modules()):
            for child, module in list(parent.named_children()):
                if isinstance(module, torch.nn.MaxPool2d):  # where all is alike it takes the first
                    setattr(parent, child, torch.nn.AvgPool2d(module.kernel_size, module.stride, module.padding))
                elif type(module).__name__ in ("LayerNorm2d", "ConvNeXtBlock"):  # the one takes the mean away
                    setattr(parent, child, torch.nn.Identity())
    p = backbone.patch_size
    images = torch.ones(1, 3, 20 * p, 20 * p, dtype=torch.float64, requires_grad=True)
    backbone(images).features[0, :, 9, 11].sum().backward()
    weights = images.grad.sum((0, 1)).abs()
    centres = torch.arange(20 * p) + 0.5
    y, x = ((weights.sum(axis) * centres).sum() / weights.sum() for axis in (1, 0))
    assert float(y) == pytest.approx(9.5 * p - shift, abs=1e-6)
    assert float(x) == pytest.approx(11.5 * p - shift, abs=1e-6)
    assert shift == (0 if name == "convnext_atto" else (p - 1) / 2)


def test_hierarchical_transformers_and_mixers_are_fixed_maps():
    arguments = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "img_size": 56, "num_classes": 0}
    model = timm.create_model("swin_tiny_patch4_window7_224", **arguments)
    backbone = TimmStages("swin", model, Options(img_size=(56, 56)))
    assert not backbone.flexible
    features, summary = backbone(images := torch.randn(1, 3, 56, 56))
    assert torch.equal(features, model.forward_features(images).permute(0, 3, 1, 2))
    assert torch.equal(summary, model(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("layer=5", "has 5 blocks, 0 to 4; got layer=5"),
        ("layer=1,2", "have different strides .* name one layer"),
        ("facet=key", "without attention: it has no key"),
        ("summary=cls", "no summary 'cls'; it has pool, mean, none"),
        ("img_size=100", "whole patches of 32; got img_size=100x100, the nearest is 96x96"),
    ],
)
def test_what_networks_have_not(options, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"timm:resnet18?pretrained=false&{options}")


def test_a_map_that_is_not_the_image_over_its_stride_is_refused():
    with pytest.raises(ConfigError, match=r"makes \(1, 2048, .*not the image over its stride, 32"):
        create_backbone("timm:inception_v3?pretrained=false&img_size=320")


# Files


def save(model, folder: Path) -> Path:
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2 registers", "dinov3", "siglip2", "beit", "deit distilled"])
def test_a_directory_of_timm_is_a_backbone(name, tmp_path):
    model = build(name)
    folder = save(model, tmp_path / "saved")
    backbone = create_backbone(f"timm:{folder}")
    expected = TimmViT("mine", model)
    assert (backbone.mean, backbone.std, backbone.input_size) == (expected.mean, expected.std, expected.input_size)
    assert backbone.weights_hash() == expected.weights_hash()
    images = images_for(expected)
    assert torch.equal(backbone(images).features, expected(images).features)
    assert torch.equal(create_backbone(f"timm:local-dir:{folder}")(images).features, expected(images).features)


def test_the_home_directory_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder = save(timm.create_model("test_vit", num_classes=0), tmp_path / "saved")
    expected = create_backbone(f"timm:{folder}").weights_hash()
    for name in ("~/saved", "local-dir:~/saved", "test_vit?weights=~/saved/model.safetensors"):
        assert create_backbone(f"timm:{name}").weights_hash() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, r"config\.json has pretrained_cfg=5; it has to be a mapping"),
        ({"mean": "x"}, "pretrained_cfg of timm model .*: option mean is a number or three with commas, .* got 'x'"),
        ({"mean": [0.5, 0.5]}, r"option mean is a number or three .* got .0\.5, 0\.5."),
        ({"mean": [0.5, 0.5, float("nan")]}, "option mean is a number or three with commas, finite"),
        ({"std": [0.5, 0, 0.5]}, "option std .* above 0.* or give option std"),
    ],
)
def test_configurations_with_whitening_that_is_none(content, message, tmp_path):
    folder = save(timm.create_model("test_vit", num_classes=0), tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] = config["pretrained_cfg"] | content if isinstance(content, dict) else content
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"timm:{folder}")
    if isinstance(content, dict):
        option = next(iter(content))
        assert getattr(create_backbone(f"timm:{folder}?{option}=0.1,0.2,0.3"), option) == (0.1, 0.2, 0.3)


def test_a_radio_by_name_and_from_its_own_weights(tmp_path):
    small = {"depth": 1, "embed_dim": 48, "num_heads": 2}
    model = timm.create_model("naflexvit_base_patch16_radio_v3", **small)
    folder = tmp_path / "saved"
    timm.models.save_for_hf(model, folder, model_args=small)
    backbone = create_backbone(f"timm:{folder}?img_size=64x96")
    assert isinstance(backbone, TimmViT)
    assert (backbone.input_size, backbone.flexible) == ((64, 96), True)
    images = torch.randn(1, 3, 96, 48)
    torch.testing.assert_close(tokens_of(backbone(images).features), model.eval().forward_features(images)[:, 8:])
    with pytest.raises(ConfigError, match="nearest is 64x96"):
        create_backbone(f"timm:{folder}?img_size=70x96")


def test_radio_as_its_authors_publish_it_is_converted(tmp_path):
    """One table of class tokens and registers, patches [C, 3 * p * p] without bias, a flat position table."""
    small = {"depth": 1, "embed_dim": 48, "num_heads": 2}
    model = timm.create_model("naflexvit_base_patch16_radio_v3", **small)
    timm.models.save_for_hf(model, tmp_path / "saved", model_args=small)
    torch.manual_seed(4)
    tokens, patches, table = torch.randn(8, 48), torch.randn(48, 3, 16, 16) / 28, torch.randn(1, 128**2, 48)
    own = {
        "patch_generator.cls_token.token": tokens,
        "patch_generator.embedder.weight": patches.flatten(1),
        "patch_generator.pos_embed": table,
    }
    blocks = {key: torch.randn_like(value) / 7 for key, value in model.state_dict().items() if key.startswith("blocks")}
    torch.save({f"radio_model.model.{key}": value for key, value in (own | blocks).items()}, tmp_path / "w.pth")
    backbone, seen = create_backbone(f"timm:{tmp_path / 'saved'}?weights={tmp_path / 'w.pth'}"), []
    images = torch.randn(1, 3, 2048, 16 * 3)  # as long as the table, so that nothing is resampled
    backbone.model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    backbone(images)
    assert torch.equal(seen[0][:8], tokens)
    expected = F.conv2d(images, patches, stride=16)[0].permute(1, 2, 0) + table.unflatten(1, (128, 128))[0, :, :3]
    torch.testing.assert_close(seen[0][8:], expected.flatten(0, 1), atol=1e-4, rtol=1e-4)


def test_a_network_from_a_directory(tmp_path):
    model = timm.create_model("test_resnet", num_classes=7).eval()
    backbone = create_backbone(f"timm:{save(model, tmp_path)}")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(backbone(images).features, model.forward_features(images))


def test_weights_from_a_file_or_a_directory_whatever_the_classifier(tmp_path):
    torch.manual_seed(3)
    model = timm.create_model("test_vit", num_classes=5).eval()
    folder = save(model, tmp_path / "saved")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "w.pth"
    )
    images = torch.randn(1, 3, 160, 160)
    tokens = model.forward_features(images)[:, 1:]
    for place in (folder, folder / "model.safetensors", tmp_path / "w.pth"):
        backbone = create_backbone(f"timm:test_vit?weights={place}")
        assert torch.equal(tokens_of(backbone(images).features), tokens)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    assert torch.equal(tokens_of(create_backbone(f"timm:test_vit?weights={folder}")(images).features), tokens)
    random = create_backbone("timm:test_vit?pretrained=false")
    assert not torch.allclose(tokens_of(random(images).features), tokens)


def test_weights_of_another_size_have_their_positions_resampled(tmp_path):
    model = tiny(dynamic_img_size=True)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    name = f"timm:{save(model, tmp_path / 'saved')}?img_size=96x64"
    backbone = create_backbone(name)
    assert backbone.input_size == (96, 64)
    images = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(tokens_of(backbone(images).features), model.eval().forward_features(images)[:, 1:])


def test_the_authors_own_format_is_converted(tmp_path):
    """DINOv2 as its authors publish it: a mask token, and layer scale and registers under other names."""
    model = build("dinov2 registers")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["mask_token"] = torch.zeros(1, 384)
    state["register_tokens"] = state.pop("reg_token")
    cls = state.pop("cls_token")
    state["cls_token"] = cls / 2
    state["pos_embed"] = torch.cat([cls / 2, state["pos_embed"]], 1)  # timm adds the first position to the token
    torch.save(state, tmp_path / "w.pth")
    folder = save(model, tmp_path / "saved")
    backbone = create_backbone(f"timm:{folder}?weights={tmp_path / 'w.pth'}")
    images = images_for(backbone)
    torch.testing.assert_close(backbone(images).features, TimmViT("mine", model)(images).features)


def test_checkpoints_that_do_not_fit(tmp_path):
    model = timm.create_model("test_vit", num_classes=0)
    state = model.state_dict()
    cases = {
        "short": {key: value for key, value in state.items() if "norm.bias" not in key and "qkv.bias" not in key},
        "long": state | {"adapter.weight": torch.zeros(2)},
        "wide": state | {"norm.weight": torch.zeros(65)},
        "other": timm.create_model("test_resnet", num_classes=0).state_dict(),
    }
    for name, content in cases.items():
        torch.save(content, tmp_path / f"{name}.pth")
    messages = {
        "short": r"missing blocks\.0\.attn\.qkv\.bias, .*and 2 more; not of this model none; name the model",
        "long": r"missing none; not of this model adapter\.weight",
        "wide": r"does not fit timm model 'test_vit': size mismatch for norm\.weight.*\[65\]",
        "other": r"missing cls_token, pos_embed, .* more; not of this model conv1\.0\.weight, .* more",
    }
    for name, message in messages.items():
        with pytest.raises(BackboneMismatchError, match=message):
            create_backbone(f"timm:test_vit?weights={tmp_path / name}.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors cannot be read as weights"):
        create_backbone(f"timm:test_vit?weights={tmp_path / 'broken.safetensors'}")
    torch.save({"run": Path}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="weights_only=True blocked"):
        create_backbone(f"timm:test_vit?weights={tmp_path / 'code.pth'}")


def test_places_without_weights(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file or directory 'nowhere\.pth'"):
        create_backbone("timm:test_vit?weights=nowhere.pth")
    with pytest.raises(ConfigError, match=r"needs one file of weights, .* it has none"):
        create_backbone(f"timm:test_vit?weights={tmp_path}")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        create_backbone(f"timm:{tmp_path}")
    with pytest.raises(ConfigError, match=r"there is no directory '\./models/mine'"):
        create_backbone("timm:./models/mine")
    with pytest.raises(ConfigError, match=r"pretrained=false takes random weights .* leave out it or weights"):
        create_backbone(f"timm:test_vit?pretrained=false&weights={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match=r"names no architecture of this timm \(None\); is it of another library"):
        create_backbone(f"timm:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        create_backbone(f"timm:{tmp_path}")
    save(timm.create_model("test_vit2"), tmp_path)
    with pytest.raises(BackboneMismatchError, match="holds a timm model 'test_vit2', not 'test_vit'"):
        create_backbone(f"timm:test_vit?weights={tmp_path}")


# Names and options


def test_image_size_option():
    backbone = create_backbone("timm:vit_tiny_patch16_224?pretrained=false&img_size=64x96")
    assert backbone.input_size == (64, 96)
    assert backbone(torch.zeros(1, 3, 64, 96)).features.shape == (1, 192, 4, 6)


def test_options_as_arguments_and_whitening_of_published_numbers():
    mean, std = IMAGENET
    backbone = create_backbone(
        "timm:vit_tiny_patch16_224", pretrained=False, layer=[2, -1], facet="key", summary="none", mean=mean, std=std
    )
    assert (backbone.mean, backbone.std) == IMAGENET
    assert (backbone.embed_dim, backbone.summary_dim) == (2 * 192, None)
    assert backbone.layers == [2, 11]


def test_random_weights_are_seeded_and_leave_the_global_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    hashes = {create_backbone("timm:test_vit?pretrained=false").weights_hash() for _ in range(2)}
    assert len(hashes) == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vit_tny_patch16_224", "unknown timm model 'vit_tny_patch16_224'; did you mean 'vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_224?pretraind=false", "did you mean 'pretrained'"),
        ("vit_tiny_patch16_224?pretrained", "key=value"),
        ("vit_tiny_patch16_224?pretrained=no", "true or false; got 'no'"),
        ("vit_tiny_patch16_224?pretrained=false&pretrained=true", "given twice"),
        ("vit_tiny_patch16_224?pretrained=false&img_size=0", "448x224; got '0'"),
        ("vit_tiny_patch16_224?pretrained=false&img_size=100", "patches of 16; got .*100x100, the nearest is 96x96"),
        ("vit_tiny_patch16_224?pretrained=false&img_size=8", "patches of 16; got img_size=8x8, the nearest is 16x16"),
        (
            "vit_tiny_patch16_224?pretrained=false&img_size=8x40",
            "patches of 16; got img_size=8x40, the nearest is 16x32",
        ),
        ("vit_tiny_patch16_224.nonsense", "Invalid pretrained tag.*nearest tags: augreg_in21k"),
        ("vit_tiny_patch16_224.augreg_in21", "nearest tags: augreg_in21k, "),
        ("", "timm: needs a name .* or a directory, such as timm:vit_small_patch16_224.dino"),
        ("?pretrained=false", "timm: needs a name"),
        ("vit_tiny_patch16_224?pretrained=false&project=true", "has no option 'project'; it has layer, facet, summary"),
        ("vit_tiny_patch16_224?pretrained=false&layer=12", "has 12 blocks, 0 to 11; got layer=12"),
        ("vit_tiny_patch16_224?pretrained=false&summary=projected", "no summary 'projected'; it has cls, pool"),
        ("vit_tiny_patch16_224?pretrained=false&mean=0.5,1", "three with commas.* got '0.5,1'"),
        ("vit_tiny_patch16_224?pretrained=false&mean=a,b,c", "three with commas.* got 'a,b,c'"),
        ("vit_tiny_patch16_224?pretrained=false&std=1,0,1", "std .* above 0, .* got '1,0,1'"),
        ("test_vit4", "No pretrained weights exist for test_vit4.*weights=FILE"),
    ],
)
def test_wrong_names_and_options(spec, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"timm:{spec}")


def test_blocks_without_a_projection_of_their_own_are_refused():
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(ConfigError, match="ParallelScalingBlock of timm has no linear key"):
        TimmViT("mine", tiny(block_fn=ParallelScalingBlock), Options(facet="key"))


def test_patches_that_are_not_square_are_refused():
    with pytest.raises(ConfigError, match="16x8 patches"):
        TimmViT("mine", tiny(patch_size=(16, 8)))


@pytest.mark.parametrize("spec", ["vit_tiny_patch16_224", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"])
def test_weights_that_cannot_be_had_say_what_to_do(spec):
    with pytest.raises(MissingDependencyError, match=r"vit_tiny_patch16_224.*cannot be fetched.*weights=FILE.*=false"):
        create_backbone(f"timm:{spec}")


# In use


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "layer=1,5&", "facet=key&"])
def test_the_adapter_costs_next_to_nothing(options):
    """Medians of interleaved runs, in time of the processor, which leaves out what else the machine does."""
    backbone = create_backbone(f"timm:vit_tiny_patch16_224?{options}pretrained=false&img_size=160")
    images = torch.randn(1, 3, 160, 160)
    times: dict[str, list[float]] = {"bare": [], "adapter": []}
    with torch.no_grad():
        for _ in range(9):
            for name, run in (("bare", backbone.model.forward_features), ("adapter", backbone)):
                start = time.process_time()
                run(images)
                times[name].append(time.process_time() - start)
    assert np.median(times["adapter"]) < 1.15 * np.median(times["bare"])


@pytest.mark.parametrize("name", ["test_vit", pytest.param("test_convnext", marks=pytest.mark.slow)])
def test_two_steps_of_training(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = save(timm.create_model(name, num_classes=0), tmp_path / "saved")
    (tmp_path / "photos").mkdir()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((200, 180), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{seed}.png")
    settings = [
        "+model=toy-vit",
        f"model.name='timm:{folder}'",
        "+upsampler=featsharp-2x",
        "train_data_dir=photos",
        "output_base=out",
        "batch_size=2",
        "num_workers=0",
        "num_training_steps=2",
        "normalizer.num_samples=8",
        "normalizer.batch_size=4",
        "viz.num_images=1",
        "viz.type=none",
        "progress=false",
    ]
    assert main(settings) == 0
    assert list(tmp_path.glob("out/**/last.pth"))
