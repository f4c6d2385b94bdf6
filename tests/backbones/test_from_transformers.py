"""Models of transformers by name: real classes, saved in the library's own format and found by their directory."""

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featsharp.backbones import create_backbone
from featsharp.backbones.from_transformers import TransformersConvNet
from featsharp.errors import CheckpointError, ConfigError, InputError, MissingDependencyError

transformers: Any = pytest.importorskip("transformers")

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONV = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_channels": 3}


class Case(NamedTuple):
    """A family: the model whose checkpoint is read, and the library's own way to the features and the summary."""

    build: Callable[[], nn.Module]
    tokens: Callable[[Any, Tensor], Tensor]  # of the saved model and images to [B, N, C] or [B, C, h, w]
    summary: Callable[[Any, Tensor], Tensor] | None
    prefix: int = 0
    patch: int = 16
    flexible: bool = True
    processor: str = "ViTImageProcessor"


def interpolated(model: Any, images: Tensor) -> Any:
    return model(images, interpolate_pos_encoding=True)


def clip() -> nn.Module:
    config = transformers.CLIPConfig(vision_config=TOWER, text_config=TEXT, projection_dim=24)
    return transformers.CLIPModel(config)


def siglip() -> nn.Module:
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=TOWER, text_config=TEXT))


def naflex() -> nn.Module:
    vision = {key: value for key, value in TOWER.items() if key != "image_size"} | {"num_patches": 16}
    return transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=TEXT))


def paligemma() -> nn.Module:
    text = {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16, **TEXT}
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
    config = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=32)
    return transformers.PaliGemmaForConditionalGeneration(config)


def sam() -> nn.Module:
    vision = {**TOWER, "mlp_dim": 64, "output_channels": 8, "window_size": 3, "global_attn_indexes": [2]}
    small = {"hidden_size": 8, "mlp_dim": 8, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    config = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 8, "image_size": 64},
        mask_decoder_config={**small, "num_hidden_layers": 1},
    )
    return transformers.SamModel(config)


def naflex_call(model: Any, images: Tensor) -> Any:
    """As the processor does it: patches in (row, column, channel) order by a loop, a mask of ones."""
    batch, _, height, width = images.shape
    patches = [
        images[:, :, y : y + 16, x : x + 16].permute(0, 2, 3, 1).reshape(batch, -1)
        for y in range(0, height, 16)
        for x in range(0, width, 16)
    ]
    mask = torch.ones(batch, len(patches), dtype=torch.int32)
    shapes = torch.tensor([[height // 16, width // 16]] * batch)
    return model.vision_model(torch.stack(patches, 1), pixel_attention_mask=mask, spatial_shapes=shapes)


def unmasked(model: Any, images: Tensor) -> Any:
    """Without masking; the noise says where each token went, and they are sorted back."""
    model.config.mask_ratio = 0.0
    patches = images.shape[2] * images.shape[3] // 256
    noise = torch.rand(len(images), patches, generator=torch.Generator().manual_seed(5))
    out = model(images, noise=noise, interpolate_pos_encoding=True)
    index = out.ids_restore[..., None].expand(-1, -1, 32)
    return torch.cat([out.last_hidden_state[:, :1], out.last_hidden_state[:, 1:].gather(1, index)], 1)


def sam_trunk(model: Any, images: Tensor) -> Tensor:
    states = model.vision_encoder(images, output_hidden_states=True).hidden_states
    return states[-1].flatten(1, 2)


def clip_projected(model: Any, images: Tensor) -> Tensor:
    return model.get_image_features(images, interpolate_pos_encoding=True).pooler_output


def clip_tokens(model: Any, images: Tensor) -> Tensor:
    vision = model.vision_model
    return vision.post_layernorm(interpolated(vision, images).last_hidden_state)


def dinov3_conv_map(model: Any, images: Tensor) -> Tensor:
    tokens = model(images).last_hidden_state[:, 1:]
    return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // 32, images.shape[3] // 32))


def first(tokens: Tensor) -> Tensor:
    return tokens[:, 0]


CASES = {
    "vit": Case(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TOWER)),
        lambda m, x: interpolated(m.vit, x).last_hidden_state,
        lambda m, x: first(interpolated(m.vit, x).last_hidden_state),
        prefix=1,
    ),
    "deit": Case(
        lambda: transformers.DeiTModel(transformers.DeiTConfig(**TOWER)),
        lambda m, x: interpolated(m, x).last_hidden_state,
        lambda m, x: first(interpolated(m, x).last_hidden_state),
        prefix=2,
    ),
    "dinov2": Case(
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)),
        lambda m, x: m(x).last_hidden_state,
        lambda m, x: m(x).pooler_output,
        prefix=1,
        processor="BitImageProcessor",
    ),
    "dinov2_with_registers": Case(
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(num_register_tokens=4, **TOWER)
        ),
        lambda m, x: m(x).last_hidden_state,
        lambda m, x: m(x).pooler_output,
        prefix=5,
        processor="BitImageProcessor",
    ),
    "dinov3": Case(
        lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(num_register_tokens=4, **TOWER)),
        lambda m, x: m(x).last_hidden_state,
        lambda m, x: m(x).pooler_output,
        prefix=5,
    ),
    "mae": Case(
        lambda: transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(
                decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, **TOWER
            )
        ),
        lambda m, x: unmasked(m.vit, x),
        lambda m, x: first(unmasked(m.vit, x)),
        prefix=1,
    ),
    "clip": Case(clip, clip_tokens, clip_projected, prefix=1, processor="CLIPImageProcessor"),
    "siglip": Case(
        siglip,
        lambda m, x: interpolated(m.vision_model, x).last_hidden_state,
        lambda m, x: interpolated(m.vision_model, x).pooler_output,
        processor="SiglipImageProcessor",
    ),
    "naflex": Case(
        naflex,
        lambda m, x: naflex_call(m, x).last_hidden_state,
        lambda m, x: naflex_call(m, x).pooler_output,
        processor="Siglip2ImageProcessor",
    ),
    "paligemma": Case(
        paligemma,
        lambda m, x: interpolated(m.model.vision_tower, x).last_hidden_state,
        None,
        processor="SiglipImageProcessor",
    ),
    "sam": Case(sam, sam_trunk, None, flexible=False, processor="SamImageProcessor"),
    "convnext": Case(
        lambda: transformers.ConvNextModel(transformers.ConvNextConfig(**CONV)),
        lambda m, x: m(x).last_hidden_state,
        lambda m, x: m(x).pooler_output,
        patch=32,
        processor="ConvNextImageProcessor",
    ),
    "convnextv2": Case(
        lambda: transformers.ConvNextV2Model(transformers.ConvNextV2Config(**CONV)),
        lambda m, x: m(x).last_hidden_state,
        lambda m, x: m(x).pooler_output,
        patch=32,
        processor="ConvNextImageProcessor",
    ),
    "resnet": Case(
        lambda: transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, **CONV)),
        lambda m, x: m(x).last_hidden_state,
        lambda m, x: m(x).pooler_output.flatten(1),
        patch=32,
        processor="ConvNextImageProcessor",
    ),
    "dinov3_convnext": Case(
        lambda: transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**CONV)),
        dinov3_conv_map,
        lambda m, x: m(x).pooler_output,
        patch=32,
    ),
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


