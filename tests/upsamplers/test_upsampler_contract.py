"""Every registered upsampler passes the conformance suite; and the suite finds those that break their promises."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from featsharp.backbones import create_backbone, from_callable
from featsharp.builder import create_encoder, load_from_file, save_checkpoint
from featsharp.checkpoint import read_checkpoint, write_checkpoint
from featsharp.errors import CheckpointError, ConfigError
from featsharp.testing import CHECKS, check_upsampler, run_check
from featsharp.upsamplers import UPSAMPLERS, create_upsampler, list_upsamplers, register_upsampler
from featsharp.upsamplers.base import GuidedUpsampler, UpsampleFeatures, Upsampler
from featsharp.upsamplers.interpolate import Bilinear


def enlarge(images):
    """A super-resolution of sorts."""
    return F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)


def nearest(image, features, size):
    """An upsampler of the user's."""
    return F.interpolate(features, size, mode="nearest")


# Options without which a name cannot be built.
NEEDED = {"custom": {"function": nearest}, "super-resolution": {"enlarge": enlarge}}
VARIANTS = {
    "featup, its own flavour": ("featup", {"flavour": "featup"}),
    "featsharp, published": ("featsharp", {"start": "published", "widths": "published"}),
    "featsharp, jafar": ("featsharp", {"inputs": ["jafar", "tiles"], "layer_norm": False}),
    "featsharp, all inputs": ("featsharp", {"inputs": ["resfu", "jbu", "bilinear", "rgb", "jafar", "tiles"]}),
    "featsharp, no tiles": ("featsharp", {"inputs": ["bilinear", "jbu"]}),
    "featsharp, no attention": ("featsharp", {"attention": False}),
    "featsharp, no SwiGLU": ("featsharp", {"ffn": False, "start": "published"}),
    "featsharp, linear": ("featsharp", {"attention": False, "ffn": False}),
    "featsharp, details": ("featsharp", {"inputs": ["bilinear", "details"], "attention": False, "ffn": False}),
    "featsharp, linear, all tile inputs": (
        "featsharp",
        {"inputs": ["tiles", "bilinear", "details"], "attention": False, "ffn": False},
    ),
    "featsharp, all tile inputs": ("featsharp", {"inputs": ["bilinear", "details", "tiles"]}),
    "featsharp, RoPE": ("featsharp", {"position": "rope"}),
    "featsharp, xPos": ("featsharp", {"position": "xpos", "window": 5}),
    "featsharp-progressive, published": ("featsharp-progressive", {"start": "published"}),
    "naf, published": ("naf", {"published": True}),
    "uplift, published": ("uplift", {"published": True}),
}
CASES = {name: (name, NEEDED.get(name, {})) for name in list_upsamplers()} | VARIANTS
# Variants, those that take ten times as long as others, and names that are made of the one they are called after.
SLOW = {*VARIANTS, "anyup", "naf", "uplift", "featsharp-progressive", "resfu-tiled", "s2-pooled"}
ALL_CASES = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else []) for case in CASES]


# Seconds each; the others of these checks are quick.
LONG = {
    *itertools.product(("jafar", "learned-views", "loftup"), ("gradient_of_every_parameter", "large_maps", "shapes")),
    ("jafar", "constants"),
    ("resfu", "shapes"),
}


class Width:
    """All that ``create_upsampler`` asks of a backbone."""

    def __init__(self, embed_dim: int) -> None:
        self.embed_dim = embed_dim


# Exporting takes seconds. Registered names are exported for other sizes, too, in tests/upsamplers/test_recording.py; of
# the variants these have every input, option of attention and start of weights.
EXPORTED = [
    "featup, its own flavour",
    "featsharp, jafar",
    "featsharp, all inputs",
    "featsharp, details",
    "featsharp, xPos",
    "featsharp-progressive, published",
]


def pairs() -> Iterator[Any]:
    """Cases with checks, marked by how long they take."""
    for case, check in itertools.product(CASES, CHECKS):
        mark = pytest.mark.slow if case in SLOW or (case, check) in LONG else []
        if check == "export":
            mark = pytest.mark.slow if case in EXPORTED else pytest.mark.full
        yield pytest.param(case, check, marks=mark)


@pytest.mark.parametrize(("case", "check"), pairs())
def test_conformance(case, check):
    name, options = CASES[case]
    run_check(check, lambda embed_dim, factor: create_upsampler(name, Width(embed_dim), factor, options=options))


