"""open_clip models by name and from disk: every kind of tower against the library itself."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from featsharp.backbones import create_backbone
from featsharp.backbones.from_open_clip import TrunkTower, resample_positions
from featsharp.backbones.options import Options
from featsharp.builder import create_encoder
from featsharp.errors import CheckpointError, ConfigError, InputError, MissingDependencyError
from featsharp.train import main

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
# The real H/14 at 378 with DFN's activation, narrow and shallow.
TRANSFORMER = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 56, "layers": 3, "width": 64, "head_width": 16, "patch_size": 14},
    "text_cfg": TEXT,
}
RESNET = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": TEXT,
}
COCA = copy.deepcopy(TRANSFORMER)
COCA["vision_cfg"].update(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=6, output_tokens=True)
AVERAGED = copy.deepcopy(TRANSFORMER)
AVERAGED["vision_cfg"].update(pool_type="avg", final_ln_after_pool=True, no_ln_pre=True)
CUSTOM_BLOCKS = copy.deepcopy(TRANSFORMER)
CUSTOM_BLOCKS["vision_cfg"].update(qk_norm=True, ls_init_value=0.5)
CONVNEXT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear"},
    "text_cfg": TEXT,
}
SIGLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": TEXT,
}


def make(config: dict, **size) -> nn.Module:
    """The whole model as open_clip builds it, with text tower, initialised so that everything shows.

    Frozen, since attention of torch takes another path, with other rounding, where a gradient could be wanted.
    """
    torch.manual_seed(1)
    vision = {**copy.deepcopy(config["vision_cfg"]), **size}
    rest = {key: value for key, value in config.items() if key != "vision_cfg"}
    model = open_clip.CLIP(vision_cfg=vision, **rest).eval().requires_grad_(False)
    for name, weight in model.visual.named_parameters():
        if "norm" in name or "ln_" in name or "bn" in name or name.endswith("bias"):
            nn.init.uniform_(weight, 0.5, 1.5)
        elif "pos" in name:
            nn.init.normal_(weight, std=0.5)
    return model


def save(model: nn.Module, config: dict, folder: Path, **preprocess) -> str:
    """As ``push_to_hf_hub`` lays it out; returns the name of the backbone."""
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    default = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "size": 56}
    open_clip.set_model_preprocess_cfg(model, default | preprocess)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    save_config_for_hf(model, folder / "open_clip_config.json", config)
    return f"open_clip:{folder}"


def pictures(count: int, size: tuple[int, int]) -> Tensor:
    return F.interpolate(torch.randn(count, 3, 7, 9), size, mode="bicubic")


def embedding(model: nn.Module, images: Tensor) -> Tensor:
    out = model.visual(images)
    return out[0] if isinstance(out, tuple) else out


CASES = {
    "transformer": (TRANSFORMER, 14, 64, 48),
    "custom blocks": (CUSTOM_BLOCKS, 14, 64, 48),
    "averaged": (AVERAGED, 14, 64, 48),
    "coca": (COCA, 14, 64, 48),
    "resnet": (RESNET, 32, 256, 24),
    "convnext": (CONVNEXT, 32, 320, 24),
    "siglip": (SIGLIP, 16, 64, 64),
}


@pytest.fixture(params=list(CASES))
def case(request, tmp_path):
    config, patch_size, width, joint = CASES[request.param]
    model = make(config)
    backbone = create_backbone(save(model, config, tmp_path / "model"))
    return model, backbone, patch_size, width, joint


# Every tower


def test_facts_and_summary_are_the_models_own(case):
    model, backbone, patch_size, width, joint = case
    side = model.visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    assert (backbone.patch_size, backbone.embed_dim, backbone.summary_dim) == (patch_size, width, joint)
    assert backbone.input_size == (side, side)
    assert backbone.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert backbone.flexible
    images = pictures(2, (side, side))
    with torch.no_grad():
        out, wanted = backbone(images), embedding(model, images)
    assert torch.equal(out.summary, wanted)
    assert out.features.shape == (2, width, side // patch_size, side // patch_size)


def test_tokens_run_row_by_row(case):
    _, backbone, p, _, _ = case
    images = pictures(1, (6 * p, 9 * p)).repeat(2, 1, 1, 1)
    images[1, :, 3 * p : 4 * p, 7 * p : 8 * p] *= -2
    first, second = backbone(images).features
    row, column = divmod(int((first - second).norm(dim=0).argmax()), 9)
    assert max(abs(row - 3), abs(column - 7)) <= (0 if backbone.embeds_patches else 1)


def test_frozen_and_one_by_one(case):
    _, backbone, p, _, _ = case
    backbone.train()
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images = pictures(2, (3 * p, 5 * p)).requires_grad_()
    together, alone = backbone(images), backbone(images[1:])
    torch.testing.assert_close(together.features[1:], alone.features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.summary[1:], alone.summary, atol=1e-4, rtol=1e-4)
    together.features.square().mean().backward()
    assert images.grad.abs().sum() > 0


def test_half_types(case):
    _, backbone, p, _, _ = case
    images = pictures(2, (3 * p, 5 * p))
    exact = backbone(images).features
    for dtype in (torch.bfloat16, torch.float16):
        out = copy.deepcopy(backbone).to(dtype)(images.to(dtype))
        assert out.features.dtype == out.summary.dtype == dtype
        assert F.cosine_similarity(out.features.float(), exact).mean() > 0.99
    backbone.autocast_dtype = torch.bfloat16
    assert F.cosine_similarity(backbone(images).features, exact).mean() > 0.99


def test_random_weights_are_the_same_at_every_call(tmp_path):
    name = save(make(TRANSFORMER), TRANSFORMER, tmp_path / "model")
    state = torch.get_rng_state()
    first, second = (create_backbone(f"{name}?pretrained=false") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.weights_hash() == second.weights_hash() != create_backbone(name).weights_hash()


@pytest.mark.parametrize("kind", ["mean", "none"])
def test_summaries_of_every_tower(case, kind, tmp_path):
    _, backbone, p, _, _ = case
    images = pictures(2, (4 * p, 4 * p))
    chosen = create_backbone(backbone.name, summary=kind)
    features, summary = chosen(images)
    torch.testing.assert_close(features, backbone(images).features)
    if kind == "mean":
        torch.testing.assert_close(summary, features.flatten(2).mean(2))
        assert chosen.summary_dim == chosen.embed_dim
    else:
        assert summary is None
        assert chosen.summary_dim is None


# OpenAI's transformer


def by_hand(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What enters each block, and what leaves the last, without a line of ours."""
    visual = model.visual
    states = []
    hooks = [
        b.register_forward_pre_hook(lambda m, given: states.append(given[0])) for b in visual.transformer.resblocks
    ]
    visual.transformer.register_forward_hook(lambda m, given, out: states.append(out))
    visual(images)
    for hook in hooks:
        hook.remove()
    return states