class Saved(NamedTuple):
    case: Case
    model: Any
    path: Path

    def create(self, **options: Any) -> Any:
        return create_backbone(f"hf:{self.path}", **options)


def randomise(model: nn.Module) -> None:
    """Weights large enough that blocks, registers and position tables matter; many start at zero or near."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
            elif "lambda" in name or "scale_parameter" in name or "gamma" in name:
                parameter.fill_(0.5)


def save_processor(kind: str, path: Path) -> None:
    options: dict[str, Any] = {"image_mean": list(MEAN), "image_std": list(STD)}
    if kind in ("ViTImageProcessor", "SiglipImageProcessor"):
        options["size"] = {"height": 64, "width": 64}
    elif kind in ("BitImageProcessor", "CLIPImageProcessor"):
        options |= {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}}
    elif kind == "ConvNextImageProcessor":
        options["size"] = {"shortest_edge": 64}
    getattr(transformers, kind)(**options).save_pretrained(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Families by name, each built and saved once."""
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = CASES[name].build().eval()
            randomise(model)
            model.save_pretrained(path)
            save_processor(CASES[name].processor, path)
            made[name] = Saved(CASES[name], model, path)
        return made[name]

    return get


QUICK = ("dinov2_with_registers", "dinov3", "clip", "siglip", "naflex", "sam", "convnext")  # one of each kind


@pytest.fixture(params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES])
def family(request: pytest.FixtureRequest, saved: Callable[[str], Saved]) -> Saved:
    return saved(request.param)


