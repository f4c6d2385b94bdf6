"""The bias buffer: zero at the start, added everywhere, resized to other grids."""

import pytest
import torch
import torch.nn.functional as F

from featsharp.layers.bias_buffer import BiasBuffer


@pytest.fixture
def buffer() -> BiasBuffer:
    module = BiasBuffer(3, (4, 5))
    torch.nn.init.normal_(module.buffer)
    return module


def test_nothing_changes_at_the_start():
    features = torch.randn(2, 3, 4, 5)
    assert torch.equal(BiasBuffer(3, (4, 5))(features), features)


def test_it_is_added_to_every_image(buffer):
    features = torch.randn(2, 3, 4, 5)
    expected = torch.stack([features[0] + buffer.buffer[0], features[1] + buffer.buffer[0]])
    assert torch.equal(buffer(features), expected)


def test_a_larger_grid_gets_the_bilinear_map(buffer):
    features = torch.zeros(1, 3, 9, 7)
    expected = F.interpolate(buffer.buffer, (9, 7), mode="bilinear", align_corners=False)
    assert torch.equal(buffer(features), expected)
    assert torch.equal(buffer.at((9, 7)), expected)


def test_a_smaller_grid_gets_the_averaged_map(buffer):
    with torch.no_grad():
        buffer.buffer.copy_(torch.arange(5.0).expand(1, 3, 4, 5))
    coarse = buffer.at((2, 3))
    torch.testing.assert_close(coarse.mean(), torch.tensor(2.0))
    assert (coarse.diff(dim=-1) > 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_keep_their_dtype(buffer, dtype):
    assert buffer(torch.randn(1, 3, 4, 5).to(dtype)).dtype == dtype


def test_gradient_and_state(buffer):
    buffer(torch.zeros(2, 3, 8, 9)).sum().backward()
    # Each of the 2 * 8 * 9 cells hands its whole weight on to some entries of the buffer.
    torch.testing.assert_close(buffer.buffer.grad.sum((0, 2, 3)), torch.full((3,), 144.0))
    other = BiasBuffer(3, (4, 5))
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.buffer, buffer.buffer)
    assert list(other.state_dict()) == ["buffer"]