def grid_of(tokens: Tensor) -> Tensor:
    """[B, 1 + 16, C] to [B, C, 4, 4]."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


def test_features_and_layers_are_those_of_the_library(tmp_path):
    model = make(TRANSFORMER)
    name = save(model, TRANSFORMER, tmp_path / "model")
    images = pictures(2, (56, 56))
    wanted = model.visual.forward_intermediates(images, indices=[0, 1, 2], normalize_intermediates=True)
    maps = wanted["image_intermediates"]
    assert torch.equal(create_backbone(name)(images).features, maps[2])
    several = create_backbone(name, layer=[2, 0])
    assert several.embed_dim == 128
    assert torch.equal(several(images).features, torch.cat([maps[2], maps[0]], 1))
    early = create_backbone(name, layer=-3, summary="none")
    ran = []
    early.visual.transformer.resblocks[1].register_forward_hook(lambda *given: ran.append(1))
    assert torch.equal(early(images).features, maps[0])
    assert not ran  # nothing asks for what the blocks behind would say
    with_summary = create_backbone(name, layer=0)(images)
    assert torch.equal(with_summary.features, maps[0])
    assert torch.equal(with_summary.summary, wanted["image_features"])


@pytest.mark.parametrize("config", [TRANSFORMER, CUSTOM_BLOCKS], ids=["packed", "custom"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_facets_against_the_projection(config, part, tmp_path):
    model = make(config)
    name = save(model, config, tmp_path / "model")
    images = pictures(2, (56, 56))
    facet = ("query", "key", "value")[part]
    for layer in (0, 2):
        block = model.visual.transformer.resblocks[layer]
        packed = block.ln_1(by_hand(model, images)[layer]) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        found = create_backbone(name, facet=facet, layer=layer)(images)
        torch.testing.assert_close(found.features, grid_of(packed[..., 64 * part : 64 * part + 64]))
        assert torch.equal(found.summary, embedding(model, images))


def test_text_aligned_patches(tmp_path):
    model = make(TRANSFORMER)
    name = save(model, TRANSFORMER, tmp_path / "model")
    visual, images = model.visual, pictures(2, (56, 56))
    states = by_hand(model, images)
    plain = create_backbone(name, project=True)
    assert plain.embed_dim == 48
    torch.testing.assert_close(plain(images).features, grid_of(visual.ln_post(states[3]) @ visual.proj))
    # MaskCLIP: what the last attention would give a patch that sees itself only.
    block = visual.transformer.resblocks[2]
    alone = block.ln_1(states[2]).flatten(0, 1)[:, None]
    value = block.attn(alone, alone, alone, need_weights=False)[0][:, 0].unflatten(0, (2, 17))
    found = create_backbone(name, project=True, facet="value")(images).features
    torch.testing.assert_close(found, grid_of(visual.ln_post(value) @ visual.proj))


def test_text_alignment_survives_upsampling(tmp_path):
    """Row B6: similarities to texts of the model itself, on sharpened features as on those of the backbone."""
    model = make(TRANSFORMER)
    name = save(model, TRANSFORMER, tmp_path / "model")
    images = pictures(2, (56, 56))
    text = model.encode_text(torch.randint(1, 50, (5, 8)), normalize=True)

    def similarity(features: Tensor) -> Tensor:
        return torch.einsum("bchw,tc->bthw", F.normalize(features, dim=1), text)

    with torch.no_grad():
        sharp = create_encoder(create_backbone(name, project=True), "bilinear", 2)(images)
        tokens = create_encoder(create_backbone(name), "bilinear", 2)(images).high_res
    # The head is linear, so the order of projecting and upsampling does not matter.
    projected = torch.einsum("bchw,cd->bdhw", tokens, model.visual.proj)
    torch.testing.assert_close(sharp.high_res, projected, atol=1e-4, rtol=1e-4)
    low, high = similarity(sharp.low_res), similarity(sharp.high_res)
    assert F.cosine_similarity(F.interpolate(low, (8, 8), mode="bilinear"), high).mean() > 0.99
    # Averaged back to the patches, the same text wins.
    assert (F.avg_pool2d(high, 2).argmax(1) == low.argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize("config", [TRANSFORMER, AVERAGED, COCA], ids=["class token", "averaged", "coca"])
def test_summaries_of_a_transformer(config, tmp_path):
    model = make(config)
    name = save(model, config, tmp_path / "model")
    images = pictures(2, (56, 56))
    last = by_hand(model, images)[-1]
    norm = model.visual.ln_post if config is not COCA else model.visual.attn_pool.ln_k
    cls = create_backbone(name, summary="cls")
    assert cls.summary_dim == 64
    torch.testing.assert_close(cls(images).summary, norm(last[:, 0]))
    pool, projected = (create_backbone(name, summary=kind) for kind in ("pool", "projected"))
    assert pool.summary_dim == (48 if config is COCA else 64)
    torch.testing.assert_close(pool(images).summary @ model.visual.proj, embedding(model, images))
    assert torch.equal(projected(images).summary, embedding(model, images))


@pytest.mark.parametrize("size", [(56, 84), (28, 98), (14, 14), (126, 70)])
def test_other_sizes_are_what_the_library_makes_of_a_checkpoint(size, tmp_path):
    """open_clip resamples the table of a checkpoint for a tower of another size: the same rule, at every call."""
    model = make(TRANSFORMER)
    name = save(model, TRANSFORMER, tmp_path / "model")
    other = make(TRANSFORMER, image_size=size)
    open_clip.load_checkpoint(other, str(tmp_path / "model" / "open_clip_model.safetensors"))
    images = pictures(2, size)
    backbone = create_backbone(name)
    table = backbone.visual.positional_embedding.clone()
    out = backbone(images)
    wanted = other.visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
    torch.testing.assert_close(out.features, wanted["image_intermediates"][0])
    torch.testing.assert_close(out.summary, wanted["image_features"])
    assert torch.equal(backbone.visual.positional_embedding, table)


def test_positions_against_a_loop():
    """Enlarged along one axis: the cubic convolution of Keys with a = -0.5, centres at halves, clamped by weights."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    table = torch.randn(1 + 4, 3)
    found = resample_positions(table, (1, 4), (1, 7))
    assert torch.equal(found[0], table[0])
    for target in range(7):
        centre = (target + 0.5) * 4 / 7
        weights = [kernel(source + 0.5 - centre) for source in range(4)]
        wanted = sum(w * row for w, row in zip(weights, table[1:], strict=True)) / sum(weights)
        torch.testing.assert_close(found[1 + target], wanted, atol=1e-5, rtol=1e-5)
    assert resample_positions(table, (2, 2), (2, 2)) is table