def pictures(count: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def other_size(case: Case) -> tuple[int, int]:
    return (3 * case.patch, 5 * case.patch) if case.flexible else (64, 64)


def as_map(case: Case, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] by two loops over the tokens behind the prefix."""
    if tokens.ndim == 4:
        return tokens
    rows, columns = size[0] // case.patch, size[1] // case.patch
    maps = torch.empty(len(tokens), tokens.shape[2], rows, columns)
    for y in range(rows):
        for x in range(columns):
            maps[:, :, y, x] = tokens[:, case.prefix + y * columns + x]
    return maps


def test_facts_come_from_the_files(family):
    backbone = family.create()
    assert (backbone.patch_size, backbone.embed_dim, backbone.input_size) == (family.case.patch, 32, (64, 64))
    assert backbone.mean == pytest.approx(MEAN)
    assert backbone.std == pytest.approx(STD)
    assert backbone.flexible == family.case.flexible
    assert backbone.name == f"hf:{family.path}"


@pytest.mark.parametrize("native", [True, False])
def test_features_and_summary_are_the_librarys_own(family, native):
    case = family.case
    size = (64, 64) if native else other_size(case)
    images = pictures(2, size)
    backbone = family.create()
    with torch.no_grad():
        out = backbone(images)
        expected = as_map(case, case.tokens(family.model, images), size)
        torch.testing.assert_close(out.features, expected, atol=2e-6, rtol=1e-6)
        if case.summary is None:
            assert out.summary is None
            assert backbone.summary_dim is None
        else:
            torch.testing.assert_close(out.summary, case.summary(family.model, images), atol=2e-6, rtol=1e-6)
            assert backbone.summary_dim == out.summary.shape[1]


def test_tokens_run_row_by_row(family):
    p, size = family.case.patch, other_size(family.case)
    backbone = family.create()
    images = pictures(1, size)
    changed = images.clone()
    y, x = 1, size[1] // p - 2
    changed[..., y * p : (y + 1) * p, x * p : (x + 1) * p] *= -3
    change = (backbone(changed).features - backbone(images).features).norm(dim=1)[0]
    row, column = divmod(int(change.argmax()), size[1] // p)
    # The fields of convolutions overlap, and those of a ResNet are centred between its tokens' pixels.
    assert max(abs(row - y), abs(column - x)) <= (1 if isinstance(backbone, TransformersConvNet) else 0)


def test_an_image_is_encoded_alike_alone_and_in_a_batch(family):
    images = pictures(3, other_size(family.case))
    backbone = family.create()
    together, alone = backbone(images), backbone(images[1:2])
    torch.testing.assert_close(together.features[1:2], alone.features, atol=1e-4, rtol=1e-4)
    if together.summary is not None:
        torch.testing.assert_close(together.summary[1:2], alone.summary, atol=1e-4, rtol=1e-4)


def test_frozen_in_float32_and_alike_in_half(family):
    backbone = family.create()
    images = pictures(2, other_size(family.case))
    nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    pixels = images.clone().requires_grad_()
    backbone(pixels).features.square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    exact = backbone(images).features
    autocast = family.create(dtype="bfloat16")(images).features
    assert autocast.dtype == torch.float32
    assert F.cosine_similarity(autocast, exact).mean() > 0.995
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(backbone).to(dtype)(images.to(dtype)).features
        assert half.dtype == dtype
        assert F.cosine_similarity(half.float(), exact).mean() > 0.99


def test_loading_leaves_the_random_state_and_the_librarys_settings(saved):
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    saved("vit").create()
    saved("vit").create(pretrained=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_random_weights_need_no_weights_and_are_the_same_each_time(saved, tmp_path):
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((saved("siglip").path / file).read_bytes())
    with pytest.raises(
        MissingDependencyError, match=r"has no weights.*no file named model\.safetensors.*pretrained=false"
    ):
        create_backbone(f"hf:{tmp_path}")
    one, other = (create_backbone(f"hf:{tmp_path}?pretrained=false") for _ in range(2))
    assert one.weights_hash() == other.weights_hash() != saved("siglip").create().weights_hash()


def test_a_relative_directory_is_found(saved, monkeypatch):
    path = saved("vit").path
    monkeypatch.chdir(path.parent)
    assert create_backbone(f"hf:{path.name}").embed_dim == 32
    assert create_backbone(f"hf:./{path.name}").embed_dim == 32


def test_attention_is_the_fused_one(saved):
    for name in ("vit", "dinov2", "dinov3", "siglip", "naflex", "clip", "mae", "sam"):
        assert saved(name).create().trunk.config._attn_implementation == "sdpa"


def test_only_the_vision_tower_is_built(saved):
    for name, left_out in (("paligemma", "language"), ("clip", "text"), ("siglip", "text"), ("sam", "decoder")):
        keys = saved(name).create().state_dict()
        assert not any(left_out in key or "neck" in key for key in keys)


def test_paligemma_of_the_older_layout(saved, tmp_path):
    """The published checkpoints have one more level in their keys."""
    from safetensors.torch import load_file, save_file

    family = saved("paligemma")
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((family.path / file).read_bytes())
    weights = load_file(family.path / "model.safetensors")
    older = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in weights.items()}
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert create_backbone(f"hf:{tmp_path}").weights_hash() == family.create().weights_hash()


def test_paligemma_has_a_token_mean_only_by_name(saved):
    family, images = saved("paligemma"), pictures(2, (64, 64))
    assert family.create()(images).summary is None
    out = family.create(summary="mean")(images)
    torch.testing.assert_close(out.summary, out.features.mean(dim=(2, 3)))
    with pytest.raises(ConfigError, match="no summary 'cls'; it has none, mean"):
        family.create(summary="cls")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("vit", ["cls", "mean", "none"]),
        ("clip", ["projected", "cls", "mean", "none"]),
        ("siglip", ["pool", "none", "mean"]),
        ("sam", ["none", "mean"]),
        ("resnet", ["pool", "mean", "none"]),
    ],
)
def test_summaries(saved, name, kinds):
    images = pictures(2, (64, 64))
    for kind in kinds:
        backbone = saved(name).create(summary=kind)
        out = backbone(images)
        assert backbone.summary_dim == (None if out.summary is None else out.summary.shape[1])
        assert (out.summary is None) == (kind == "none")
        if kind == "mean":
            torch.testing.assert_close(out.summary, out.features.mean(dim=(2, 3)))
    for kind in {"cls", "pool", "projected"} - set(kinds):
        with pytest.raises(ConfigError, match=f"no summary '{kind}'; it has {', '.join(kinds)}"):
            saved(name).create(summary=kind)


def test_class_token_of_clip_is_the_librarys_pooled_one(saved):
    images = pictures(2, (64, 64))
    expected = saved("clip").model.vision_model(images).pooler_output
    torch.testing.assert_close(saved("clip").create(summary="cls")(images).summary, expected)


VITS = [name for name, case in CASES.items() if case.patch == 16]


@pytest.mark.parametrize("name", VITS)
def test_layers_go_through_the_final_norm_and_are_concatenated(saved, name):
    family = saved(name)
    case, size = family.case, other_size(family.case)
    images = pictures(2, size)
    with torch.no_grad():
        last = family.create()(images)
        out = family.create(layer=-1)(images)
        torch.testing.assert_close(out.features, last.features)
        assert last.summary is None or torch.equal(out.summary, last.summary)
        if name in ("vit", "dinov2_with_registers", "dinov3", "siglip"):
            vision = {"vit": "vit", "siglip": "vision_model"}.get(name)
            vision = family.model if vision is None else getattr(family.model, vision)
            arguments = {"interpolate_pos_encoding": True} if name in ("vit", "siglip") else {}
            states = vision(images, output_hidden_states=True, **arguments).hidden_states  # of the embedding first
            norm = next(getattr(vision, n) for n in ("layernorm", "post_layernorm", "norm") if hasattr(vision, n))
            expected = [as_map(case, norm(states[1 + layer]), size) for layer in (2, 0)]
            backbone = family.create(layer=[2, 0])
            assert backbone.embed_dim == 64
            torch.testing.assert_close(backbone(images).features, torch.cat(expected, 1), atol=2e-6, rtol=1e-6)
    twice = family.create(layer=[1, 1])(images).features
    assert torch.equal(twice[:, :32], twice[:, 32:])
    with pytest.raises(ConfigError, match="has 3 blocks, 0 to 2; got layer=3"):
        family.create(layer=3)


@pytest.mark.parametrize("facet", ["query", "key", "value"])
@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "dinov3", "mae", "clip", "siglip", "naflex"])
def test_facets_are_the_projections_of_the_normalised_input(saved, name, facet):
    """By hand: what the block before put out, the norm of this block, the weights of its projection."""
    family = saved(name)
    size, images = other_size(family.case), pictures(1, other_size(family.case))
    backbone = family.create(layer=1, facet=facet)
    states: list[Tensor] = []
    model = copy.deepcopy(backbone)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    blocks[0].register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        features = model(images).features
        norm = next(m for m in blocks[1].modules() if isinstance(m, nn.LayerNorm))
        linear = dict(blocks[1].named_modules())
        found = next(linear[key] for key in linear if key.endswith(f".{facet[0]}_proj"))
        expected = F.linear(norm(states[0]), found.weight, found.bias)
    torch.testing.assert_close(features, as_map(family.case, expected, size), atol=2e-6, rtol=1e-6)
    assert backbone.embed_dim == 32


@pytest.mark.parametrize("layer", [1, 2])  # 1 attends in windows of 3x3 tokens of a padded map, 2 everywhere
def test_facets_of_sam(saved, layer):
    family, images = saved("sam"), pictures(2, (64, 64))
    encoder = family.model.vision_encoder
    block = encoder.layers[layer]
    with torch.no_grad():
        states = encoder(images, output_hidden_states=True).hidden_states
        linear = block.attn.qkv
        qkv = F.linear(block.layer_norm1(states[layer]), linear.weight, linear.bias)  # [B, h, w, 3 C]
        for number, facet in enumerate(("query", "key", "value")):
            features = family.create(layer=layer, facet=facet)(images).features
            expected = qkv[..., 32 * number : 32 * (number + 1)].permute(0, 3, 1, 2)
            torch.testing.assert_close(features, expected, atol=2e-6, rtol=1e-6)


def test_stages_of_convolutional_networks(saved):
    images = pictures(2, (64, 96))
    for name in ("resnet", "convnext"):
        family = saved(name)
        backbone = family.create(layer=1)
        assert (backbone.patch_size, backbone.embed_dim) == (8, 16)
        with torch.no_grad():
            states = family.model(images, output_hidden_states=True).hidden_states
            torch.testing.assert_close(backbone(images).features, states[2])
        with pytest.raises(ConfigError, match=r"have different strides .* name one layer, 0 to 3"):
            family.create(layer=[1, 3])
        with pytest.raises(ConfigError, match="without attention: it has no key; leave out facet"):
            family.create(facet="key")
        with pytest.raises(ConfigError, match="has 4 blocks"):
            family.create(layer=4)


def test_stages_of_dinov3_convnext_are_maps_and_its_last_tokens_are_normalised(saved):
    family, images = saved("dinov3_convnext"), pictures(1, (64, 96))
    out = family.create(layer=2, summary="mean")(images)
    assert out.features.shape == (1, 24, 4, 6)
    torch.testing.assert_close(out.summary, family.create()(images).features.mean(dim=(2, 3)))


def test_clip_patch_tokens_in_the_space_of_text(saved):
    family, images = saved("clip"), pictures(2, (48, 80))
    backbone = family.create(project=True)
    assert backbone.embed_dim == 24
    with torch.no_grad():
        expected = F.linear(clip_tokens(family.model, images), family.model.visual_projection.weight)
        torch.testing.assert_close(backbone(images).features, as_map(family.case, expected, (48, 80)))
    with pytest.raises(ConfigError, match=r"the key of .* has no projection; leave out project or facet"):
        family.create(project=True, facet="key")
    for name in ("siglip", "vit", "resnet"):
        with pytest.raises(ConfigError, match="no projection into the space of text; leave out project"):
            saved(name).create(project=True)


def test_text_alignment_survives_upsampling(saved):
    """Row B6: which text a patch is closest to is still said by the sharp map around the patch's centre."""
    from featsharp.upsamplers import create_upsampler

    family, images = saved("clip"), pictures(2, (128, 128))
    backbone = family.create(project=True)
    prompts = torch.arange(3, 45).reshape(6, 7)
    with torch.no_grad():
        text = F.normalize(family.model.get_text_features(prompts).pooler_output, dim=1)
        coarse = backbone(images).features
        fine = create_upsampler("bilinear", backbone, 3).upsample(coarse, images)
        cosine = [torch.einsum("bchw,tc->bthw", F.normalize(f, dim=1), text) for f in (coarse, fine)]
        at_centres = cosine[1][..., 1::3, 1::3]  # the factor is odd, so a sharp token lies on the centre of each patch
        # The projection is linear: tokens that are upsampled first align with the same texts.
        unaligned = family.create()
        tokens = create_upsampler("bilinear", unaligned, 3).upsample(unaligned(images).features, images)
        later = F.conv2d(tokens, backbone.model.visual_projection.weight[:, :, None, None])
    torch.testing.assert_close(at_centres, cosine[0], atol=1e-5, rtol=0)
    assert torch.equal(at_centres.argmax(1), cosine[0].argmax(1))
    assert len(cosine[0].argmax(1).unique()) > 1
    assert F.cosine_similarity(later, fine, dim=1).min() > 1 - 1e-5


def test_vision_only_checkpoints_of_clip(saved, tmp_path):
    whole = saved("clip")
    whole.model.vision_model.save_pretrained(tmp_path / "plain")
    save_processor("CLIPImageProcessor", tmp_path / "plain")
    plain = create_backbone(f"hf:{tmp_path / 'plain'}")
    images = pictures(1, (64, 64))
    assert plain.summary_dim == 32
    assert torch.equal(plain(images).features, whole.create()(images).features)
    with pytest.raises(ConfigError, match="no projection into the space of text"):
        create_backbone(f"hf:{tmp_path / 'plain'}?project=true")
    config = copy.deepcopy(whole.model.config.vision_config)
    config.projection_dim = 24
    projecting = transformers.CLIPVisionModelWithProjection(config)
    projecting.load_state_dict(
        {key: value for key, value in whole.model.state_dict().items() if key.split(".")[0].startswith("vis")}
    )
    projecting.save_pretrained(tmp_path / "projecting")
    save_processor("CLIPImageProcessor", tmp_path / "projecting")
    again = create_backbone(f"hf:{tmp_path / 'projecting'}?project=true")
    assert torch.equal(again(images).features, whole.create(project=True)(images).features)


class NoResampling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.interpolate:
            raise AssertionError("resampled at the native size")
        return function(*args, **(kwargs or {}))


def test_native_size_is_whole_patches_and_uses_the_stored_table(tmp_path):
    config = transformers.SiglipVisionConfig(**{**TOWER, "image_size": 104, "patch_size": 14})
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": 104, "width": 104}).save_pretrained(tmp_path)
    backbone = create_backbone(f"hf:{tmp_path}")
    assert backbone.input_size == (98, 98)

    with NoResampling():
        backbone(torch.zeros(1, 3, 98, 98))
    with pytest.raises(AssertionError, match="resampled"), NoResampling():
        backbone(torch.zeros(1, 3, 98, 112))


def test_other_sizes_resample_the_table_bicubically(saved):
    """Row F15: the table of SigLIP by hand, cubic convolution with a = -0.75 at half-pixel centres."""
    backbone = saved("siglip").create()
    table = backbone.trunk.embeddings.position_embedding.weight.detach().double().reshape(4, 4, 32)

    def cubic(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    def matrix(size: int) -> Tensor:
        weights = torch.zeros(size, 4, dtype=torch.float64)
        for row in range(size):
            centre = (row + 0.5) * 4 / size - 0.5
            for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                weights[row, min(max(tap, 0), 3)] += cubic(centre - tap)
        return weights

    expected = torch.einsum("ya,xb,abc->yxc", matrix(3), matrix(5), table).reshape(1, 15, 32)
    embeddings = backbone.trunk.embeddings
    with torch.no_grad():
        images = pictures(1, (48, 80))
        added = embeddings(images, interpolate_pos_encoding=True)
        added = added - embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(added.double(), expected, atol=1e-5, rtol=1e-5)


def test_img_size(saved):
    backbone = saved("dinov2").create(img_size="96x48")
    assert backbone.input_size == (96, 48)
    with pytest.raises(ConfigError, match="whole patches of 16; got img_size=100x100, the nearest is 96x96"):
        saved("dinov2").create(img_size=100)
    with pytest.raises(ConfigError, match="takes 64x64 pixels only; got img_size=96x96"):
        saved("sam").create(img_size=96)
    assert saved("sam").create(img_size=64).input_size == (64, 64)


def test_sam_takes_its_size_only_and_larger_images_by_windows(saved):
    backbone = saved("sam").create()
    with pytest.raises(InputError, match="a fixed size; got 64x80"):
        backbone(torch.zeros(1, 3, 64, 80))
    tiled = saved("sam").create(other_sizes="tile")
    assert tiled(pictures(1, (80, 112))).features.shape == (1, 32, 5, 7)


@pytest.mark.parametrize("name", ["vit", "naflex", "dinov3", "siglip"])
def test_patches_can_overlap(saved, name):
    backbone = saved(name).create()
    images = pictures(1, (48, 64))
    dense = backbone.with_patch_stride(16)(images).features
    torch.testing.assert_close(dense, backbone(images).features)
    assert backbone.with_patch_stride(8)(images).features.shape == (1, 32, 5, 7)


def test_weights_from_elsewhere(saved, tmp_path):
    family = saved("dinov2")
    copyless = tmp_path / "config_only"
    copyless.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        (copyless / file).write_bytes((family.path / file).read_bytes())
    expected = family.create().weights_hash()
    file = family.path / "model.safetensors"
    torch.save(family.model.state_dict(), tmp_path / "weights.bin")
    for weights in (family.path, file, tmp_path / "weights.bin"):
        assert create_backbone(f"hf:{copyless}", weights=weights).weights_hash() == expected
    with pytest.raises(ConfigError, match=r"is a file; give its directory, or hf:MODEL\?weights="):
        create_backbone(f"hf:{file}")
    with pytest.raises(ConfigError, match="there is no file or directory 'nowhere'"):
        family.create(weights="nowhere")


def test_a_published_name_takes_configuration_and_weights_from_a_directory(saved):
    backbone = create_backbone("hf:google/siglip2-base-patch16-224", weights=saved("siglip").path)
    assert backbone.weights_hash() == saved("siglip").create().weights_hash()
    assert backbone.name.startswith("hf:google/siglip2-base-patch16-224?weights=")


def test_a_checkpoint_of_another_architecture_lists_the_keys(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"not those of a ViTModel.*missing embeddings\.cls_token.*without use"):
        saved("vit").create(weights=saved("siglip").path)
    wide = transformers.ViTModel(transformers.ViTConfig(**{**TOWER, "hidden_size": 48}))
    wide.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"of another shape embeddings\.cls_token 1x1x48, not 1x1x32"):
        saved("vit").create(weights=tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    (tmp_path / "broken.bin").write_bytes(b"nothing of the kind")
    for file in ("broken.safetensors", "broken.bin"):
        with pytest.raises(CheckpointError, match=f"{file}'? cannot be read"):
            saved("vit").create(weights=tmp_path / file)


def test_weights_that_cannot_be_had_say_what_to_do():
    with pytest.raises(MissingDependencyError, match=r"cannot be fetched.*hf download google/siglip2.*hf:DIRECTORY"):
        create_backbone("hf:google/siglip2-so400m-patch16-512")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?facett=key", "did you mean 'facet'"),
        ("?mean=0.5", "image_mean and image_std"),
        ("?mean=0.5,0.5&std=1", "option mean is a number or three"),
        ("?mean=x&std=1", "option mean is a number or three"),
        ("?mean=0.5&std=0", "option std is a number or three.*above 0"),
        ("?pretrained=false&weights=w.bin", "pretrained=false takes random weights .*leave out it or weights"),
        ("?trust=yes", "option trust is true or false"),
    ],
)
def test_wrong_options(saved, tmp_path, options, message):
    (tmp_path / "config.json").write_bytes((saved("vit").path / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"hf:{tmp_path}{options}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image_mean": [0.5, 0', "cannot be read"),
        ('{"image_mean": 0.5, "image_std": "x"}', "option image_std .* got 'x'"),
        ('{"image_mean": [0.5, 0.5], "image_std": 1}', r"option image_mean .* got \[0.5, 0.5\]"),
        ('{"image_mean": 0.5, "image_std": 0.5, "rescale_factor": "x"}', "cannot be read"),
        ('{"image_mean": 0.5, "image_std": 0.5, "size": []}', "cannot be read"),
        ('{"image_mean": 0.5, "image_std": 0.5, "size": [64]}', "cannot be read"),
        ("[1]", "cannot be read"),
    ],
)
def test_damaged_processors_are_named(saved, tmp_path, content, message):
    (tmp_path / "config.json").write_bytes((saved("vit").path / "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        create_backbone(f"hf:{tmp_path}?pretrained=false")
    assert str(tmp_path / "preprocessor_config.json") in str(caught.value)


def test_a_model_of_text_is_no_backbone(saved, tmp_path):
    config = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    for path in saved("vit").path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"weights at '{tmp_path}' are not those of a BertModel"):
        create_backbone(f"hf:{tmp_path}")
    with pytest.raises(ConfigError, match="fails on whitened images"):
        create_backbone(f"hf:{tmp_path}?pretrained=false")
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    with pytest.raises(ConfigError, match=f"cannot build .* from its configuration at '{tmp_path}'"):
        create_backbone(f"hf:{tmp_path}?pretrained=false")
    with pytest.raises(CheckpointError, match=f"at '{tmp_path}' cannot be read"):
        create_backbone(f"hf:{tmp_path}")


def test_a_directory_below_home(saved, monkeypatch):
    path = saved("vit").path
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.setenv("USERPROFILE", str(path.parent))
    assert create_backbone(f"hf:~/{path.name}").weights_hash() == saved("vit").create().weights_hash()
    weights = f"~/{path.name}/model.safetensors"
    assert create_backbone(f"hf:{path}", weights=weights).weights_hash() == saved("vit").create().weights_hash()


def test_wrong_directories(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json that transformers can read"):
        create_backbone(f"hf:{tmp_path}")
    for name in (f"{tmp_path}/none", "./none", "a/b/c"):
        with pytest.raises(ConfigError, match=f"there is no directory '{name}'"):
            create_backbone(f"hf:{name}")
    with pytest.raises(ConfigError, match="hf: needs a model"):
        create_backbone("hf:")
    for config, message in (
        ({"model_type": "nonesuch"}, "nonesuch"),
        ({"model_type": "bert", "hidden_size": 32}, "preprocessor_config"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=message):
            create_backbone(f"hf:{tmp_path}?pretrained=false")


def test_whitening_is_told_where_no_processor_is(saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved("vit").path / "config.json").read_bytes())
    bare = f"hf:{tmp_path}?pretrained=false"
    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json.*\?mean=0\.485"):
        create_backbone(bare)
    backbone = create_backbone(f"{bare}&mean=0.5&std=0.1,0.2,0.3")
    assert (backbone.mean, backbone.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert backbone.input_size == (64, 64)  # of the position table


@pytest.mark.parametrize(
    ("processor", "mean", "std", "size"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32}, 0.5, 0.5, 32),
        ({"do_normalize": False, "do_rescale": True, "size": {"shortest_edge": 48}}, 0.0, 1.0, 48),
        ({"image_mean": 0.0, "image_std": 1.0, "rescale_factor": 1 / 127.5, "size": [48, 48]}, 0.0, 0.5, 48),
        ({"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False}, 0.5, 0.2, 64),
        ({"image_mean": [0.5] * 3, "image_std": [1] * 3, "do_center_crop": False, "crop_size": 32}, 0.5, 1.0, 64),
    ],
)
def test_what_processors_say(saved, tmp_path, processor, mean, std, size):
    (tmp_path / "config.json").write_bytes((saved("vit").path / "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    backbone = create_backbone(f"hf:{tmp_path}?pretrained=false")
    assert backbone.mean == pytest.approx((mean,) * 3)
    assert backbone.std == pytest.approx((std,) * 3)
    assert backbone.input_size == (size, size)


def test_whitening_is_what_the_processor_does(saved):
    family = saved("siglip")
    backbone = family.create()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(family.path)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    unit = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    ours = (unit - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5)


def test_naflex_patches_are_those_of_its_processor(saved):
    """An upright image through the library's own processor, padding and mask included."""
    family = saved("naflex")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 48, 3), np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(family.path, max_num_patches=18)
    inputs = processor(Image.fromarray(pixels), return_tensors="pt")
    assert inputs.spatial_shapes.tolist() == [[6, 3]]
    backbone = family.create()
    unit = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    whitened = (unit - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
    with torch.no_grad():
        expected = family.model.vision_model(**inputs).last_hidden_state[:, :18]
        features = backbone(whitened).features
    torch.testing.assert_close(features, as_map(family.case, expected, (96, 48)), atol=1e-4, rtol=1e-4)


REMOTE_CONFIG = """
from transformers import PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "tiny-agglomerative"
    def __init__(self, width=24, **kwargs):
        self.width = width
        super().__init__(**kwargs)
"""
REMOTE_MODEL = """
from typing import NamedTuple
import torch
from torch import nn
from transformers import PreTrainedModel
from .configuration_tiny import TinyConfig

class TinyOutput(NamedTuple):
    summary: torch.Tensor
    features: torch.Tensor

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Conv2d(3, config.width, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 2, config.width))
        self.mix = nn.Linear(config.width, config.width)
        self.post_init()
    def _init_weights(self, module):
        pass
    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = self.mix(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1))
        return TinyOutput((tokens[:, :2] + tokens[:, 2:].mean(1, keepdim=True)).flatten(1), tokens[:, 2:])
"""


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A directory with code of its own, as RADIO has: summary and patch tokens in a pair, pixels in [0, 1]."""
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "configuration_tiny.py").write_text(REMOTE_CONFIG)
    (path / "modeling_tiny.py").write_text(REMOTE_MODEL)
    auto = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    config = {"model_type": "tiny-agglomerative", "width": 24, "auto_map": auto, "architectures": ["TinyModel"]}
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "size": {"shortest_edge": 64}}))
    return path


def test_code_from_elsewhere_runs_only_when_trusted(remote, tmp_path):
    with pytest.raises(ConfigError, match=r"brings model code of its own.*\?trust=true"):
        create_backbone(f"hf:{remote}")
    assert not (tmp_path / "modules").exists()
    random = create_backbone(f"hf:{remote}?pretrained=false&trust=true")
    assert (random.patch_size, random.embed_dim, random.summary_dim) == (16, 24, 48)
    assert (random.mean, random.std, random.input_size) == ((0.0,) * 3, (1.0,) * 3, (64, 64))
    random.call.save_pretrained(remote)
    backbone = create_backbone(f"hf:{remote}?trust=true")
    images = pictures(2, (48, 80))
    expected = backbone.call(images)
    torch.testing.assert_close(
        backbone(images).features, as_map(Case(clip, clip_tokens, None), expected.features, (48, 80))
    )
    torch.testing.assert_close(backbone(images).summary, expected.summary)
    assert backbone.weights_hash() == random.weights_hash()
    with pytest.raises(ConfigError, match=r"insides.*are not known; leave out layer"):
        create_backbone(f"hf:{remote}?trust=true&layer=1")


def test_code_from_elsewhere_is_asked_to_resample_where_it_has_to_be(remote):
    """Positions of a 4x4 grid, which the model resamples on request only."""
    model = REMOTE_MODEL.replace("def forward(self, x)", "def forward(self, x, interpolate_pos_encoding=False)")
    table = """tokens = self.embed(x)
        positions = torch.arange(16.0).reshape(1, 1, 4, 4)
        if interpolate_pos_encoding:
            positions = nn.functional.interpolate(positions, tokens.shape[2:], mode="bilinear")
        tokens = (tokens + positions / 16).flatten(2).transpose(1, 2)"""
    model = model.replace("tokens = self.embed(x).flatten(2).transpose(1, 2)", table)
    (remote / "modeling_tiny.py").write_text(model)
    backbone = create_backbone(f"hf:{remote}?pretrained=false&trust=true")
    assert backbone.flexible
    assert backbone(pictures(1, (48, 80))).features.shape == (1, 24, 3, 5)


def test_other_models_of_the_library_are_found_out(tmp_path):
    config = transformers.IJepaConfig(**TOWER)
    model = transformers.IJepaModel(config).eval()
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    backbone = create_backbone(f"hf:{tmp_path}")
    assert (backbone.patch_size, backbone.embed_dim, backbone.input_size) == (16, 32, (64, 64))
    images = pictures(1, (48, 80))
    with torch.no_grad():
        expected = as_map(Case(clip, clip_tokens, None), interpolated(model, images).last_hidden_state, (48, 80))
        torch.testing.assert_close(backbone(images).features, expected)


@pytest.mark.slow
def test_full_width_of_siglip2_so400m(tmp_path):
    """The published widths at one block: 1152 channels, 16 heads, 32x32 tokens."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 512}
    config = transformers.SiglipConfig(vision_config={**vision, "patch_size": 16, "num_hidden_layers": 1})
    config.save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": 512, "width": 512}).save_pretrained(tmp_path)
    backbone = create_backbone(f"hf:{tmp_path}?pretrained=false")
    assert (backbone.embed_dim, backbone.input_size, backbone.summary_dim) == (1152, (512, 512), 1152)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    with torch.no_grad():
        assert backbone(pictures(1, (512, 512))).features.shape == (1, 1152, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_the_adapter_costs_next_to_nothing(tmp_path, name):
    """Paired medians on a model of some size, in time of the processor: the machine may be shared."""
    tower = {**TOWER, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "image_size": 224}
    kind = {"vit": "ViT", "siglip": "SiglipVision"}[name]
    getattr(transformers, f"{kind}Config")(**tower).save_pretrained(tmp_path)
    backbone = create_backbone(f"hf:{tmp_path}?pretrained=false&mean=0.5&std=0.5")
    images = pictures(2, (224, 224))

    def seconds(call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    with torch.no_grad():
        pairs = [
            (seconds(lambda: backbone(images)), seconds(lambda: interpolated(backbone.model, images)))
            for _ in range(17)
        ][2:]
    assert statistics.median(ours / bare for ours, bare in pairs) < 1.15


@pytest.mark.parametrize(
    ("name", "options"), [("siglip", ""), pytest.param("resnet", "?img_size=192", marks=pytest.mark.slow)]
)
def test_training_runs(saved, name, options, tmp_path, monkeypatch):
    from featsharp.builder import load_from_file
    from featsharp.train import main

    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "photos" / f"{number}.png")
    done = main(
        [
            "+model=toy-vit",
            f"model.name='hf:{saved(name).path}{options}'",
            "+upsampler=featsharp-2x",
            "batch_size=2",
            "num_workers=0",
            "num_training_steps=2",
            "log_frequency=1",
            "normalizer.num_samples=8",
            "normalizer.batch_size=4",
            "viz.num_images=1",
            "viz.type=none",
            "progress=false",
            f"train_data_dir={tmp_path / 'photos'}",
        ]
    )
    assert done == 0
    encoder = load_from_file(next((tmp_path / "outputs").rglob("last.pth")))
    out = encoder.encode_image(tmp_path / "photos" / "0.png")
    assert out.high_res.shape[2] == 2 * out.low_res.shape[2]
