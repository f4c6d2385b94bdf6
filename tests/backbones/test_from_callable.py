"""Foreign modules as backbones: what is found out about them, and what is refused."""

import copy
import logging
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones import from_callable
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError, InputError


class Patches(nn.Module):
    """Patch embedding and one mixing step to tokens [B, P + h * w, C]; prefix tokens hold the mean token."""

    def __init__(self, patch_size: int = 8, num_prefix: int = 0, dim: int = 12, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embed = nn.Conv2d(3, dim, patch_size, patch_size)
        self.embed.weight.data = torch.randn(self.embed.weight.shape, generator=generator) / patch_size
        self.num_prefix, self.transposed = num_prefix, transposed

    def maps(self, images: Tensor) -> Tensor:
        maps = self.embed(images)
        return maps.transpose(2, 3) if self.transposed else maps

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.maps(images).flatten(2).transpose(1, 2)
        mean = tokens.mean(1, keepdim=True)
        return torch.cat([mean.expand(-1, self.num_prefix, -1), tokens + 0.3 * mean], dim=1)


class FixedPatches(Patches):
    """The same with a stored position embedding for 56x56 pixels: any other size raises."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        count = self.num_prefix + (56 // self.embed.kernel_size[0]) ** 2
        self.positions = nn.Parameter(torch.zeros(1, count, 1))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.positions


class Pair(NamedTuple):
    summary: Tensor
    features: Tensor


def grid_of(module: Patches, images: Tensor) -> Tensor:
    """What the backbone has to return, by hand."""
    maps = module.embed(images)
    return maps + 0.3 * maps.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("patch_size", [8, 14])
def test_tokens_are_understood(num_prefix, patch_size):
    module = Patches(patch_size, num_prefix)
    backbone = from_callable(module, name="mine", input_size=(112, 112))
    assert (backbone.patch_size, backbone.num_prefix_tokens, backbone.embed_dim) == (patch_size, num_prefix, 12)
    assert (backbone.layout, backbone.flexible, backbone.summary_dim) == ("BNC", True, None)
    images = torch.randn(2, 3, 3 * patch_size, 5 * patch_size)
    torch.testing.assert_close(backbone(images).features, grid_of(module, images))


def test_maps_are_understood_and_the_module_is_frozen():
    trunk = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Dropout(0.5), nn.GELU(), nn.Conv2d(8, 20, 4, 4))
    backbone = from_callable(trunk, input_size=(64, 96))
    assert (backbone.patch_size, backbone.embed_dim, backbone.layout) == (16, 20, "BCHW")
    assert not trunk.training
    assert not any(p.requires_grad for p in trunk.parameters())
    images = torch.randn(2, 3, 48, 80)
    torch.testing.assert_close(backbone(images).features, trunk(images))


def test_functions_methods_and_copies():
    module = Patches(8, 1)
    images = torch.randn(1, 3, 32, 48)
    from_lambda = from_callable(lambda x: module(x), input_size=(64, 64))
    from_method = from_callable(module.maps, input_size=(64, 64))
    assert from_lambda.state_dict() == {}
    assert set(from_method.state_dict()) == {"owner.embed.weight", "owner.embed.bias"}
    torch.testing.assert_close(from_lambda(images).features, grid_of(module, images))
    torch.testing.assert_close(from_method(images).features, module.embed(images))

    twin = copy.deepcopy(from_method)
    with torch.no_grad():
        twin.owner.embed.weight.zero_()
    assert twin(images).features.std() < from_method(images).features.std() / 2


def test_a_half_precision_module_is_probed_in_its_own_dtype():
    backbone = from_callable(Patches(8, 1).bfloat16(), input_size=(64, 64))
    assert backbone(torch.randn(1, 3, 64, 64).bfloat16()).features.dtype == torch.bfloat16


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_module_that_raises_elsewhere_is_fixed(prefix, caplog):
    module = FixedPatches(patch_size=8, num_prefix=prefix)
    with caplog.at_level(logging.INFO, logger="featsharp"):
        backbone = from_callable(module, name="mine", input_size=(56, 56), num_prefix_tokens=prefix)
    assert not backbone.flexible
    assert backbone.patch_size == 8
    assert "fixed to 56x56" in caplog.text
    with pytest.raises(InputError, match="a fixed size"):
        backbone(torch.zeros(1, 3, 56, 64))


def test_a_module_that_resizes_its_input_is_fixed():
    inner = Patches(8, 1)
    backbone = from_callable(lambda x: inner(F.interpolate(x, (56, 56))), input_size=(56, 56), patch_size=8)
    assert not backbone.flexible
    assert backbone.num_prefix_tokens == 1


def test_a_module_that_takes_some_multiples_only_is_fixed():
    def coarse_to_fine(images: Tensor) -> Tensor:
        pooled = F.interpolate(F.avg_pool2d(images, 32), scale_factor=4)
        return torch.cat([F.avg_pool2d(images, 8), pooled], dim=1)

    backbone = from_callable(coarse_to_fine, input_size=(64, 64))
    assert backbone.patch_size == 8
    assert not backbone.flexible


def test_fixed_on_request_is_tried_at_its_size_only():
    seen = set()

    def call(images: Tensor) -> Tensor:
        seen.add(tuple(images.shape[-2:]))
        return F.avg_pool2d(images, 8)

    assert not from_callable(call, input_size=(48, 64), flexible=False).flexible
    assert seen == {(48, 64)}


def test_one_size_with_a_likely_patch_needs_no_help_and_an_ambiguous_one_does():
    assert from_callable(Patches(16, 1), input_size=(224, 224), flexible=False).num_prefix_tokens == 1
    # 56 pixels: 10 tokens are 2x2 patches of 28 and 6 more, or 1 patch of 56 and 9 more, or ...
    small = Patches(28, 6)
    with pytest.raises(ConfigError, match="10 tokens fit patch sizes 28, 56; pass patch_size="):
        from_callable(small, input_size=(56, 56), flexible=False)
    backbone = from_callable(small, input_size=(56, 56), flexible=False, patch_size=28)
    assert backbone.num_prefix_tokens == 6


@pytest.mark.parametrize("size", [(112, 112), (112, 168)])
@pytest.mark.parametrize("flexible", [True, False])
def test_a_transposed_grid_is_caught(size, flexible):
    with pytest.raises(ConfigError, match=r"transposed.*output="):
        from_callable(Patches(8, 1, transposed=True), input_size=size, flexible=flexible, patch_size=8)


def test_a_transposed_map_is_caught_by_its_shape_or_its_order():
    module = Patches(8, transposed=True)
    with pytest.raises(ConfigError, match="axes are in another order"):
        from_callable(module.maps, input_size=(64, 64))
    with pytest.raises(ConfigError, match="transposed"):
        from_callable(module.maps, input_size=(96, 96), flexible=False)
    mended = from_callable(module.maps, input_size=(64, 64), output=lambda y: y.transpose(2, 3))
    assert mended.grid_size((64, 64)) == (8, 8)


def test_a_mirrored_grid_is_caught():
    module = Patches(8)
    with pytest.raises(ConfigError, match="another order"):
        from_callable(lambda x: module.maps(x).flip(3), input_size=(64, 64))


def test_tokens_that_react_to_everything_do_not_hide_the_order():
    module = Patches(8, 1)

    def with_artefact(images: Tensor) -> Tensor:
        tokens = module(images).clone()
        tokens[:, 20] += 50 * images.mean((1, 2, 3))[:, None]
        return tokens

    assert from_callable(with_artefact, input_size=(64, 64)).num_prefix_tokens == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: F.avg_pool2d(x, 8).movedim(1, -1), "axes are in another order"),
        (lambda x: F.avg_pool2d(x, 8).flatten(2), "axes are in another order"),
        (lambda x: F.avg_pool2d(x, 8).flatten(2).permute(2, 0, 1), "first axis is not the batch"),
        (lambda x: x.mean((2, 3)), "neither BCHW nor BNC"),
        (lambda x: F.avg_pool2d(x, (8, 16)), "no grid of whole square patches"),
        (lambda x: x[:, :, 3:, 3:], "no grid of whole square patches"),
        (lambda x: {"logits": x}, "a mapping with logits"),
        (lambda x: [x, x], "no part is plainly the features"),
        (lambda x: x @ x.new_zeros(7, 7), "fails on whitened images.*input_size="),
        (lambda x: F.avg_pool2d(x[:1], 8), "it has to take batches"),
    ],
)
def test_outputs_that_cannot_be_used(call, message):
    with pytest.raises(ConfigError, match=message):
        from_callable(call, input_size=(64, 64))


@pytest.mark.parametrize("told", [{"patch_size": 16}, {"embed_dim": 3}, {"num_prefix_tokens": 0}, {"layout": "BCHW"}])
def test_what_is_told_is_checked(told):
    with pytest.raises(ConfigError, match=next(iter(told))):
        from_callable(Patches(8, 1), input_size=(64, 64), **told)
    right = {"patch_size": 8, "embed_dim": 12, "num_prefix_tokens": 1, "layout": "BNC"}
    assert from_callable(Patches(8, 1), input_size=(64, 64), **right).patch_size == 8


def test_arguments_that_make_no_sense():
    with pytest.raises(ConfigError, match="layout is"):
        from_callable(Patches(), layout="BHWC")
    with pytest.raises(ConfigError, match="module or function"):
        from_callable("resnet18")
    with pytest.raises(ConfigError, match=r"summary of 'callable' has to be \[B, C\]"):
        from_callable(Patches(8, 1), input_size=(64, 64), summary=lambda tokens: tokens)


@pytest.mark.parametrize(
    ("wrap", "summary_dim"),
    [
        (lambda m, x: m, None),
        (lambda m, x: {"x_norm_patchtokens": m, "x_norm_clstoken": x.mean((2, 3))}, 3),
        (lambda m, x: {"features": m}, None),
        (lambda m, x: SimpleNamespace(last_hidden_state=m, pooler_output=x.mean((2, 3))), 3),
        (lambda m, x: SimpleNamespace(last_hidden_state=m, pooler_output=None), None),
        (lambda m, x: (x.mean((2, 3)), m), 3),
        (lambda m, x: (m, x.mean((2, 3))), 3),
        (lambda m, x: [m], None),
        (lambda m, x: Pair(x.mean((2, 3)), m), 3),
    ],
)
def test_known_outputs_are_picked_apart(wrap, summary_dim):
    module = Patches(8)
    backbone = from_callable(lambda x: wrap(module(x), x), input_size=(64, 64))
    images = torch.randn(2, 3, 64, 64)
    out = backbone(images)
    torch.testing.assert_close(out.features, grid_of(module, images))
    assert backbone.summary_dim == summary_dim
    if summary_dim is None:
        assert out.summary is None
    else:
        torch.testing.assert_close(out.summary, images.mean((2, 3)))


def test_summary_and_output_by_function():
    module = Patches(8, 1)
    backbone = from_callable(
        lambda x: {"hidden": [x, module(x)]},
        input_size=(64, 64),
        output=lambda raw: raw["hidden"][-1],
        summary=lambda raw: raw["hidden"][-1][:, 0],
    )
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone(images).summary, module(images)[:, 0])


def test_global_random_state_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    from_callable(Patches(8, 1), input_size=(64, 64))
    # Building Patches draws the default initialisation; from_callable itself must draw nothing more.
    torch.manual_seed(5)
    Patches(8, 1)
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    from_callable(Patches(8, 1), input_size=(64, 64))
    assert torch.equal(torch.get_rng_state(), expected)


# Models of other libraries, as they are.


def test_timm_vit_runs_unchanged():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, dynamic_img_size=True)
    backbone = from_callable(vit.forward_features, summary=lambda tokens: tokens[:, 0])
    assert (backbone.patch_size, backbone.num_prefix_tokens, backbone.embed_dim) == (16, 1, 192)
    assert backbone.flexible
    assert backbone.summary_dim == 192
    assert backbone(torch.zeros(1, 3, 48, 80)).features.shape == (1, 192, 3, 5)
    assert_sharpens(backbone)
    fixed = from_callable(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0).forward_features)
    assert not fixed.flexible
    assert fixed.patch_size == 16


def test_torchvision_resnet_runs_unchanged():
    torchvision = pytest.importorskip("torchvision")
    resnet = torchvision.models.resnet18(weights=None)
    trunk = nn.Sequential(*list(resnet.children())[:-2])
    backbone = from_callable(trunk, name="resnet18")
    assert (backbone.patch_size, backbone.embed_dim, backbone.layout) == (32, 512, "BCHW")
    assert backbone(torch.zeros(1, 3, 96, 160)).features.shape == (1, 512, 3, 5)
    assert_sharpens(backbone)


def test_transformers_dinov2_runs_unchanged():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=98, patch_size=14
    )
    backbone = from_callable(transformers.Dinov2Model(config), name="dinov2-tiny", input_size=(98, 98))
    assert (backbone.patch_size, backbone.num_prefix_tokens, backbone.embed_dim) == (14, 1, 48)
    assert backbone.summary_dim == 48
    assert backbone.flexible
    out = backbone(torch.zeros(2, 3, 42, 70))
    assert out.features.shape == (2, 48, 3, 5)
    assert out.summary.shape == (2, 48)
    assert_sharpens(backbone)


def assert_sharpens(backbone):
    """Every upsampler takes the wrapped model, non-square images too (F11)."""
    patch = backbone.patch_size
    for name in ("bilinear", "tile", "featup", "featsharp"):
        with torch.no_grad():
            out = create_encoder(backbone, name, 2)(torch.randn(1, 3, 4 * patch, 6 * patch))
        rows, cols = out.low_res.shape[2:]
        assert out.high_res.shape == (1, backbone.embed_dim, 2 * rows, 2 * cols)
        assert out.high_res.isfinite().all()


def test_a_module_that_gives_nan_is_named():
    class Broken(Patches):
        def forward(self, images):
            return super().forward(images) * torch.nan

    with pytest.raises(ConfigError, match="gives NaN or infinite features"):
        from_callable(Broken(8, 1), input_size=(64, 64))


@pytest.mark.parametrize(
    "whitening",
    [
        {"mean": 0.5},
        {"mean": (0.5,)},
        {"std": (0, 0, 0)},
        {"std": (1, 1, float("nan"))},
        {"mean": "abc"},
        {"std": None},
    ],
)
def test_a_whitening_that_is_not_three_numbers_is_refused(whitening):
    with pytest.raises(ConfigError, match="are three numbers each, those of std above 0; got mean="):
        from_callable(nn.Conv2d(3, 8, 16, 16), **whitening)


def test_a_whitening_for_pixels_up_to_255_is_refused():
    with pytest.raises(ConfigError, match=r"got mean=\(123.675, 116.28, 103.53\).*Divide both by 255"):
        from_callable(nn.Conv2d(3, 8, 16, 16), mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    scaled = from_callable(nn.Conv2d(3, 8, 16, 16), mean=(0, 0, 0), std=(1 / 255,) * 3)  # a module for 0..255
    assert scaled.std == (1 / 255,) * 3