@pytest.mark.parametrize("case", ALL_CASES)
def test_through_a_checkpoint(case, tmp_path):
    name, options = CASES[case]
    if callable(next(iter(options.values()), None)):
        options = {key: f"{__name__}:{value.__name__}" for key, value in options.items()}
    factor = 1 if UPSAMPLERS[name].factory.factors == "one" else 2
    encoder = create_encoder("toy-vit", name, factor, upsampler_options=options)
    with torch.no_grad():
        for parameter in encoder.upsampler.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    encoder.requires_grad_(False)  # as loaded ones are: torch 2.4 sums a product with a trained matrix in another order
    save_checkpoint(encoder, tmp_path / "last.pth")
    image = torch.randn(1, 3, 72, 56)
    with torch.no_grad():
        expected = encoder(image).high_res
        loaded = load_from_file(tmp_path / "last.pth", allow_functions=name in NEEDED)
        assert torch.equal(loaded(image).high_res, expected)


@pytest.mark.parametrize("name", NEEDED)
def test_checkpoints_import_nothing_unasked(name, tmp_path):
    ((option, function),) = NEEDED[name].items()
    with pytest.raises(CheckpointError, match=f"option {option} of this encoder is a Python object"):
        save_checkpoint(create_encoder("toy-vit", name, 2, upsampler_options={option: function}), tmp_path / "a.pth")
    text = f"{__name__}:{function.__name__}"
    save_checkpoint(create_encoder("toy-vit", name, 2, upsampler_options={option: text}), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"would import code: {option}='{text}'"):
        load_from_file(tmp_path / "a.pth")
    # Nor by a name that brings the function.
    content = read_checkpoint(tmp_path / "a.pth")
    for written in (f"{name}?{option}={text}", f"{name}-2x?{option}={text}", text):
        content["encoder"]["recipe"] |= {"upsampler": written, "options": {}}
        write_checkpoint(tmp_path / "b.pth", content)
        with pytest.raises(ConfigError, match="unknown upsampler"):
            load_from_file(tmp_path / "b.pth")


def test_every_upsampler_says_what_it_is():
    for entry in UPSAMPLERS.entries():
        assert entry.description
        assert entry.factory.needs
        assert entry.factory.keeps_space in ("yes", "nearly", "no")


def test_unknown_names_and_options():
    with pytest.raises(ConfigError, match=r"unknown upsampler 'bilinaer'; did you mean 'bilinear'"):
        create_upsampler("bilinaer", Width(16), 2)
    with pytest.raises(ConfigError, match=r"upsampler 'tile': .*'overlapp'"):
        create_upsampler("tile", Width(16), 2, options={"overlapp": 1})


@pytest.mark.parametrize("name", list_upsamplers())
def test_declared_options_are_those_of_the_constructor(name):
    kind = UPSAMPLERS[name].factory
    if name == "featsharp-progressive":  # hands them on to its levels
        kind = UPSAMPLERS["featsharp"].factory
        assert UPSAMPLERS[name].factory.options == kind.options
    parameters = inspect.signature(kind).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert {*kind.options, *kind.backbone_facts} == keywords


def test_options_of_a_users_class_need_no_declaration():
    @register_upsampler("test-only", "registered by a test")
    class Sharper(Bilinear):
        def __init__(self, embed_dim, factor, amount=1.0):
            super().__init__(embed_dim, factor)
            self.amount = amount

    try:
        assert create_upsampler("test-only", Width(3), 2, options={"amount": 3}).amount == 3
        with pytest.raises(ConfigError, match=r"cannot be built with \{'amuont': 3\}: .* argument 'amuont'"):
            create_upsampler("test-only", Width(3), 2, options={"amuont": 3})
    finally:
        del UPSAMPLERS["test-only"]


def test_create_from_a_backbone():
    backbone = create_backbone("toy-vit")
    assert create_upsampler("bilinear", backbone, 2).embed_dim == backbone.embed_dim


@pytest.mark.parametrize(
    ("name", "factor", "said"),
    [
        ("bilinear", 0, "a number of at least 1; got 0"),
        ("bilinear", "2", "a number of at least 1; got '2'"),
        ("carafe", 2.5, "CARAFE takes factors that are whole; got 2.5, use 2 or 3"),
        ("lift", 3, "LiFT takes factors that are powers of two; got 3, use 2 or 4"),
        ("identity", 2, "Identity has factor 1; got 2. Use 'bilinear' for an untrained factor 2"),
    ],
)
def test_factors_that_do_not_exist_name_the_nearest(name, factor, said):
    with pytest.raises(ConfigError) as error:
        create_upsampler(name, Width(16), factor)
    assert said in str(error.value)