def test_patches_can_overlap(tmp_path):
    model = make(TRANSFORMER)
    backbone = create_backbone(save(model, TRANSFORMER, tmp_path / "model"))
    features = backbone.with_patch_stride(7)(pictures(1, (56, 70))).features
    assert features.shape == (1, 64, 7, 9)


def test_full_width_of_the_dfn_model(tmp_path):
    """ViT-H/14 at 378 with its 1280 channels, two blocks deep; no weights."""
    config = open_clip.get_model_config("ViT-H-14-378-quickgelu")
    config["vision_cfg"]["layers"] = 2
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    backbone = create_backbone(f"open_clip:{tmp_path}?pretrained=false")
    assert (backbone.patch_size, backbone.embed_dim, backbone.summary_dim) == (14, 1280, 1024)
    assert backbone.input_size == (378, 378)
    assert backbone.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    out = backbone(pictures(1, (140, 196)))
    assert out.features.shape == (1, 1280, 10, 14)


# OpenAI's ResNet


def stages_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    return model.visual.forward_intermediates(images)["image_intermediates"][1:]


def test_stages_of_a_resnet(tmp_path):
    model = make(RESNET)
    name = save(model, RESNET, tmp_path / "model")
    images = pictures(2, (96, 160))
    with torch.no_grad():
        maps = model.visual.layer1(model.visual.stem(images))
    assert torch.equal(create_backbone(name, layer=0)(images).features, maps)
    images = pictures(2, (64, 64))
    maps = stages_of(model, images)
    assert torch.equal(create_backbone(name)(images).features, maps[3])
    for layer, stride in enumerate((4, 8, 16, 32)):
        backbone = create_backbone(name, layer=layer)
        assert (backbone.patch_size, backbone.embed_dim) == (stride, 32 * 2**layer)
        out = backbone(images)
        assert torch.equal(out.features, maps[layer])
        assert torch.equal(out.summary, embedding(model, images))
    with pytest.raises(InputError, match="nearest is 64x64"):
        create_backbone(name, layer=0)(pictures(1, (60, 64)))


