"""The conformance suite: the contract of upsamplers, as checks that run on any of them.

    from featsharp.testing import CHECKS, check_upsampler, run_check

    check_upsampler(MyUpsampler)                 # a class, or a function (embed_dim, factor) -> Upsampler

    @pytest.mark.parametrize("check", CHECKS)    # or each check as a separate test
    def test_my_upsampler(check):
        run_check(check, MyUpsampler)

A check that fails, or crashes, raises an AssertionError with its name. No backbone is needed; ``device="cuda"`` runs
the suite on a GPU.
"""

import io
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError, InputError
from featsharp.ops.backends import list_backends, use_backend
from featsharp.ops.resize import size_of
from featsharp.upsamplers.base import GuidedUpsampler, UpsampleFeatures, Upsampler

__all__ = ["CHANNELS", "CHECKS", "PATCH", "check_upsampler", "patch_statistics", "run_check"]

CHANNELS, PATCH = 16, 8

# (embed_dim, factor) -> upsampler
Build = Callable[[int, float], Upsampler]

CHECKS: dict[str, Callable[[Build, str], None]] = {}


def check_upsampler(build: Build, *, device: str = "cpu") -> None:
    """Run every check of :data:`CHECKS`; raises AssertionError for the first that fails.

    Args:
        build: Builds an untrained upsampler for ``embed_dim`` channels and a factor; raises ConfigError for a factor
            that the method does not have. At least one of the factors 1 and 2 must work.
        device: Device to run on.
    """
    for name in CHECKS:
        run_check(name, build, device=device)


def run_check(name: str, build: Build, *, device: str = "cpu") -> None:
    """Run one check; see :func:`check_upsampler`."""
    try:
        CHECKS[name](build, device)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


def patch_statistics(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, Tensor]:
    """Encode without a backbone: project each patch of 8 x 8 pixels on 16 fixed random directions.

    Args:
        images: [B, 3, 8 h, 8 w].
        patch_stride: Pixels from token to token; None: 8.

    Returns:
        Features [B, 16, h, w] (more tokens at a smaller stride), and their mean [B, 16].
    """
    features = F.conv2d(images, _directions().to(images), stride=patch_stride or PATCH)
    return features, features.mean((2, 3))


@cache
def _directions() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(CHANNELS, 3, PATCH, PATCH, generator=generator, dtype=torch.float32, device="cpu")


def _check(function: Callable[[Build, str], None]) -> Callable[[Build, str], None]:
    CHECKS[function.__name__.removeprefix("_")] = function
    return function


@_check
def _shapes(build: Build, device: str) -> None:
    """[B, C, factor * h, factor * w] for grids that are odd, not square, one token, one row, or large."""
    for factor in _factors(build):
        upsampler = build(CHANNELS, factor).to(device).eval()
        for grid in ((3, 5), (1, 1), (1, 6), (33, 2)):
            with torch.no_grad():
                out = upsampler(_photo(2, (37, 61), device), patch_statistics, _pixels(*grid))
            expected = tuple(math.floor(side * factor + 0.5) for side in grid)
            assert isinstance(out, UpsampleFeatures), f"returned a {type(out).__name__}"
            _same("shape of low_res", tuple(out.low_res.shape), (2, CHANNELS, *grid))
            _same("shape of high_res", tuple(out.high_res.shape), (2, upsampler.num_maps * CHANNELS, *expected))
            assert out.summary is not None, "the summary got lost"
            _same("shape of summary", tuple(out.summary.shape), (2, CHANNELS))
            assert out.high_res.isfinite().all(), f"NaN or infinite features for a {grid} grid"
        assert upsampler.factor == factor
        assert upsampler.input_upsample_factor >= 1, f"input_upsample_factor is {upsampler.input_upsample_factor}"


@_check
def _large_maps(build: Build, device: str) -> None:
    """A map of 96 x 160 cells from 48 x 80 (or 48 x 80 at factor 1)."""
    upsampler = _build(build, device)
    with torch.no_grad():
        out = upsampler(_photo(1, (96, 160), device), patch_statistics, _pixels(48, 80))
    _same("grid", size_of(out.high_res), (48 * int(upsampler.factor), 80 * int(upsampler.factor)))


@_check
def _any_output_size(build: Build, device: str) -> None:
    """Methods of any factor produce any size from the grid upwards; others refuse it, and all refuse a smaller one."""
    upsampler = _build(build, device)
    image = _photo(2, (40, 64), device)
    with torch.no_grad():
        for size in ((3, 5), (4, 9), (11, 7)):
            if upsampler.factors == "any":
                out = upsampler(image, patch_statistics, _pixels(3, 5), size)
                _same("grid", size_of(out.high_res), size)
            elif size != tuple(upsampler.factor * side for side in (3, 5)):
                _refuses(InputError, upsampler, image, patch_statistics, _pixels(3, 5), size)
        _refuses(InputError, upsampler, image, patch_statistics, _pixels(3, 5), (2, 20))