def test_super_resolution_knows_the_whitening_of_the_backbone():
    backbone = from_callable(torch.nn.AvgPool2d(8), patch_size=8, input_size=(64, 64), mean=(0.5,) * 3, std=(0.25,) * 3)
    upsampler = create_upsampler("super-resolution", backbone, 2, options={"enlarge": enlarge})
    assert (upsampler.mean, upsampler.std) == ((0.5,) * 3, (0.25,) * 3)


def test_registering_makes_a_name():
    @register_upsampler("test-only", "registered by a test")
    class Nearest(Upsampler):
        def forward(self, image, encode, low_res_size, output_size=None):
            low_res, summary = encode(F.interpolate(image, low_res_size))
            return UpsampleFeatures(low_res, low_res.repeat_interleave(2, 2).repeat_interleave(2, 3), summary)

    try:
        upsampler = create_upsampler("test-only", Width(3), 2)
        out = upsampler(torch.randn(1, 3, 8, 8), lambda x: (F.avg_pool2d(x, 4), None), (8, 8))
        assert out.high_res.shape == (1, 3, 4, 4)
    finally:
        del UPSAMPLERS["test-only"]


# The suite itself


class BatchNormalised(Bilinear):
    def upsample_to(self, features, image, size):
        return super().upsample_to(features - features.mean(0), image, size)


class Dropping(Bilinear):
    def upsample_to(self, features, image, size):
        return F.dropout(super().upsample_to(features, image, size), training=True)


class SeedSetting(Bilinear):
    def __init__(self, embed_dim, factor):
        super().__init__(embed_dim, factor)
        torch.manual_seed(0)


class HalfDead(Bilinear):
    trainable = True

    def __init__(self, embed_dim, factor):
        super().__init__(embed_dim, factor)
        self.used, self.unused = (torch.nn.Parameter(torch.ones(())) for _ in range(2))

    def upsample_to(self, features, image, size):
        return self.used * super().upsample_to(features, image, size)


class DefaultDevice(Bilinear):
    def upsample_to(self, features, image, size):
        return super().upsample_to(features, image, size) + torch.zeros(1)


class DefaultType(Bilinear):
    def upsample_to(self, features, image, size):
        return super().upsample_to(features, image, size) * torch.tensor([1 / 3], device=image.device)


class FixedBatch(Bilinear):
    def upsample_to(self, features, image, size):
        return super().upsample_to(features, image, size).reshape(len(features), -1, *size)


class Lost(Bilinear):
    def __init__(self, embed_dim, factor):
        super().__init__(embed_dim, factor)
        self.register_buffer("one", torch.ones(1), persistent=False)

    def upsample_to(self, features, image, size):
        return self.one * super().upsample_to(features, image, size)


class Single(Bilinear):
    def upsample(self, features, image, output_size=None):
        return super().upsample(features, image, output_size).float()


class Fading(Bilinear):
    def upsample_to(self, features, image, size):
        return 0.9 * super().upsample_to(features, image, size)


class Misplaced(Bilinear):
    def high_res_grid(self, features, output_size=None):
        return tuple(2 * side for side in features.shape[-2:])


class AnySizeSquare(GuidedUpsampler):
    def upsample_to(self, features, image, size):
        return F.interpolate(features, size[0])


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (BatchNormalised, "batches"),
        (Dropping, "deterministic"),
        (SeedSetting, "no_global_state"),
        (HalfDead, "gradient_of_every_parameter"),
        (DefaultDevice, "no_device_assumed"),
        (DefaultType, "no_default_type_assumed"),
        (FixedBatch, "export"),
        (Lost, "without_values"),
        (Single, "dtypes"),
        (Fading, "constants"),
        (Misplaced, "shapes"),
        (AnySizeSquare, "any_output_size"),
    ],
)
def test_broken_promises_are_found(broken, check):
    with pytest.raises(AssertionError, match=f"^{check}: "):
        run_check(check, broken)


def test_a_good_one_passes_the_whole_suite():
    check_upsampler(Bilinear)


@pytest.mark.gpu
@pytest.mark.parametrize("case", VARIANTS)
def test_conformance_on_a_gpu(case):
    """Of the others, see ``gpu_checks.py``."""
    name, options = CASES[case]
    check_upsampler(
        lambda embed_dim, factor: create_upsampler(name, Width(embed_dim), factor, options=options), device="cuda"
    )