def test_resnet_projects_places_through_the_value_path_of_its_pool(tmp_path):
    model = make(RESNET)
    name = save(model, RESNET, tmp_path / "model")
    images = pictures(2, (96, 64))
    pool = model.visual.attnpool
    with torch.no_grad():
        plain = create_backbone(name)(images).features
        found = create_backbone(name, project=True)(images).features
    assert found.shape == (2, 24, 3, 2)
    # Attention over one token gives its value, whatever the query.
    torch.testing.assert_close(found[1, :, 2, 1], pool.c_proj(pool.v_proj(plain[1, :, 2, 1])))


def test_resnet_pools_at_other_sizes_with_resampled_positions(tmp_path):
    model = make(RESNET)
    backbone = create_backbone(save(model, RESNET, tmp_path / "model"))
    images = pictures(2, (96, 160))
    resized = copy.deepcopy(model.visual)
    grid = resized.attnpool.positional_embedding[1:].T.unflatten(1, (2, 2))[None]
    grid = F.interpolate(grid, (3, 5), mode="bicubic", antialias=True)[0].flatten(1).T
    table = torch.cat([resized.attnpool.positional_embedding[:1], grid])
    resized.attnpool.positional_embedding = nn.Parameter(table)
    torch.testing.assert_close(backbone(images).summary, resized(images))


# Trunks of timm


