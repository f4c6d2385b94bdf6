"""Checks of a device against the CPU and of kernels against their references, as plain functions.

`tests/test_gpu.py` and `tests/ops/test_local_attention_triton.py` run them as tests, `benchmarks/gpu.py` on a bare
machine without pytest. A check raises AssertionError where it does not hold.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import featsharp
from featsharp.data.views import ViewConfig, Views, cut_canvas, sample_homography
from featsharp.names import dtype_name
from featsharp.ops.local_attention import local_attention
from featsharp.testing import check_upsampler
from featsharp.training.objectives.multi_view import MultiViewConfig, MultiViewObjective
from featsharp.upsamplers import UPSAMPLERS, list_upsamplers
from featsharp.upsamplers.base import Upsampler

Check = Callable[[], None]
Maps = tuple[Tensor, Tensor, Tensor, Tensor]  # query, key, value, bias

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def nearest(image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(features, size)


# Options of upsamplers that cannot be built without.
NEEDED = {
    "custom": {"function": nearest},
    "super-resolution": {"enlarge": lambda images: F.interpolate(images, scale_factor=2)},
}


class Attention(NamedTuple):
    """A case of local attention."""

    size: tuple[int, int]  # of the keys
    factor: int  # queries per key and axis
    heads: int
    value_heads: int
    window: int
    border: str
    dim: int = 5
    value_dim: int = 20

    @property
    def scale(self) -> float:
        return 0.7 if self.dim < 16 else self.dim**-0.5


ODD_SIZES = (
    Attention((2, 3), 1, 2, 2, 7, "clip"),
    Attention((9, 11), 1, 2, 2, 3, "clip"),
    Attention((1, 1), 1, 1, 1, 3, "reflect"),
    Attention((10, 3), 1, 1, 1, 7, "reflect"),
    Attention((3, 9), 2, 2, 1, 5, "zeros"),
    Attention((4, 3), 3, 2, 2, 3, "replicate"),
    Attention((2, 1), 16, 1, 1, 3, "clip"),
    Attention((5, 9), 1, 1, 1, 1, "zeros"),
)
# Channels as the models have them, which decide how much of a GPU's shared memory a kernel takes.
MODEL_SIZES = (
    Attention((9, 7), 1, 2, 2, 7, "clip", 48, 48),  # FeatSharp
    Attention((9, 7), 1, 1, 1, 7, "reflect", 32, 384),  # JBU
)


def device_checks(device: str) -> dict[str, Check]:
    """What the CPU computes, ``device`` computes too: local attention, all upsamplers in all types, a training step.

    And every upsampler keeps the promises of the conformance suite there.
    """
    checks: dict[str, Check] = {
        **{
            f"local attention, {border}": partial(_local_attention_agrees, device, border)
            for border in ("clip", "reflect", "shift")
        },
        **{
            f"{name}, {dtype_name(dtype)}": partial(_upsampler_agrees, device, name, dtype)
            for name in list_upsamplers()
            for dtype in DTYPES
        },
        "training step": partial(_training_step_agrees, device),
        **{f"{name}, conformance": partial(_upsampler_conforms, device, name) for name in list_upsamplers()},
    }
    return {name: partial(_in_full_precision, check) for name, check in checks.items()}


def _in_full_precision(check: Check) -> None:
    """Run a check without TF32, in which GPUs convolve by default: ten bits are not the CPU's numbers."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check()


def kernel_checks(device: str) -> dict[str, dict[str, Check]]:
    """For each operation with Triton kernels: forward and all gradients against the reference."""
    return {"local_attention": dict(_attention_checks(device))}


def _attention_checks(device: str) -> Iterator[tuple[str, Check]]:
    for case in (*ODD_SIZES, *MODEL_SIZES):
        size = f"{case.size[0]}x{case.size[1]} keys, factor {case.factor}, window {case.window}, {case.border}"
        # Triton's interpreter, which takes a minute for some of them, computes all types in float32.
        for dtype in DTYPES if device != "cpu" or case is ODD_SIZES[4] else DTYPES[:1]:
            name = f"{size}, {case.dim} and {case.value_dim} channels, {dtype_name(dtype)}"
            yield name, partial(attention_agrees, device, case, dtype)
    for scale in (1.0, 1e4):
        yield f"strided maps, scores times {scale:g}", partial(_strided_attention_agrees, device, scale)


