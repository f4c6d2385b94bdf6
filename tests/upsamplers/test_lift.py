"""LiFT against the published network, put together from its description under its own names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featsharp.errors import ConfigError, InputError
from featsharp.upsamplers.lift import Doubling, LiFT

# Ours by the published names; the rest of each name is the same.
PUBLISHED = {
    "image_convs_1": "image_fine",
    "image_convs_2": "image_coarse",
    "up1.up": "expand",
    "up1.conv_1.double_conv": "fuse",
    "outc": "project",
}


class Published(nn.Module):
    """LiFT as published, for images of exactly ``patch`` pixels per cell, patch 8 or 16."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, *, stride: int = 1, bias: bool = False) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
            return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.pool = nn.MaxPool2d(2) if patch == 16 else nn.Identity()
        self.image_convs_1 = nn.Sequential(*conv(3, 32, stride=2, bias=True), *conv(32, 32, stride=2, bias=True))
        self.image_convs_2 = nn.Sequential(*conv(32, 32, stride=2, bias=True))
        half = (channels + 32) // 2
        self.up1 = nn.Module()
        self.up1.up = nn.ConvTranspose2d(channels + 32, half, 2, stride=2)
        self.up1.conv_1 = nn.Module()
        self.up1.conv_1.double_conv = nn.Sequential(
            *conv(half + 32, channels // 2), *conv(channels // 2, channels // 2)
        )
        self.outc = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        fine = self.pool(self.image_convs_1(image))
        doubled = self.up1.up(torch.cat([features, self.image_convs_2(fine)], 1))
        return self.outc(self.up1.conv_1.double_conv(torch.cat([doubled, fine], 1)))


def pair(patch: int, factor: int = 2, channels: int = 6) -> tuple[Published, LiFT]:
    """The published network and ours with its weights and (not trivial) running statistics, float64, eval."""
    published = Published(channels, patch).double()
    for module in published.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    ours = LiFT(channels, factor, image_scale=patch).double()
    state = {}
    for key, value in published.state_dict().items():
        theirs = next(name for name in PUBLISHED if key.startswith(f"{name}."))
        state[f"doubling.{PUBLISHED[theirs]}{key.removeprefix(theirs)}"] = value
    ours.load_state_dict(state)
    return published.eval(), ours.eval()


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("grid", [(3, 5), (4, 2), (1, 1), (1, 7)])
def test_equals_the_published_network_on_images_of_its_size(patch, grid):
    published, ours = pair(patch)
    features = torch.randn(2, 6, *grid, dtype=torch.float64)
    image = torch.randn(2, 3, grid[0] * patch, grid[1] * patch, dtype=torch.float64)
    torch.testing.assert_close(ours.upsample(features, image), published(image, features), atol=1e-12, rtol=0)


@pytest.mark.parametrize("patch", [8, 16])
def test_further_passes_see_the_image_doubled(patch):
    published, ours = pair(patch, factor=8)
    features = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    image = torch.randn(1, 3, 2 * patch, 3 * patch, dtype=torch.float64)
    out, guide = features, image
    for _ in range(3):
        out = published(guide, out)
        guide = F.interpolate(guide, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours.upsample(features, image), out, atol=1e-12, rtol=0)


def test_further_passes_use_the_detail_that_a_larger_image_has():
    published, ours = pair(8, factor=4)
    features = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    image = torch.randn(1, 3, 40, 60, dtype=torch.float64)
    out = features
    for size in ((16, 24), (32, 48)):
        guide = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
        out = published(guide, out)
    torch.testing.assert_close(ours.upsample(features, image), out, atol=1e-12, rtol=0)


def test_patches_of_14_are_pooled_to_twice_the_grid():
    """At 14 pixels per cell the stem gives ceil(3.5 n) cells, and each of the 2 n takes the largest that it meets."""
    published, ours = pair(8)
    ours.image_scale = 14
    features, image = torch.randn(1, 6, 3, 5).double(), torch.randn(1, 3, 42, 70).double()
    stem = published.image_convs_1(image)
    assert stem.shape[2:] == (11, 18)
    fine = stem.new_empty(1, 32, 6, 10)
    for y in range(6):
        for x in range(10):
            rows, cols = slice(y * 11 // 6, -(-(y + 1) * 11 // 6)), slice(x * 18 // 10, -(-(x + 1) * 18 // 10))
            fine[..., y, x] = stem[..., rows, cols].amax((2, 3))
    doubled = published.up1.up(torch.cat([features, published.image_convs_2(fine)], 1))
    expected = published.outc(published.up1.conv_1.double_conv(torch.cat([doubled, fine], 1)))
    torch.testing.assert_close(ours.upsample(features, image), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [8, 14, 16])
def test_the_resolution_of_the_image_matters_little(scale):
    """The same picture, a smooth one, at several sizes."""
    upsampler = LiFT(8, 2, image_scale=scale).eval()
    features, coarse = torch.randn(1, 8, 4, 6), torch.randn(1, 3, 4, 6)
    small, large = (
        upsampler.upsample(features, F.interpolate(coarse, (n * 4, n * 6), mode="bicubic")) for n in (16, 40)
    )
    assert F.cosine_similarity(small, large).min() > 0.995


@pytest.mark.parametrize(
    ("channels", "count"), [(384, 1_187_280), (768, 4_417_296), (1024, 7_717_520), (1152, 9_711_696)]
)
def test_parameters(channels, count):
    for factor in (2, 8):
        with torch.device("meta"):
            assert sum(p.numel() for p in LiFT(channels, factor).parameters()) == count


def test_gradients_of_a_pass():
    doubling = Doubling(3).double().eval()
    features = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    image = torch.randn(1, 3, 16, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(doubling, (features, image, 8), fast_mode=True)
    doubling(features, image, 8).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in doubling.parameters())


def test_running_statistics_decide_in_eval_mode():
    upsampler = LiFT(4, 2)
    features, image = torch.randn(3, 4, 3, 3), torch.randn(3, 3, 48, 48)
    before = upsampler.eval().upsample(features, image)
    upsampler.train().upsample(features, 5 * image)
    after = upsampler.eval().upsample(features, image)
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(upsampler.upsample(features[1:2], image[1:2]), after[1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    upsampler = LiFT(32, 4).eval()
    features, image = torch.randn(1, 32, 3, 5).to(dtype), torch.randn(1, 3, 50, 70).to(dtype)
    exact = upsampler.upsample(features.float(), image.float())
    out = upsampler.to(dtype).upsample(features, image)
    assert out.dtype == dtype
    assert out.shape == (1, 32, 12, 20)
    assert F.cosine_similarity(out.float(), exact).min() > 0.99


def test_factors_and_options_that_cannot_be():
    with pytest.raises(ConfigError, match="got factor 1, use 2"):
        LiFT(8, 1)
    with pytest.raises(ConfigError, match="powers of two; got 6, use 4 or 8"):
        LiFT(8, 6)
    for scale in (7, 8.5, True, "16"):
        with pytest.raises(ConfigError, match="at least 8; got"):
            LiFT(8, 2, image_scale=scale)
    with pytest.raises(InputError, match="no other size"):
        LiFT(8, 2).upsample(torch.randn(1, 8, 3, 3), torch.randn(1, 3, 48, 48), (7, 7))