@pytest.mark.slow
def test_siglip_at_full_width_takes_378_pixels_and_others():
    """SO400M/14 at 384: 27 whole patches, one block deep. Built by the two libraries, put together here."""
    visual = open_clip.timm_model.TimmModel("test_vit", embed_dim=1152, image_size=384, pool="map", proj="none")
    visual.trunk = timm.create_model(
        "vit_so400m_patch14_siglip_384", depth=1, num_classes=0, global_pool="map", dynamic_img_size=True
    )
    whitening = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    backbone = TrunkTower("siglip", visual.eval(), Options(), **whitening, joint_dim=1152)
    assert (backbone.patch_size, backbone.embed_dim, backbone.summary_dim) == (14, 1152, 1152)
    assert backbone.input_size == (378, 378)
    images = pictures(1, (378, 378))
    out = backbone(images)
    tokens = visual.trunk.forward_features(images)
    assert torch.equal(out.features, tokens.transpose(1, 2).unflatten(2, (27, 27)))
    assert torch.equal(out.summary, visual.trunk.attn_pool(tokens))
    assert backbone(pictures(1, (28, 70))).features.shape == (1, 1152, 2, 5)


def test_trunk_at_other_sizes_is_timms_own(tmp_path):
    model = make(SIGLIP)
    backbone = create_backbone(save(model, SIGLIP, tmp_path / "model"))
    dynamic = timm.create_model("test_vit", num_classes=0, global_pool="map", dynamic_img_size=True).eval()
    dynamic.requires_grad_(False)  # as the backbone is; torch 2.4 rounds otherwise
    dynamic.load_state_dict(model.visual.trunk.state_dict())
    images = pictures(2, (48, 112))
    tokens = dynamic.forward_features(images)
    out = backbone(images)
    prefix = dynamic.num_prefix_tokens
    assert torch.equal(out.features, tokens[:, prefix:].transpose(1, 2).unflatten(2, (3, 7)))
    assert torch.equal(out.summary, dynamic.forward_head(tokens))


def test_layers_and_facets_of_a_trunk(tmp_path):
    model = make(SIGLIP)
    name = save(model, SIGLIP, tmp_path / "model")
    trunk = model.visual.trunk
    images = pictures(2, trunk.patch_embed.img_size)
    _, maps = trunk.forward_intermediates(images, indices=[0, 2], norm=True)
    found = create_backbone(name, layer=[2, 0, 2])(images)
    assert torch.equal(found.features, torch.cat([maps[1], maps[0], maps[1]], 1))
    assert torch.equal(found.summary, embedding(model, images))
    outputs = []
    trunk.blocks[1].attn.qkv.register_forward_hook(lambda module, given, out: outputs.append(out))
    trunk.forward_features(images)
    prefix, grid = trunk.num_prefix_tokens, trunk.patch_embed.grid_size
    for part, facet in enumerate(("query", "key", "value")):
        wanted = outputs[0][:, prefix:, 64 * part : 64 * part + 64].transpose(1, 2).unflatten(2, grid)
        assert torch.equal(create_backbone(name, layer=1, facet=facet)(images).features, wanted)


def test_facets_of_attention_with_projections_of_its_own():
    """EVA-02: q_proj, k_proj, v_proj."""
    visual = open_clip.timm_model.TimmModel("test_vit", embed_dim=64, image_size=64, pool="token", proj=None)
    visual.trunk = timm.create_model(
        "eva02_tiny_patch14_224", depth=2, num_classes=64, img_size=56, dynamic_img_size=True, qkv_fused=False
    )
    images, outputs = pictures(2, (56, 70)), []
    arguments = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "joint_dim": 64}
    backbone = TrunkTower("eva", visual.eval(), Options(layer=(0, 1), facet="key"), **arguments)
    for block in visual.trunk.blocks:
        block.attn.k_proj.register_forward_hook(lambda module, given, out: outputs.append(out))
    found = backbone(images).features
    wanted = torch.cat(outputs, -1)[:, 1:].transpose(1, 2).unflatten(2, (4, 5))
    assert torch.equal(found, wanted)
    visual.trunk.blocks[0].attn = timm.create_model("eva02_tiny_patch14_224", depth=1, qkv_fused=True).blocks[0].attn
    if visual.trunk.blocks[0].attn.q_bias is not None:
        with pytest.raises(ConfigError, match="does not show its key"):
            TrunkTower("eva", visual, Options(layer=(0,), facet="key"), **arguments)