@_check
def _impossible_factors(build: Build, device: str) -> None:
    """Factors that no method has, and fractions where only whole ones work, are refused when building."""
    for factor in (0, -2, 0.5, math.nan, math.inf, True, "2"):
        _refuses(ConfigError, build, CHANNELS, factor)
    if _build(build, device).factors != "any":
        _refuses(ConfigError, build, CHANNELS, 1.5)


@_check
def _wrong_features(build: Build, device: str) -> None:
    """Guided upsamplers refuse channels, images and batches that do not belong together."""
    upsampler = _build(build, device)
    if not isinstance(upsampler, GuidedUpsampler):
        return
    features, image = torch.randn(2, CHANNELS, 3, 5, device=device), _photo(2, (12, 20), device)
    _refuses(InputError, upsampler.upsample, features[:, 1:], image)
    _refuses(InputError, upsampler.upsample, features[0], image)
    _refuses(InputError, upsampler.upsample, features, image[:1])
    _refuses(InputError, upsampler.upsample, features, image[:, :1])
    _refuses(InputError, upsampler.upsample, features[:0], image[:0])
    for size in ((5.5, 9), (8,), 8, "8x8"):
        _refuses(InputError, upsampler.upsample, features, image, size)


@_check
def _batches(build: Build, device: str) -> None:
    """An image gives the same features in a batch, alone, and in another memory layout."""
    upsampler = _perturbed(_build(build, device))
    image = _photo(3, (24, 40), device)
    with torch.no_grad():
        together = upsampler(image, patch_statistics, _pixels(3, 5)).high_res
        alone = upsampler(image[1:2], patch_statistics, _pixels(3, 5)).high_res
        strided = upsampler(image.to(memory_format=torch.channels_last), patch_statistics, _pixels(3, 5)).high_res
    _close("alone", alone, together[1:2])
    _close("channels last", strided, together)


@_check
def _dtypes(build: Build, device: str) -> None:
    """In bfloat16 and float16 the result has that type and the direction of the float32 one."""
    exact_upsampler = _perturbed(_build(build, device))
    image = _photo(1, (24, 32), device)
    for dtype in (torch.bfloat16, torch.float16):
        upsampler = _build(build, device)
        upsampler.load_state_dict(exact_upsampler.state_dict())
        with torch.no_grad():
            exact = exact_upsampler(image.to(dtype).float(), patch_statistics, _pixels(3, 4)).high_res
            out = upsampler.to(dtype)(image.to(dtype), patch_statistics, _pixels(3, 4)).high_res
        _same("dtype", out.dtype, dtype)
        cosine = F.cosine_similarity(out.float(), exact).min().item()
        assert cosine > 0.99, f"cosine similarity of {dtype} with float32 is {cosine:.4f}"


@_check
def _silence(build: Build, device: str) -> None:
    """A black image and features of zeros give finite features in every type."""

    def encode(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, None]:
        return torch.zeros_like(patch_statistics(images, patch_stride=patch_stride)[0]), None

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        upsampler = _build(build, device).to(dtype)
        with torch.no_grad():
            out = upsampler(torch.zeros(1, 3, 24, 40, device=device, dtype=dtype), encode, _pixels(3, 5)).high_res
        assert out.isfinite().all(), f"NaN or infinite features of nothing in {dtype}"


@_check
def _autocast(build: Build, device: str) -> None:
    """Under autocast the result stays close and training works."""
    upsampler = _perturbed(_build(build, device))
    image = _photo(1, (24, 32), device)
    exact = upsampler(image, patch_statistics, _pixels(3, 4)).high_res
    with torch.autocast(device, torch.bfloat16):
        out = upsampler(image, patch_statistics, _pixels(3, 4)).high_res
    cosine = F.cosine_similarity(out.float(), exact).min().item()
    assert cosine > 0.99, f"cosine similarity under autocast with float32 is {cosine:.4f}"
    if upsampler.trainable:
        out.float().square().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in upsampler.parameters()), "gradients overflow"


@_check
def _gradient_of_every_parameter(build: Build, device: str) -> None:
    """In training every parameter gets a finite nonzero gradient; only trainable upsamplers have parameters."""
    for factor in _factors(build):
        upsampler = build(CHANNELS, factor).to(device).train()
        if not upsampler.trainable:
            assert not list(upsampler.parameters()), "has parameters but is not trainable"
            continue
        if not list(upsampler.parameters()):
            continue  # a stack without levels
        out = upsampler(_photo(2, (48, 72), device), patch_statistics, _pixels(6, 9)).high_res
        (out - torch.randn_like(out)).square().mean().backward()
        for name, parameter in _parameters(upsampler):
            assert parameter.grad is not None, f"no gradient reaches {name} at factor {factor}"
            assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite at factor {factor}"
            assert parameter.grad.abs().sum() > 0, f"the gradient of {name} is zero at factor {factor}"


