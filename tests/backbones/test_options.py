"""Options in the names of backbones, short names, and what every backbone can do whatever its library."""

import itertools
import re
from collections.abc import Collection

import pytest
import torch
from torch import Tensor, nn

from featsharp.backbones import (
    FAMILIES,
    MODELS,
    Backbone,
    BackboneOutput,
    Model,
    create_backbone,
    list_backbones,
    resolve_backbone,
)
from featsharp.backbones.adapters import captured, choose_blocks
from featsharp.backbones.options import COMMON, OPTIONS, Options, parse_options, parse_whitening
from featsharp.backbones.toy import ToyViT
from featsharp.backbones.windowed import WindowedBackbone
from featsharp.builder import create_encoder, load_from_file, save_checkpoint
from featsharp.errors import ConfigError, InputError
from featsharp.names import parse_backbone
from featsharp.ops.resize import resize

TIMM_RANDOM = "timm:vit_tiny_patch16_224?pretrained=false&img_size=64"
TIMM_TARGETS = {n: a for n, a in MODELS.items() if a.target.startswith("timm:")}
OPEN_CLIP_TARGETS = {n: a for n, a in MODELS.items() if a.target.startswith("open_clip:")}


# What a name asks for


def options_of(text: str, supported: Collection[str] = tuple(OPTIONS)) -> Options:
    name = parse_backbone(text)
    return parse_options(name.model, name.options, supported)


def test_options_of_a_name():
    text = "m?layer=3,-1&facet=key&project=TRUE&summary=mean&img_size=448x224&weights=/a b&version=1"
    assert options_of(text) == Options(
        layer=(3, -1), facet="key", project=True, summary="mean", img_size=(448, 224), weights="/a b", version="1"
    )
    assert options_of("m?pretrained=false") == Options(pretrained=False)
    assert options_of("m?img_size=98", ["img_size"]).img_size == (98, 98)
    assert options_of("m?mean=0.5&std=1,2,3") == Options(mean=(0.5, 0.5, 0.5), std=(1, 2, 3))
    assert options_of("m?dtype=float16&compile=true&other_sizes=tile", ()) == Options(
        dtype=torch.float16, compile=True, other_sizes="tile"
    )


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("facett=key", "unknown option of backbone 'm': 'facett'; did you mean 'facet'"),
        ("verson=2", "did you mean 'version'"),
        ("facet=keys", "unknown facet of a backbone 'keys'; did you mean 'key'"),
        ("summary=class", "unknown summary of a backbone 'class'"),
        ("layer=last", "option layer is a block number or several with commas, .* got 'last'"),
        ("layer=", "option layer"),
        ("layer=1;2", "option layer"),
        ("pretrained=yes", "option pretrained is true or false; got 'yes'"),
        ("img_size=0", "option img_size is a side in pixels or HEIGHTxWIDTH"),
        ("img_size=448x", "option img_size"),
        ("project=true", "backbone 'm' has no option 'project'; it has layer, facet, summary, pretrained, .*version"),
        ("layer=1&layer=2", "given twice"),
        ("weights=w.pt&pretrained=false", "pretrained=false takes random weights for 'm'; leave out it or weights"),
        ("layer", "written \\?key=value&key=value"),
    ],
)
def test_options_that_cannot_be(query, message):
    with pytest.raises(ConfigError, match=message):
        options_of(f"m?{query}", [key for key in OPTIONS if key != "project"])


@pytest.mark.parametrize("path", ["/a b/c&d+e%20=f?.pt", r"C:\weights\100%.bin", "/\u00fc/#1;2,3", "torch.pt"])
def test_paths_survive_a_name(path):
    name = parse_backbone("hf:x?layer=1").with_options(weights=path, summary=None)
    assert parse_backbone(str(name)) == name
    assert options_of(str(name)) == Options(layer=(1,), weights=path)


def test_the_home_directory_of_weights_is_expanded_once(monkeypatch):
    monkeypatch.setenv("HOME", "/home of/me")
    monkeypatch.setenv("USERPROFILE", "/home of/me")
    assert options_of("m?weights=~/w.pt").weights == "/home of/me/w.pt"
    assert options_of("m?weights=a/~/w.pt").weights == "a/~/w.pt"