def test_trunk_projects_each_patch_alone(tmp_path):
    """Against the head of the model on sequences of one token, and the softmax of one written out."""
    model = make(SIGLIP)
    name = save(model, SIGLIP, tmp_path / "model")
    images = pictures(2, (32, 48))
    with torch.no_grad():
        plain, found = (create_backbone(name, project=flag)(images).features for flag in (False, True))
        pool = model.visual.trunk.attn_pool
        token = plain[1, :, 1, 2]
        value = pool.kv(token)[64:]
        wanted = pool.proj(value)
        wanted = wanted + pool.mlp(pool.norm(wanted))
    torch.testing.assert_close(found[1, :, 1, 2], wanted, atol=1e-5, rtol=1e-4)


def test_convnext_projects_each_place_alone(tmp_path):
    model = make(CONVNEXT)
    name = save(model, CONVNEXT, tmp_path / "model")
    images = pictures(2, (64, 96))
    with torch.no_grad():
        plain, found = (create_backbone(name, project=flag)(images).features for flag in (False, True))
        wanted = model.visual.head(model.visual.trunk.head.norm(plain[1:, :, 1:2, 2:3]).flatten(1))
    torch.testing.assert_close(found[1, :, 1, 2], wanted[0], atol=1e-5, rtol=1e-4)


def test_stages_of_a_convolutional_trunk(tmp_path):
    model = make(CONVNEXT)
    name = save(model, CONVNEXT, tmp_path / "model")
    images = pictures(2, (64, 96))
    maps = model.visual.trunk.forward_intermediates(images, intermediates_only=True)
    for layer, stride in enumerate((4, 8, 16, 32)):
        backbone = create_backbone(name, layer=layer)
        assert (backbone.patch_size, backbone.embed_dim) == (stride, maps[layer].shape[1])
        assert torch.equal(backbone(images).features, maps[layer])
    assert torch.equal(create_backbone(name)(images).features, maps[3])


@pytest.mark.parametrize(
    ("model", "size", "features", "summary_dim"),
    [
        ("PE-Core-T-16-384", (32, 80), (192, 2, 5), 512),  # rotary and absolute positions, attention pool, class token
        ("MobileCLIP-S1", (64, 96), (1024, 2, 3), 512),  # a convolution after the last stage
        # Channels last.
        pytest.param("swin_base_patch4_window7_224", (224, 256), (1024, 7, 8), 640, marks=pytest.mark.slow),
    ],
)
def test_real_models_by_name(model, size, features, summary_dim):
    backbone = create_backbone(f"open_clip:{model}?pretrained=false")
    out = backbone(pictures(1, size))
    assert out.features.shape == (1, *features)
    assert backbone.embed_dim == features[0]
    assert out.summary.shape == (1, summary_dim)


def test_a_trunk_with_relative_positions_takes_its_own_size_only():
    visual = open_clip.timm_model.TimmModel("test_vit", embed_dim=32, image_size=64, pool="", proj="linear")
    visual.trunk = timm.create_model("vit_relpos_small_patch16_224", depth=1, img_size=64, num_classes=0)
    visual.head = nn.Linear(visual.trunk.num_features, 32)
    backbone = TrunkTower("relpos", visual.eval(), Options(), mean=(0.5,) * 3, std=(0.5,) * 3, joint_dim=32)
    assert not backbone.flexible
    assert backbone(pictures(1, (64, 64))).summary.shape == (1, 32)
    with pytest.raises(InputError, match="a fixed size"):
        backbone(pictures(1, (64, 80)))