@_check
def _gradient_of_the_inputs(build: Build, device: str) -> None:
    """Inside a network, features and a guidance image get a gradient."""
    upsampler = _perturbed(_build(build, device))
    bias = torch.zeros(1, CHANNELS, 1, 1, device=device, requires_grad=True)
    image = _photo(1, (24, 24), device).requires_grad_()

    def encode(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, None]:
        return patch_statistics(images.detach(), patch_stride=patch_stride)[0] + bias, None

    out = upsampler(image, encode, _pixels(3, 3))
    assert out.summary is None, "made a summary where the backbone has none"
    (out.high_res * torch.randn_like(out.high_res)).sum().backward()
    assert bias.grad is not None, "no gradient reaches the features"
    assert (bias.grad.abs() > 0).all(), "some channel of the features gets no gradient"
    if isinstance(upsampler, GuidedUpsampler) and upsampler.trainable and "image" in upsampler.needs:
        assert image.grad is not None, "no gradient reaches the image"
        assert image.grad.abs().sum() > 0, "the gradient of the image is zero"


@_check
def _constants(build: Build, device: str) -> None:
    """A result of features alone keeps a constant map constant, up to the borders."""

    def encode(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, None]:
        shape = patch_statistics(images, patch_stride=patch_stride)[0].shape
        return torch.linspace(-1, 2, CHANNELS, device=device)[:, None, None].expand(shape), None

    for factor in _factors(build):
        upsampler = _perturbed(build(CHANNELS, factor).to(device).eval())
        untrained = not upsampler.trainable and upsampler.keeps_space == "nearly"  # tiles, larger images
        if upsampler.keeps_space != "yes" and not untrained:
            continue
        with torch.no_grad():
            out = upsampler(_photo(1, (30, 50), device), encode, _pixels(3, 5))
        expected = out.low_res[..., :1, :1].repeat(1, upsampler.num_maps, 1, 1).expand_as(out.high_res)
        _close(f"constant features at factor {factor}", out.high_res, expected, tolerance=1e-4)


@_check
def _state(build: Build, device: str) -> None:
    """Weights survive a file and determine the upsampler completely."""
    first, second = _perturbed(_build(build, device)), _build(build, device)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True, map_location=device))
    image = _photo(1, (48, 36), device)
    with torch.no_grad():
        out = [upsampler(image, patch_statistics, _pixels(6, 5)).high_res for upsampler in (first, second)]
    assert torch.equal(*out), "an upsampler with the same weights gives other features"


@_check
def _deterministic(build: Build, device: str) -> None:
    """In eval mode the same image gives the same features, bit for bit."""
    upsampler = _perturbed(_build(build, device))
    image = _photo(2, (30, 22), device)
    with torch.no_grad():
        first, _, second = (
            upsampler(x, patch_statistics, _pixels(3, 2)).high_res for x in (image, image.flip(3), image)
        )
    assert torch.equal(first, second), "the same image gave two results"


@_check
def _no_global_state(build: Build, device: str) -> None:
    """Building sets no seed, inference draws no random number, and neither changes a setting of torch."""

    def settings() -> list[object]:
        return [
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            torch.backends.cudnn.benchmark,
        ]

    def random_state() -> Tensor:
        states = [torch.get_rng_state()]
        if torch.device(device).type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        return torch.cat(states)

    before = settings()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        upsampler = _build(build, device)
        _same("seed", torch.initial_seed(), seed)
        states.append(random_state())
    assert not torch.equal(*states), "building sets the random state"
    state = random_state()
    with torch.no_grad():
        upsampler(_photo(1, (24, 24), device), patch_statistics, _pixels(3, 3))
    assert torch.equal(random_state(), state), "random numbers are drawn in eval mode"
    _same("settings of torch", settings(), before)


@_check
def _no_device_assumed(build: Build, device: str) -> None:
    """Intermediate tensors are created on the device of the image, not on the default device."""
    upsampler = _build(build, device)
    image = _photo(1, (24, 20), device)
    with torch.no_grad():
        expected = upsampler(image, patch_statistics, _pixels(3, 2)).high_res
        with torch.device("meta"):  # tensors created without a device then have no values
            out = upsampler(image, patch_statistics, _pixels(3, 2)).high_res
    assert torch.equal(out, expected), "depends on the default device"