def test_whitening_from_text_and_from_json():
    assert parse_whitening("mean", "0.5,-1,2e-1") == (0.5, -1.0, 0.2)
    assert parse_whitening("std", [1, 0.5, 2]) == (1.0, 0.5, 2.0)
    assert parse_whitening("image_std", "0.5") == parse_whitening("std", 0.5) == (0.5,) * 3


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("mean", "1,2", "option mean is a number or three with commas, finite, such as .* got '1,2'"),
        ("mean", "1,nan,1", "finite.* got '1,nan,1'"),
        ("std", "1,inf,1", "finite and above 0"),
        ("image_std", [1, 0, 1], r"image_std .*above 0.* got \[1, 0, 1\]"),
        ("std", "x", "got 'x'"),
        ("std", None, "got None"),
        ("std", [[1], 1, 1], "got"),
        ("std", {"r": 1}, "got"),
    ],
)
def test_whitenings_that_cannot_be(option, values, message):
    with pytest.raises(ConfigError, match=message):
        parse_whitening(option, values)


def test_blocks_are_counted_from_both_ends():
    blocks = nn.ModuleList(nn.Identity() for _ in range(4))
    assert choose_blocks(blocks, None, "m") == [3]
    assert choose_blocks(blocks, (0, -1, -4), "m") == [0, 3, 0]
    for layer in (4, -5):
        with pytest.raises(ConfigError, match=f"backbone 'm' has 4 blocks, 0 to 3; got layer={layer}"):
            choose_blocks(blocks, (layer,), "m")


def test_captured_outputs_come_in_order_and_hooks_go():
    layers = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    x = torch.randn(4, 2)
    with captured([layers[2], layers[0]]) as outputs:
        result = layers(x)
    assert torch.equal(outputs[0], layers[0](x))
    assert torch.equal(outputs[1], result)
    layers(x)
    assert len(outputs) == 2
    with pytest.raises(RuntimeError), captured([layers[0]]) as outputs:
        layers(torch.randn(1, 5))
    layers(x)
    assert outputs == []


# Short names


def test_the_names_of_the_published_configurations_exist():
    published = "dfn-clip dinov2-g_448px dinov2-l_448px paligemma radio-l_512px sam-h siglip siglip2-g siglip2 vit"
    assert set(published.split()) <= MODELS.keys()
    assert list_backbones() == sorted(MODELS)


@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if m.target])
def test_targets_are_well_formed(name):
    model = MODELS[name]
    target = parse_backbone(model.target)
    assert target.options.keys() <= set(FAMILIES[target.prefix].options)
    assert not target.options.keys() & set(COMMON)
    assert model.description.partition(":")[2]
    assert model.source or not target.options
    assert str(resolve_backbone(name)) == model.target


def test_options_of_the_name_go_before_those_of_the_table():
    assert str(resolve_backbone("dinov2-s?img_size=224")) == "timm:vit_small_patch14_dinov2.lvd142m?img_size=224"
    assert str(resolve_backbone("dinov2-s?layer=9")) == "timm:vit_small_patch14_dinov2.lvd142m?img_size=448&layer=9"
    assert str(resolve_backbone("vit?weights=/a%26b")) == f"{MODELS['vit'].target}?weights=/a%26b"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if number > 3 else []) for number, name in enumerate(TIMM_TARGETS)],
)
def test_timm_knows_the_weights_and_the_facts_of_the_description(name):
    timm = pytest.importorskip("timm")
    model_name, query = re.fullmatch(r"timm:([^?]+)\??(.*)", MODELS[name].target).groups()
    assert model_name in timm.list_pretrained(model_name)
    config = timm.get_pretrained_cfg(model_name)
    assert config.hf_hub_id == f"timm/{model_name}"  # where has_local_weights looks
    assert config.license == MODELS[name].licence.lower()
    side = int(query.removeprefix("img_size=") or 0)
    with torch.device("meta"):
        model = timm.create_model(model_name, pretrained=False, num_classes=0, **({"img_size": side} if side else {}))
    embedding = getattr(model, "patch_embed", None)
    if embedding is None:
        channels, pixels = model.num_features, config.input_size[1]
        assert f"stride {model.feature_info[-1]['reduction']}," in MODELS[name].description
    else:
        channels, pixels = model.embed_dim, embedding.grid_size[0] * embedding.patch_size[0]
        assert re.search(rf"\w/{embedding.patch_size[0]}\b", MODELS[name].description)
    assert f": {channels} channels" in MODELS[name].description
    assert f" {pixels} pixels" in MODELS[name].description


@pytest.mark.parametrize("name", OPEN_CLIP_TARGETS)
def test_open_clip_knows_the_weights_and_the_facts_of_the_description(name):
    open_clip = pytest.importorskip("open_clip")
    model_name, tag = MODELS[name].target.removeprefix("open_clip:").split("/")
    assert open_clip.get_pretrained_cfg(model_name, tag)["hf_hub"].rstrip("/") == MODELS[name].repository
    tower = open_clip.get_model_config(model_name)["vision_cfg"]
    description = MODELS[name].description
    assert f"/{tower['patch_size']}: {tower['width']} channels, {tower['image_size']} pixels" in description


