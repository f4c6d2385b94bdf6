"""Functions of the user's own as upsamplers: what they are given, what they may return, how text names them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featsharp.backbones import create_backbone
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError, InputError
from featsharp.ops.resize import resize
from featsharp.registry import load_function
from featsharp.upsamplers import create_upsampler, from_function
from featsharp.upsamplers.custom import FromFunction


def nearest(image, features, size):
    return F.interpolate(features, size)


@pytest.mark.parametrize(
    ("factor", "output_size", "size"), [(2, None, (6, 10)), (1.5, None, (5, 8)), (2, (3, 7), (3, 7))]
)
def test_the_function_gets_image_features_and_size(factor, output_size, size):
    given = []

    def function(image, features, size):
        given.append((image, features, size))
        return F.interpolate(features, size) + image.mean()

    features, image = torch.randn(2, 8, 3, 5), torch.randn(2, 3, 31, 47)
    out = from_function(function, 8, factor).upsample(features, image, output_size)
    assert given[0][0] is image
    assert given[0][1] is features
    assert given[0][2] == size
    assert torch.equal(out, F.interpolate(features, size) + image.mean())


def test_in_an_encoder():
    backbone, image = create_backbone("toy-vit"), torch.randn(1, 3, 64, 80)
    encoder = create_encoder(backbone, from_function(nearest, backbone, 3))
    with torch.no_grad():
        out = encoder(image)
    assert torch.equal(out.high_res, F.interpolate(out.low_res, scale_factor=3))


def test_by_name_in_options():
    named = create_upsampler("custom", create_backbone("toy-vit"), 2, options={"function": f"{__name__}:nearest"})
    features = torch.randn(1, 32, 3, 5)
    assert torch.equal(named.upsample(features, torch.randn(1, 3, 9, 9)), F.interpolate(features, scale_factor=2))
    assert "function=nearest" in repr(named)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, image, features, size):
        return self.gain * resize(features, size)


def test_a_module_is_a_part_of_the_upsampler():
    upsampler = from_function(Weighted(), 4, 2)
    assert list(upsampler.state_dict()) == ["function.gain"]
    assert upsampler.trainable
    assert not from_function(nearest, 4, 2).trainable
    assert not upsampler.eval().function.training
    features = torch.randn(1, 4, 3, 5)
    out = upsampler.upsample(features, torch.randn(1, 3, 8, 8))
    torch.testing.assert_close(out, 2 * F.interpolate(features, scale_factor=2, mode="bilinear"))
    out.sum().backward()
    assert upsampler.function.gain.grad is not None
    assert "function=Weighted" in repr(upsampler)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_has_the_dtype_of_the_features(dtype):
    upsampler = from_function(lambda image, features, size: F.interpolate(features.float(), size), 4, 2)
    features, image = torch.randn(1, 4, 3, 5, dtype=dtype), torch.randn(1, 3, 8, 8, dtype=dtype)
    assert upsampler.upsample(features, image).dtype == dtype


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda i, f, s: [f], r"has to return a tensor \(1, 4, 6, 10\); got a list"),
        (lambda i, f, s: f, r"was asked for \(1, 4, 6, 10\), .* at 6x10 cells; it returned \(1, 4, 3, 5\)"),
        (lambda i, f, s: F.interpolate(f, s).byte(), "floating point features such as torch.float32; got torch.uint8"),
        (lambda i, f, s: F.interpolate(f, s).to("meta"), "features on cpu and returned some on meta"),
        (lambda i, f, s: F.interpolate(f, s).log(), "returned NaN or infinite values for finite features"),
    ],
)
def test_what_it_must_not_return(function, message):
    with pytest.raises(InputError, match=message):
        from_function(function, 4, 2).upsample(torch.randn(1, 4, 3, 5), torch.randn(1, 3, 8, 8))


def test_nan_in_the_features_is_not_the_fault_of_the_function():
    features = torch.full((1, 4, 3, 5), torch.nan)
    assert from_function(nearest, 4, 2).upsample(features, torch.randn(1, 3, 8, 8)).isnan().all()


def test_errors_of_the_function_are_its_own():
    def broken(image, features, size):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        from_function(broken, 4, 2).upsample(torch.randn(1, 4, 3, 5), torch.randn(1, 3, 8, 8))


def test_text_that_names_a_function():
    assert load_function("torch.nn.functional:interpolate", "function") is F.interpolate
    assert load_function("torch:nn.functional.relu", "function") is F.relu
    assert load_function(nearest, "function") is nearest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "option function is a function, or text .* 'my_module:my_function'; got None"),
        (3, "got 3"),
        ("interpolate", "got 'interpolate'"),
        ("torch:", "got 'torch:'"),
        (":relu", "got ':relu'"),
        ("torch:nn:relu", "got 'torch:nn:relu'"),
        (Weighted, "got <class"),
        (
            "no_such_module:f",
            r"'no_such_module' cannot be imported \(ModuleNotFoundError: .*add its folder to PYTHONPATH",
        ),
        (".relative:f", r"'.relative' cannot be imported \(TypeError"),
        ("torch:rleu", "unknown function in option function='torch:rleu': 'rleu'; did you mean 'relu'"),
        ("torch:__version__", "__version__ is no function"),
        ("torch.nn:ReLU", "ReLU is a class; name a function or an object that can be called"),
    ],
)
def test_text_that_names_none(text, message):
    with pytest.raises(ConfigError, match=message):
        FromFunction(4, 2, function=text)
