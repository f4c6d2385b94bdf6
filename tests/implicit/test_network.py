"""The implicit network: its inputs against the formula, its size, and what it makes of an image's rows."""

import math

import numpy as np
import pytest
import torch

from featsharp.errors import ConfigError, InputError
from featsharp.implicit.network import ImplicitNetwork, cell_centres, colour_range, frequency_table


def published(dim: int = 128, colour: bool = True) -> ImplicitNetwork:
    image = torch.rand(3, 9, 7)
    return ImplicitNetwork(dim, frequency_table("published", (16, 16), colour=colour), colour_range(image))


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameter_counts():
    assert count(published()) == 73_098
    inputs = 2 * 2 * 30
    assert count(published(colour=False)) == 120 + 2 * inputs + inputs * 128 + 128 + 256 + 2 * (128**2 + 128)
    assert published(dim=32).layer_out.out_features == 32


def test_fourier_features_are_those_of_the_formula():
    network = published()
    points = np.random.default_rng(1).uniform(-1, 1, (4, 2))
    colours = np.random.default_rng(2).uniform(0, 1, (4, 3))
    low, high = network.colour_range.double().numpy()
    phases = network.phases.detach().double().numpy()
    inputs = np.concatenate([points, (colours - low) / (high - low) - 0.5], 1)
    expected = np.zeros((4, 303))
    for n in range(4):
        column = 0
        for wave, function in enumerate((np.sin, np.cos)):
            for i in range(5):
                for k in range(30):
                    frequency = math.exp(-2 + k * 12 / 29)
                    expected[n, column] = function(inputs[n, i] * frequency + phases[wave, i, k])
                    column += 1
        expected[n, 300:] = inputs[n, 2:]
    network = network.double()
    network.frequencies = torch.linspace(-2, 10, 30, dtype=torch.float64).exp().expand(5, 30)
    found = network.fourier_features(torch.from_numpy(points), torch.from_numpy(colours))
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-9)


def test_forward_against_a_loop_over_pixels():
    network = published(dim=5).double().eval()
    image = torch.rand(1, 3, 3, 4, dtype=torch.float64)
    found = network(image)
    assert found.shape == (1, 5, 3, 4)
    for row in range(3):
        for column in range(4):
            point = torch.tensor([[(row + 0.5) / 3 * 2 - 1, (column + 0.5) / 4 * 2 - 1]], dtype=torch.float64)
            x = network.fourier_features(point, image[:, :, row, column])[0]
            x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * network.norm_in.weight + network.norm_in.bias
            x = (network.layer_in.weight @ x + network.layer_in.bias).clamp(min=0)
            x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * network.norm.weight + network.norm.bias
            x = (network.layer.weight @ x + network.layer.bias).clamp(min=0)
            expected = network.layer_out.weight @ x + network.layer_out.bias
            # A coordinate that is rounded differently is e^10 times that in the phase.
            torch.testing.assert_close(found[0, :, row, column], expected, atol=1e-4, rtol=1e-4)


def test_rows_of_an_image_are_those_of_the_whole():
    network = ImplicitNetwork(6, frequency_table("resolved", (8, 8)), torch.tensor([[0.0] * 3, [1.0] * 3])).eval()
    image = torch.rand(1, 3, 7, 5)
    torch.testing.assert_close(network(image[:, :, 2:5], 2, 7), network(image)[:, :, 2:5])


def test_dropout_takes_whole_channels_and_keeps_the_mean():
    network = published().train()
    dropped = torch.stack([network._drop_channels(torch.ones(6, 303)) for _ in range(200)])
    assert (dropped == dropped[:, :1]).all()
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert abs(dropped.mean().item() - 1) < 0.02
    assert torch.equal(network.eval()._drop_channels(torch.ones(6, 303)), torch.ones(6, 303))


def test_a_gradient_reaches_every_parameter():
    network = published().train()
    network(torch.rand(1, 3, 8, 8)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_resolved_frequencies_leave_two_pixels_per_period():
    table = frequency_table("resolved", (40, 24))
    assert table.shape == (5, 30)
    for row, side in ((0, 40), (1, 24)):
        period_in_pixels = 2 * math.pi / table[row, -1].item() / (2 / side)
        assert period_in_pixels == pytest.approx(2)
    assert 2 * math.pi / table[2:, -1].numpy() == pytest.approx([2 / 255] * 3)
    assert table[:, 0].tolist() == pytest.approx([math.exp(-2)] * 5)
    ratios = table[:, 1:] / table[:, :-1]
    torch.testing.assert_close(ratios, ratios[:, :1].expand(-1, 29))
    assert frequency_table("resolved", (1, 1), colour=False).shape == (2, 30)


def test_a_colour_without_contrast_is_no_input():
    image = torch.stack([torch.full((4, 4), 0.3), torch.rand(4, 4), torch.rand(4, 4)])
    network = ImplicitNetwork(4, frequency_table("published", (4, 4)), colour_range(image))
    features = network.fourier_features(torch.zeros(16, 2), image.flatten(1).T + 1e-7)
    assert (features[:, 300] == 0).all()
    assert features.isfinite().all()


def test_cell_centres_lie_between_the_edges():
    found = cell_centres((2, 4))
    assert found[..., 0].tolist() == [[-0.5] * 4, [0.5] * 4]
    assert found[0, :, 1].tolist() == [-0.75, -0.25, 0.25, 0.75]


def test_bad_input():
    with pytest.raises(ConfigError, match="unknown kind of frequencies 'resolve'; did you mean 'resolved'"):
        frequency_table("resolve", (4, 4))
    with pytest.raises(InputError, match=r"an image is \[3, H, W\]"):
        colour_range(torch.rand(1, 3, 4, 4))