def test_an_alias_builds_its_target_under_its_own_name(monkeypatch):
    monkeypatch.setitem(MODELS, "short", Model(TIMM_RANDOM, "tiny: for this test", "short"))
    backbone = create_backbone("short")
    assert (backbone.name, backbone.input_size) == ("short", (64, 64))
    assert backbone.weights_hash() == create_backbone(TIMM_RANDOM).weights_hash()
    assert create_backbone("short?img_size=32").input_size == (32, 32)
    assert create_backbone("short", img_size=(32, 48), dtype="bfloat16").autocast_dtype == torch.bfloat16


def test_unknown_names_and_options_give_the_nearest():
    with pytest.raises(ConfigError, match="unknown backbone 'dinov2-l_448'; did you mean 'dinov2-l_448px'"):
        create_backbone("dinov2-l_448")
    with pytest.raises(ConfigError, match="did you mean 'img_size'"):
        create_backbone(f"{TIMM_RANDOM}&imgsize=32")
    with pytest.raises(ConfigError, match="unknown option of backbone 'toy-vit': 'dtyp'; did you mean 'dtype'"):
        create_backbone("toy-vit?dtyp=bfloat16")
    with pytest.raises(ConfigError, match="'toy-vit' has no option 'layer'; it has dtype, compile, other_sizes"):
        create_backbone("toy-vit", layer=3)
    with pytest.raises(ConfigError, match=r"a Backbone brings its own options; leave out layer"):
        create_backbone(create_backbone("toy-vit"), layer=3)
    with pytest.raises(ConfigError, match="given twice"):
        create_backbone("toy-vit?dtype=float16", dtype="bfloat16")


# dtype, compile, other_sizes


def test_options_are_arguments_too():
    backbone = create_backbone("toy-vit-fixed", other_sizes="tile", dtype="float16", compile=None)
    assert backbone.name == "toy-vit-fixed?other_sizes=tile&dtype=float16"
    assert isinstance(backbone, WindowedBackbone)
    assert backbone.autocast_dtype == torch.float16


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, torch.bfloat16), (torch.float32, None)])
def test_a_dtype_is_an_argument_as_its_name_is(dtype, autocast):
    backbone = create_backbone("toy-vit", dtype=dtype)
    assert backbone.autocast_dtype == autocast
    assert backbone.name == f"toy-vit?dtype={str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@pytest.mark.parametrize("option", ["", "other_sizes=tile&"])
def test_dtype_is_the_autocast_of_the_encoder(option, size):
    name = f"toy-vit-fixed?{option}" if option else "toy-vit?"
    images = torch.randn(2, 3, *size)
    exact = create_backbone(f"{name}dtype=float32")(images)
    cast = create_backbone(f"{name}dtype=bfloat16")(images)
    assert cast.features.dtype == cast.summary.dtype == torch.float32
    error = (cast.features - exact.features).abs().max()
    assert 1e-4 < error < 0.1  # bfloat16 has 8 bits
    if not option:
        with torch.autocast("cpu", torch.bfloat16):
            by_hand = create_backbone("toy-vit").extract(images).features
        assert torch.equal(cast.features, by_hand.float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "unknown dtype of a backbone 'bf16'; did you mean 'bfloat16'"),
        ({"other_sizes": "tiles"}, "unknown other_sizes of a backbone 'tiles'; did you mean 'tile'"),
        ({"compile": "maybe"}, "option compile is true or false; got 'maybe'"),
        ({"other_sizes": "tile"}, "takes images of other sizes by itself; leave out other_sizes=tile"),
    ],
)
def test_common_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone("toy-vit", **options)


def test_compile_wraps_the_call():
    backbone, plain = create_backbone("toy-vit?compile=true"), create_backbone("toy-vit?compile=false")
    assert backbone._compiled_call_impl is not None
    assert plain._compiled_call_impl is None
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("the calls cannot be compared without compiling: torch has no compiler.set_stance before 2.6")
    images = torch.randn(1, 3, 64, 80)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(backbone(images).features, plain(images).features)


@pytest.mark.slow
def test_compiled_features_are_the_same():
    images = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        compiled = create_backbone("toy-vit", compile=True)(images)
    torch.testing.assert_close(compiled.features, create_backbone("toy-vit")(images).features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["toy-vit-fixed?other_sizes=tile", "toy-vit?dtype=bfloat16", TIMM_RANDOM])
