"""The bias buffer: zero at the start, added everywhere without its spatial mean, resized to other grids."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.layers.bias_buffer import BiasBuffer


@pytest.fixture
def buffer() -> BiasBuffer:
    module = BiasBuffer(3, (4, 5))
    torch.nn.init.normal_(module.buffer)
    return module


def centred(module: BiasBuffer) -> torch.Tensor:
    return torch.stack([plane - plane.mean() for plane in module.buffer[0]])[None]


def test_nothing_changes_at_the_start():
    features = torch.randn(2, 3, 4, 5)
    assert torch.equal(BiasBuffer(3, (4, 5))(features), features)


def test_it_is_added_to_every_image(buffer):
    features = torch.randn(2, 3, 4, 5)
    pattern = centred(buffer)[0]
    torch.testing.assert_close(buffer(features), torch.stack([features[0] + pattern, features[1] + pattern]))


def test_a_constant_has_no_effect_and_no_gradient(buffer):
    features = torch.randn(1, 3, 4, 5)
    before = buffer(features)
    with torch.no_grad():
        buffer.buffer += torch.tensor([1.0, -2.0, 3.0])[:, None, None]
    torch.testing.assert_close(buffer(features), before, atol=1e-5, rtol=1e-5)
    buffer(features).square().sum().backward()
    torch.testing.assert_close(buffer.buffer.grad.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


def test_a_larger_grid_gets_the_bilinear_map(buffer):
    features = torch.zeros(1, 3, 9, 7)
    expected = F.interpolate(centred(buffer), (9, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(buffer(features), expected)
    torch.testing.assert_close(buffer.at((9, 7)), expected)


def test_a_smaller_grid_gets_the_averaged_map(buffer):
    with torch.no_grad():
        buffer.buffer.copy_(torch.arange(5.0).expand(1, 3, 4, 5))
    coarse = buffer.at((2, 3))
    torch.testing.assert_close(coarse.mean(), torch.tensor(0.0))
    assert (coarse.diff(dim=-1) > 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_keep_their_dtype(buffer, dtype):
    assert buffer(torch.randn(1, 3, 4, 5).to(dtype)).dtype == dtype


def test_gradient_and_state(buffer):
    assert torch.autograd.gradcheck(
        lambda b: torch.func.functional_call(
            buffer.double(), {"buffer": b}, (torch.zeros(2, 3, 7, 9, dtype=torch.float64),)
        ),
        buffer.buffer.detach().double().requires_grad_(),
    )
    other = BiasBuffer(3, (4, 5))
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.buffer, buffer.buffer)
    assert list(other.state_dict()) == ["buffer"]
