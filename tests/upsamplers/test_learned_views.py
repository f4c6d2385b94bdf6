"""The block on few views: where it starts, what it is made of, and that it learns."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.builder import create_encoder
from featsharp.errors import ConfigError
from featsharp.ops.resize import resize
from featsharp.upsamplers.views import LEARNED

SIZE = (64, 96)


def encoder_of(factor=2, **options):
    torch.manual_seed(0)
    return create_encoder("toy-vit", "learned-views", factor, upsampler_options=options).eval()


def picture(seed=0, count=1):
    return torch.randn(count, 3, 2 * SIZE[0], 2 * SIZE[1], generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_five_passes_start_as_their_views():
    views = create_encoder("toy-vit", "views", 2, upsampler_options={"views": LEARNED[5]}).eval()
    found = encoder_of()(picture(), low_res_size=SIZE).high_res
    torch.testing.assert_close(found, views(picture(), low_res_size=SIZE).high_res, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("factor", [1.5, 2, 4])
def test_one_pass_starts_as_bilinear(factor):
    out = encoder_of(factor, passes=1)(picture(), low_res_size=SIZE)
    grid = round(factor * 8), round(factor * 12)
    torch.testing.assert_close(out.high_res, resize(out.low_res, grid), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("passes", sorted(LEARNED))
def test_the_passes_are_as_many_as_it_says(passes):
    encoder = encoder_of(passes=passes)
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    encoder(picture(), low_res_size=SIZE)
    assert sum(seen) == passes


@torch.no_grad()
def test_the_linear_form_is_its_weight_applied_to_its_maps():
    encoder = encoder_of(linear=True)
    torch.nn.init.normal_(encoder.upsampler.mix)
    maps = encoder.upsampler.linear_maps(picture(), encoder.encode, SIZE)
    expected = torch.einsum("cd,bdhw->bchw", encoder.upsampler.linear_weight, maps)
    torch.testing.assert_close(encoder(picture(), low_res_size=SIZE).high_res, expected, atol=1e-4, rtol=1e-4)
    assert encoder.upsampler.variant == "linear"


@pytest.mark.slow
def test_block_picture_and_mix_learn():
    """A few steps towards a map that depends on features and picture take most of the error away."""
    encoder = encoder_of(passes=1).train()
    image = picture(1)
    with torch.no_grad():
        start = encoder(image, low_res_size=SIZE).high_res
        target = start.roll(1, 1) + resize(image, (16, 24)).mean(1, keepdim=True)
    optimizer = torch.optim.Adam(encoder.upsampler.parameters(), 3e-3)
    errors = []
    for _ in range(60):
        loss = F.mse_loss(encoder(image, low_res_size=SIZE).high_res, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.2 * errors[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.upsampler.parameters())


@torch.no_grad()
def test_another_output_size_reads_the_same_map():
    encoder = encoder_of()
    torch.nn.init.normal_(encoder.upsampler.block.mlp.down.weight, std=0.1)
    whole = encoder(picture(), low_res_size=SIZE).high_res
    for size in ((16, 24), (31, 50), (9, 13)):
        found = encoder(picture(), low_res_size=SIZE, output_size=size).high_res
        torch.testing.assert_close(found, resize(whole, size), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_limited_memory_gives_the_same_map():
    encoder = encoder_of()
    torch.nn.init.normal_(encoder.upsampler.block.mlp.down.weight, std=0.1)
    whole = encoder(picture(), low_res_size=SIZE).high_res
    encoder.max_memory = 2**30
    torch.testing.assert_close(encoder(picture(), low_res_size=SIZE).high_res, whole, atol=1e-4, rtol=1e-4)


def test_other_numbers_of_passes_are_refused():
    with pytest.raises(ConfigError, match=r"passes must be one of 1, 5; got 3"):
        encoder_of(passes=3)