@_check
def _no_default_type_assumed(build: Build, device: str) -> None:
    """Types follow the weights and the inputs, whatever ``torch.set_default_dtype`` says."""
    upsampler = _build(build, device)
    image = _photo(1, (24, 20), device)
    before = torch.get_default_dtype()
    with torch.no_grad():
        expected = upsampler(image, patch_statistics, _pixels(3, 2)).high_res
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                out = upsampler(image, patch_statistics, _pixels(3, 2)).high_res
            finally:
                torch.set_default_dtype(before)
            _same("dtype", out.dtype, expected.dtype)
            assert torch.equal(out, expected), f"depends on the default type, {dtype}"


@_check
def _export(build: Build, device: str) -> None:
    """A program of ``torch.export`` takes other batches than the one that it was made with."""
    whole = _Whole(_perturbed(_build(build, device))).eval()
    image = _photo(3, (24, 40), device)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        patch_statistics(image)  # draws the directions, which a program cannot
        shapes = ({0: batch},)
        program = torch.export.export(whole, (image[:2],), dynamic_shapes=shapes, strict=False).module()
        for count in (1, 3):
            _close(f"{count} images", program(image[:count]), whole(image[:count]), tolerance=1e-4)


@_check
def _without_values(build: Build, device: str) -> None:
    """On the device meta there are shapes; memory that was filled there holds nothing that weights do not replace."""
    upsampler = _perturbed(_build(build, device))
    state = upsampler.state_dict()
    image = _photo(2, (24, 40), device)
    with torch.no_grad():
        expected = upsampler(image, patch_statistics, _pixels(3, 5)).high_res
        empty = _build(build, device).to("meta")
        shape = empty(image.to("meta"), patch_statistics, _pixels(3, 5)).high_res.shape
        _same("shape on meta", shape, expected.shape)
        empty.to_empty(device=device)
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 0)
        empty.load_state_dict(state)
        out = empty(image, patch_statistics, _pixels(3, 5)).high_res
    assert torch.equal(out, expected), "something besides the weights was lost on the device meta"


class _Whole(nn.Module):
    """An upsampler with its ``encode``, from an image [B, 3, h, w] to the result."""

    def __init__(self, upsampler: Upsampler) -> None:
        super().__init__()
        self.upsampler = upsampler

    def forward(self, image: Tensor) -> Tensor:
        return self.upsampler(image, patch_statistics, _pixels(3, 5)).high_res


@_check
def _backends(build: Build, device: str) -> None:
    """All backends of the local operations give the same features."""
    upsampler = _perturbed(_build(build, device))
    image = _photo(1, (36, 44), device)
    everywhere = set.intersection(*({b.name for b in list_backends(op)} for op in {b.op for b in list_backends()}))
    results = {}
    with torch.no_grad():
        for name in sorted(everywhere):
            with use_backend(name):
                results[name] = upsampler(image, patch_statistics, _pixels(3, 5)).high_res
    for name, result in results.items():
        _close(f"backend {name}", result, results["reference"], tolerance=1e-4)


def _factors(build: Build) -> Iterator[float]:
    """Iterate over those of 1, 2, 3, 4, 6 and 1.5 that the method has."""
    for factor in (1, 2, 3, 4, 6, 1.5):
        try:
            build(CHANNELS, factor)
        except ConfigError:
            continue
        yield factor


def _build(build: Build, device: str) -> Upsampler:
    """Build in eval mode at factor 2 where the method has it, else 1."""
    try:
        return build(CHANNELS, 2).to(device).eval()
    except ConfigError:
        return build(CHANNELS, 1).to(device).eval()


@torch.no_grad()
def _perturbed(upsampler: Upsampler) -> Upsampler:
    """Add noise to the weights, as zeros at the start may hide much."""
    generator = torch.Generator().manual_seed(7)
    for parameter in upsampler.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu")
        parameter.add_(0.1 * parameter.std(correction=0).clamp(min=0.1).cpu().item() * noise.to(parameter))
    return upsampler


def _parameters(upsampler: Upsampler) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in upsampler.named_parameters() if parameter.requires_grad)


def _photo(count: int, size: tuple[int, int], device: str) -> Tensor:
    """Draw different images [count, 3, *size] that are smooth like photographs."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(count, 3, 5, 6, generator=generator, device="cpu")
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False).to(device)


def _pixels(rows: int, cols: int) -> tuple[int, int]:
    """Compute (h, w) in pixels of so many tokens."""
    return PATCH * rows, PATCH * cols


def _same(what: str, actual: object, expected: object) -> None:
    assert actual == expected, f"{what} is {actual}, not {expected}"


def _close(what: str, actual: Tensor, expected: Tensor, *, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(
        actual, expected, atol=tolerance, rtol=tolerance, msg=lambda message: f"{what}: {message}"
    )


def _refuses(error: type[Exception], function: Callable[..., object], *arguments: Any) -> None:
    try:
        function(*arguments)
    except error:
        return
    raise AssertionError(f"a {error.__name__} was expected")