# Names, weights and what goes wrong


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_by_its_file_and_an_architecture_by_its_name(suffix, tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-14", TRANSFORMER)
    model = make(TRANSFORMER)
    folder = save(model, TRANSFORMER, tmp_path / "model").removeprefix("open_clip:")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":  # as the training script of open_clip leaves it
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    else:
        path = Path(folder) / "open_clip_model.safetensors"
    backbone = create_backbone(f"open_clip:Tiny-14?weights={path}")
    images = pictures(1, (56, 56))
    # The architecture says quick_gelu.
    assert torch.equal(backbone(images).summary, model.visual(images))
    assert create_backbone(f"open_clip:Tiny-14?weights={folder}").weights_hash() == backbone.weights_hash()


def test_the_activation_is_that_of_the_tag(tmp_path, monkeypatch):
    """open_clip warns that ViT-B-32 and its tag openai differ, and runs the wrong one."""
    plain = {**TRANSFORMER, "quick_gelu": False}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", plain)
    model = make(TRANSFORMER)
    save(model, TRANSFORMER, tmp_path / "model")
    backbone = create_backbone(f"open_clip:ViT-B-32/openai?weights={tmp_path / 'model'}")
    images = pictures(1, (56, 56))
    assert torch.equal(backbone(images).summary, model.visual(images))


def test_a_checkpoint_of_another_grid_is_resampled_as_the_library_does(tmp_path):
    name = save(make(TRANSFORMER, image_size=84), TRANSFORMER, tmp_path / "model")
    theirs = make(TRANSFORMER)
    open_clip.load_checkpoint(theirs, str(tmp_path / "model" / "open_clip_model.safetensors"))
    images = pictures(1, (56, 56))
    assert torch.equal(create_backbone(name)(images).summary, theirs.visual(images))


def test_whitening_of_directory_tag_and_architecture(tmp_path):
    name = save(make(TRANSFORMER), TRANSFORMER, tmp_path / "model", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    backbone = create_backbone(name)
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    kept = open_clip.get_model_preprocess_cfg(open_clip.create_model(f"local-dir:{tmp_path / 'model'}"))
    assert (tuple(kept["mean"]), tuple(kept["std"])) == (backbone.mean, backbone.std)
    from featsharp.backbones.from_open_clip import _from_list

    def mean_of(spec: str) -> tuple:
        return tuple(_from_list(open_clip, spec, Options(pretrained=False)).preprocess.get("mean", ()))

    assert mean_of("ViT-SO400M-14-SigLIP-384/webli") == mean_of("ViT-SO400M-14-SigLIP-384") == (0.5, 0.5, 0.5)
    assert mean_of("ViT-L-14/laion2b_s32b_b82k") != mean_of("ViT-L-14/openai") == open_clip.OPENAI_DATASET_MEAN
    assert mean_of("ViT-L-14") == ()  # its tags do not agree


def test_another_native_size(tmp_path):
    name = save(make(TRANSFORMER), TRANSFORMER, tmp_path / "model")
    backbone = create_backbone(name, img_size="84x112")
    assert backbone.input_size == (84, 112)
    images = pictures(1, (84, 112))
    assert torch.equal(backbone(images).features, create_backbone(name)(images).features)
    with pytest.raises(ConfigError, match="whole patches of 14; got img_size=100x100, the nearest is 98x98"):
        create_backbone(name, img_size=100)


def test_no_network():
    with pytest.raises(
        MissingDependencyError,
        match=r"ViT-B-32/laion2b_s34b_b79k.*create_model\('ViT-B-32', pretrained='laion2b_s34b_b79k'\).*weights=FILE",
    ):
        create_backbone("open_clip:ViT-B-32/laion2b_s34b_b79k")
    with pytest.raises(MissingDependencyError, match=r"create_model\('hf-hub:someone/clip'\)"):
        create_backbone("open_clip:hf-hub:someone/clip")


def test_a_repository_in_the_local_cache():
    hub = pytest.importorskip("huggingface_hub")
    repository = Path(hub.constants.HF_HUB_CACHE) / "models--someone--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    model = make(TRANSFORMER)
    save(model, TRANSFORMER, repository / "snapshots" / ("0" * 40), mean=(0.5, 0.5, 0.5))
    backbone = create_backbone("open_clip:hf-hub:someone/cached")
    assert backbone.mean == (0.5, 0.5, 0.5)
    images = pictures(1, (56, 56))
    assert torch.equal(backbone(images).summary, model.visual(images))


def test_wrong_checkpoints(tmp_path):
    other = copy.deepcopy(TRANSFORMER)
    other["vision_cfg"]["layers"] = 2
    name = save(make(TRANSFORMER), other, tmp_path / "deeper")
    with pytest.raises(CheckpointError, match=r"has unknown transformer.resblocks.2.*and 7 more"):
        create_backbone(name)
    other["vision_cfg"].update(layers=3, width=32)
    name = save(make(TRANSFORMER), other, tmp_path / "wider")
    with pytest.raises(CheckpointError, match=r"has other shapes: class_embedding \("):
        create_backbone(name)
    weights = tmp_path / "deeper" / "open_clip_model.safetensors"
    with pytest.raises(CheckpointError, match=r"lacks .*has unknown "):
        create_backbone(f"open_clip:RN50?weights={weights}")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"broken.pt cannot be read as a checkpoint of open_clip"):
        create_backbone(f"open_clip:RN50?weights={broken}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ViT-B-33/openai", "unknown open_clip model 'ViT-B-33'; did you mean 'ViT-B-32'"),
        ("ViT-B-32/opnai", "unknown pretrained tag of open_clip model 'ViT-B-32': 'opnai'; did you mean 'openai'"),
        ("ViT-B-32", r"names no weights; write one of open_clip:ViT-B-32/openai.*weights=FILE.*pretrained=false"),
        ("ViT-B-32/openai?weights=/nowhere.pt", "there is no file or directory '/nowhere.pt'"),
        ("/nowhere/at/all", "is not a directory"),
        ("ViT-B-32/openai?layr=3", "did you mean 'layer'"),
    ],
)
def test_wrong_names(spec, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"open_clip:{spec}")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (TRANSFORMER, {"layer": 3}, "3 blocks, 0 to 2; got layer=3"),
        (TRANSFORMER, {"project": True, "facet": "key"}, "facet token or value; got 'key'"),
        (COCA, {"project": True}, "leave out project"),
        (RESNET, {"summary": "cls"}, "no summary 'cls'; it has projected, pool, mean, none"),
        (RESNET, {"facet": "key"}, "convolutional, without attention: it has no key"),
        (RESNET, {"layer": [0, 1]}, "different strides.*name one layer, 0 to 3"),
        (RESNET, {"layer": 1, "project": True}, "projects its last stage, 3; got layer=1"),
        (CONVNEXT, {"facet": "value"}, "convolutional"),
        (CONVNEXT, {"summary": "cls"}, "no summary 'cls'"),
        (CONVNEXT, {"layer": 0, "project": True}, "projects its last stage only"),
        (SIGLIP, {"project": True, "facet": "value"}, "facet token only"),
    ],
)
def test_options_that_a_model_does_not_have(config, options, message, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"open_clip:{tmp_path}?pretrained=false", **options)


