"""What only a GPU can show; skipped visibly without one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import featsharp
from featsharp.data.views import ViewConfig, Views, cut_canvas, sample_homography
from featsharp.ops.local_attention import local_attention
from featsharp.training.objectives.multi_view import MultiViewConfig, MultiViewObjective
from featsharp.upsamplers import UPSAMPLERS, list_upsamplers

pytestmark = pytest.mark.gpu


def nearest(image, features, size):
    return F.interpolate(features, size)


# Names with what some cannot be built without.
NEEDED = {
    "custom": {"function": nearest},
    "super-resolution": {"enlarge": lambda images: F.interpolate(images, scale_factor=2)},
}
CASES = {name: (name, NEEDED.get(name, {})) for name in list_upsamplers()}


@pytest.mark.parametrize("border", ["clip", "reflect"])
def test_local_attention_agrees_with_the_cpu(border):
    query, key, value = (torch.randn(2, 19, 13, 4, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(4, 7, 7, dtype=torch.float64)
    expected = local_attention(query, key, value, window=7, bias=bias, border=border)
    on_gpu = local_attention(*(x.cuda() for x in (query, key, value)), window=7, bias=bias.cuda(), border=border)
    torch.testing.assert_close(on_gpu.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_upsamplers_agree_with_the_cpu(case, dtype):
    name, options = CASES[case]
    factor = 1 if UPSAMPLERS[name].factory.factors == "one" else 2
    encoder = featsharp.create_encoder("toy-vit", name, factor, upsampler_options=options)
    images = torch.randn(2, 3, 128, 96)
    expected = encoder(images).high_res
    found = encoder.to("cuda", dtype)(images.to("cuda", dtype)).high_res
    assert found.device.type == "cuda"
    assert torch.isfinite(found).all()
    if dtype is torch.float32:
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_training_step_agrees_with_the_cpu():
    canvas, mask = cut_canvas(picture(), (128, 128))
    rng = np.random.default_rng(0)
    homographies = np.stack([sample_homography((128, 128), ViewConfig(), rng) for _ in range(2)])
    views = Views(canvas[None], mask[None], torch.from_numpy(homographies).float()[None])
    gradients = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        encoder = featsharp.create_encoder("toy-vit", "featsharp", 2).to(device)
        objective = MultiViewObjective(encoder.embed_dim, 2, MultiViewConfig()).to(device)
        objective.backward(encoder, Views(*(x.to(device) for x in views)), (64, 64))
        gradients.append([p.grad.cpu() for p in encoder.upsampler.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-4)


def picture():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 140), Image.Resampling.BICUBIC)