def attention_agrees(device: str, case: Attention, dtype: torch.dtype) -> None:
    """Compare output and gradients; those in a half type with the reference in float64."""
    torch.manual_seed(0)
    (height, width), factor = case.size, case.factor
    maps: list[Tensor] = [
        torch.randn(2, factor * height, factor * width, case.heads, case.dim),
        torch.randn(2, height, width, case.heads, case.dim),
        torch.randn(2, height, width, case.value_heads, case.value_dim),
        torch.randn(case.heads, case.window, case.window),
    ]
    maps = [x.to(device, dtype).requires_grad_() for x in maps]
    if dtype is torch.float32:
        exact, tolerances = maps, {"atol": 2e-5, "rtol": 1e-4}
    else:
        exact = [x.detach().double().requires_grad_() for x in maps]
        tolerances = dict.fromkeys(("atol", "rtol"), 30 * torch.finfo(dtype).eps)
    expected, found = _differentiate(exact, "reference", case), _differentiate(maps, "triton", case)
    assert all(x.dtype == dtype for x in found)
    torch.testing.assert_close([x.to(exact[0].dtype) for x in found], expected, **tolerances)


def _differentiate(maps: list[Tensor], backend: str, case: Attention) -> list[Tensor]:
    """Output, and gradients of query, key, value and bias."""
    *qkv, bias = maps
    out = local_attention(*qkv, window=case.window, bias=bias, scale=case.scale, border=case.border, backend=backend)
    cotangent = torch.sin(torch.arange(out.numel(), device=out.device)).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, maps, cotangent)]


def _strided_attention_agrees(device: str, scale: float) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, 9, 3, 2, 8, device=device).unbind(3)
    expected, found = (
        local_attention(query, key, value, window=3, scale=scale, backend=backend)
        for backend in ("reference", "triton")
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def _local_attention_agrees(device: str, border: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 19, 13, 4, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(4, 7, 7, dtype=torch.float64)
    expected = local_attention(query, key, value, window=7, bias=bias, border=border)
    query, key, value, bias = (x.to(device) for x in (query, key, value, bias))
    found = local_attention(query, key, value, window=7, bias=bias, border=border)
    torch.testing.assert_close(found.cpu(), expected)


def _upsampler_agrees(device: str, name: str, dtype: torch.dtype) -> None:
    """Compare float32 maps; those in a half type have to be finite and on the device."""
    torch.manual_seed(0)
    factor = 1 if UPSAMPLERS[name].factory.factors == "one" else 2
    encoder = featsharp.create_encoder("toy-vit", name, factor, upsampler_options=NEEDED.get(name, {}))
    images = torch.randn(2, 3, 128, 96)
    expected = encoder(images).high_res
    found = encoder.to(device, dtype)(images.to(device, dtype)).high_res
    assert (found.device.type, found.dtype) == (torch.device(device).type, dtype)
    assert torch.isfinite(found).all()
    if dtype is torch.float32:
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def _upsampler_conforms(device: str, name: str) -> None:
    torch.manual_seed(0)

    def build(embed_dim: int, factor: float) -> Upsampler:
        return UPSAMPLERS[name].factory(embed_dim, factor, **NEEDED.get(name, {}))

    check_upsampler(build, device=device)


def _training_step_agrees(device: str) -> None:
    views = draw_views((128, 128), batch_size=1, count=2)
    gradients = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        encoder = featsharp.create_encoder("toy-vit", "featsharp", 2).to(place)
        objective = MultiViewObjective(encoder.embed_dim, 2, MultiViewConfig()).to(place)
        objective.backward(encoder, Views(*(x.to(place) for x in views)), (64, 64))
        gradients.append([p.grad.cpu() for p in encoder.upsampler.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-4)


def draw_views(size: tuple[int, int], batch_size: int, count: int) -> Views:
    """Views of ``count`` jittered and one base view of (h, w) pixels of a picture of smooth colours."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8))
    picture = pixels.resize((2 * size[1], 2 * size[0]), Image.Resampling.BICUBIC)
    canvas, mask = cut_canvas(picture, size)
    homographies = np.stack(
        [[sample_homography(size, ViewConfig(), rng) for _ in range(count)] for _ in range(batch_size)]
    )
    return Views(
        canvas.expand(batch_size, -1, -1, -1),
        mask.expand(batch_size, -1, -1, -1),
        torch.from_numpy(homographies).float(),
    )