def test_directories_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"open_clip_config.json cannot be read.*save_for_hf"):
        create_backbone(f"open_clip:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TRANSFORMER}))
    with pytest.raises(ConfigError, match=r"one file of weights, such as open_clip_model.safetensors; it has none"):
        create_backbone(f"open_clip:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "cannot be read as a configuration"),
        ({"model_cfg": {}}, "cannot be read as a configuration with model_cfg .*embed_dim"),
        ({"model_cfg": []}, "mappings"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": []}}, "vision_cfg, a mapping"),
        ({"model_cfg": TRANSFORMER, "preprocess_cfg": [1]}, "mappings"),
        ({"model_cfg": TRANSFORMER, "preprocess_cfg": {"std": "x"}}, "option std is a number or three.* got 'x'"),
        ({"model_cfg": TRANSFORMER, "preprocess_cfg": {"std": [1, 1, 0]}}, "option std .*above 0"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {"timm_model_name": "no_trunk"}}}, "cannot build .*no_trunk"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {"colour": 1}}}, "cannot build .*colour"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {"width": "wide"}}}, "cannot build"),
    ],
)
def test_odd_configurations_are_named(content, message, tmp_path):
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as caught:
        create_backbone(f"open_clip:{tmp_path}?pretrained=false")
    assert str(path) in str(caught.value)


def test_random_weights_and_a_file_of_weights_exclude_each_other():
    with pytest.raises(
        ConfigError, match="pretrained=false takes random weights for 'open_clip:RN50'; leave out it or weights"
    ):
        create_backbone("open_clip:RN50?pretrained=false&weights=w.pt")


def test_it_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        pixels = (torch.rand(120, 160, 3) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    name = save(make(TRANSFORMER), TRANSFORMER, tmp_path / "model")
    overrides = [
        *("+model=toy-vit", "+upsampler=featsharp-2x", f"model.name='{name}'", f"train_data_dir={tmp_path}/photos"),
        *("batch_size=2", "num_workers=0", "num_training_steps=2", "log_frequency=1", "normalizer.num_samples=8"),
        *("normalizer.batch_size=4", "viz.num_images=1", "viz.type=none", "progress=false", "output_base=out"),
    ]
    assert main(overrides) == 0
    assert list((tmp_path / "out").rglob("last.pth"))