def test_checkpoints_keep_the_options(name, tmp_path):
    encoder = create_encoder(name, "resize-conv", 2)
    save_checkpoint(encoder, tmp_path / "last.pth")
    loaded = load_from_file(tmp_path / "last.pth")
    assert loaded.backbone.describe() == encoder.backbone.describe()
    assert loaded.backbone.name == name
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        assert torch.equal(loaded(images).high_res, encoder(images).high_res)


def test_windows_are_no_other_backbone(tmp_path):
    """A checkpoint trained with resized images serves with windows: the weights are the same."""
    save_checkpoint(create_encoder("toy-vit-fixed", "resize-conv", 2), tmp_path / "last.pth")
    encoder = load_from_file(tmp_path / "last.pth", featurizer="toy-vit-fixed?other_sizes=tile")
    assert encoder(torch.randn(1, 3, 128, 96)).low_res.shape[2:] == (16, 12)


# Windows


def tiled() -> tuple[WindowedBackbone, Backbone]:
    inner = create_backbone("toy-vit-fixed")
    return WindowedBackbone(inner), inner


def windows_by_loop(inner: Backbone, image: Tensor) -> Tensor:
    """One window after the other, every cell the mean of those over it, weighted by the distance to their border."""
    p, side = inner.patch_size, inner.input_size[0] // inner.patch_size
    size = image.shape[1] // p, image.shape[2] // p
    starts = []
    for length in size:
        count = 1
        while count * side - (count - 1) * (side // 4) < length:
            count += 1
        starts.append([round(k * (length - side) / max(1, count - 1)) for k in range(count)])
    total, weights = torch.zeros(inner.embed_dim, *size), torch.zeros(size)
    for y, x in itertools.product(*starts):
        features = inner(image[None, :, p * y : p * (y + side), p * x : p * (x + side)]).features[0]
        for i, j in itertools.product(range(side), repeat=2):
            weight = min(i + 1, side - i) * min(j + 1, side - j)
            total[:, y + i, x + j] += weight * features[:, i, j]
            weights[y + i, x + j] += weight
    return total / weights


@pytest.mark.parametrize("size", [(64, 72), (104, 64), (128, 184), (200, 120)])
def test_windows_against_a_loop(size):
    backbone, inner = tiled()
    images = torch.randn(2, 3, *size)
    out = backbone(images)
    for features, image in zip(out.features, images, strict=True):
        torch.testing.assert_close(features, windows_by_loop(inner, image), atol=1e-5, rtol=1e-5)
    whole = inner(resize(images, (64, 64)))
    torch.testing.assert_close(out.summary, whole.summary, atol=1e-5, rtol=1e-5)


def test_windows_at_the_native_size_are_the_backbone():
    backbone, inner = tiled()
    images = torch.randn(3, 3, 64, 64)
    assert torch.equal(backbone(images).features, inner(images).features)
    assert torch.equal(backbone(images).summary, inner(images).summary)


class SumOfPixels(ToyViT):
    """Features that need no context: what a window says of a place does not depend on the window."""

    def extract(self, images: Tensor) -> BackboneOutput:
        return BackboneOutput(self.patch_embed(images), None)


def test_windows_that_agree_are_blended_without_a_trace():
    inner = SumOfPixels(flexible=False)
    images = torch.randn(1, 3, 152, 216)
    torch.testing.assert_close(WindowedBackbone(inner)(images).features, inner.patch_embed(images))


def test_windows_are_independent_of_the_batch():
    backbone, _ = tiled()
    images = torch.randn(3, 3, 88, 120)
    torch.testing.assert_close(backbone(images).features[1:2], backbone(images[1:2]).features, atol=1e-5, rtol=1e-5)


def test_windows_in_half_precision():
    backbone, _ = tiled()
    images = torch.randn(1, 3, 88, 120)
    exact = backbone(images).features
    half = backbone.bfloat16()(images.bfloat16()).features
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(half.float(), exact).mean() > 0.99


def test_an_image_smaller_than_a_window_is_refused_with_the_size_to_take():
    backbone, _ = tiled()
    assert backbone.fit_size(40, 101) == (64, 104)
    with pytest.raises(InputError, match=r"got 40x104, the nearest is 64x104"):
        backbone(torch.zeros(1, 3, 40, 104))
    encoder = create_encoder(backbone, "bilinear", 2)
    assert encoder(torch.zeros(1, 3, 40, 101)).low_res.shape[2:] == (8, 13)


def test_windows_stay_frozen_and_keep_the_hash():
    backbone, inner = tiled()
    known = inner.weights_hash()
    assert backbone.weights_hash() == known
    nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.half().weights_hash() == known
    with torch.no_grad():
        inner.norm.bias.add_(1)
    assert backbone.weights_hash() != known
