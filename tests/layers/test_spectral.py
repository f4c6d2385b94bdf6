"""Spectral reparametrisation against exact singular values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from featsharp.layers.local_block import LocalBlock, StackedLinear
from featsharp.layers.spectral import SpectralScale, add_spectral, folded_state, spectral_norms


def scale_of(layer: nn.Module) -> SpectralScale:
    return layer.parametrizations.weight[0]


def exact_norms(weight: torch.Tensor, parts: int = 1) -> torch.Tensor:
    return torch.linalg.matrix_norm(weight.detach().double().unflatten(0, (parts, -1)), 2)


def test_every_norm_starts_at_one():
    layer = nn.Linear(7, 12)
    add_spectral(layer)
    torch.testing.assert_close(exact_norms(layer.eval().weight), torch.ones(1).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(12, 7), (3, 9)])
def test_the_norm_is_the_learned_one_after_the_weight_has_moved(shape):
    layer = nn.Linear(*shape[::-1])
    add_spectral(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(shape))
        scale_of(layer).log_scale.fill_(1.7)
    for _ in range(300):  # one power iteration each
        _ = layer.weight
    expected = F.softplus(torch.tensor([1.7])).double() + 0.05
    torch.testing.assert_close(exact_norms(layer.eval().weight), expected, atol=0, rtol=1e-4)
    torch.testing.assert_close(
        scale_of(layer).norms(layer.parametrizations.weight.original),
        exact_norms(layer.parametrizations.weight.original).float(),
        atol=0,
        rtol=1e-4,
    )
    assert spectral_norms(nn.ModuleDict({"a": layer})).keys() == {"a"}
    torch.testing.assert_close(spectral_norms(nn.ModuleDict({"a": layer}))["a"].double(), expected)


def test_the_direction_of_a_weight_stays():
    layer = nn.Linear(5, 6)
    before = layer.weight.detach().clone()
    add_spectral(layer)
    ratio = layer.eval().weight / before
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


def test_stacked_layers_are_scaled_part_by_part():
    layer = StackedLinear(6, 5, 3, bias=False)
    assert (layer.in_features, layer.out_features) == (6, 15)
    with torch.no_grad():
        layer.weight[5:10] *= 40
    add_spectral(layer)
    with torch.no_grad():
        scale_of(layer).log_scale.copy_(torch.tensor([[-1.0], [0.5], [3.0]]))
    expected = F.softplus(torch.tensor([-1.0, 0.5, 3.0])).double() + 0.05
    torch.testing.assert_close(exact_norms(layer.eval().weight, 3), expected, atol=0, rtol=1e-4)


def test_attention_and_mlp_of_the_block_are_cut_into_their_matrices():
    block = LocalBlock(32, 16)
    add_spectral(block)
    norms = spectral_norms(block)
    assert {name: len(norm) for name, norm in norms.items()} == {
        "attention.qkv": 3,
        "attention.proj": 1,
        "mlp.gate_up": 2,
        "mlp.down": 1,
    }


def test_eval_leaves_the_estimate_and_training_improves_it():
    layer = nn.Linear(8, 8)
    add_spectral(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(8, 8))
    weight = layer.parametrizations.weight.original.detach()
    layer.eval()
    before = scale_of(layer).norms(weight)
    _ = layer.weight
    assert torch.equal(scale_of(layer).norms(weight), before)
    layer.train()
    _ = layer.weight
    after = scale_of(layer).norms(weight)
    assert (exact_norms(weight) - after).abs() < (exact_norms(weight) - before).abs()


def test_weight_and_scale_get_the_gradient_of_the_formula():
    layer = nn.Linear(4, 3, bias=False).double()
    add_spectral(layer)
    layer.eval()
    x, scale = torch.randn(5, 4, dtype=torch.float64), scale_of(layer)
    layer(x).square().sum().backward()
    original = layer.parametrizations.weight.original
    assert original.grad.abs().sum() > 0
    raw, log_scale = original.detach().clone().requires_grad_(), scale.log_scale.detach().clone().requires_grad_()
    # The estimate is exact at the start, and so is its gradient u v^T that of the largest singular value.
    effective = raw * (F.softplus(log_scale) + 0.05) / (torch.linalg.matrix_norm(raw, 2) + 1e-6)
    (x @ effective.T).square().sum().backward()
    torch.testing.assert_close(original.grad, raw.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scale.log_scale.grad, log_scale.grad, atol=1e-5, rtol=1e-5)


def test_two_training_passes_before_one_backward():
    layer = nn.Linear(4, 4)
    add_spectral(layer)
    (layer(torch.randn(2, 4)).sum() + layer(torch.randn(2, 4)).sum()).backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_autocast():
    block = LocalBlock(32, 16)
    add_spectral(block)
    x = torch.randn(1, 3, 4, 32)
    exact = copy.deepcopy(block)(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
        norms = scale_of(block.mlp.down).norms(block.mlp.down.parametrizations.weight.original)
    assert norms.dtype == torch.float32
    assert scale_of(block.mlp.down).u.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_layers_are_parametrised_once():
    layer = nn.Linear(3, 3)
    add_spectral(layer)
    add_spectral(layer)
    assert len(layer.parametrizations.weight) == 1


def test_state_dict_round_trip():
    block, other = LocalBlock(32, 16), LocalBlock(32, 16)
    for module in (block, other):
        add_spectral(module)
    block(torch.randn(1, 2, 3, 32)).sum().backward()
    other.load_state_dict(block.state_dict())
    x = torch.randn(1, 3, 4, 32)
    assert torch.equal(other.eval()(x), block.eval()(x))


def test_folded_state_is_that_of_a_plain_module_with_the_same_output():
    block, plain = LocalBlock(32, 16), LocalBlock(32, 16)
    names = list(plain.state_dict())
    add_spectral(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = folded_state(block)
    assert sorted(state) == sorted(names)
    assert not any(value.requires_grad for value in state.values())
    plain.load_state_dict(state)
    x = torch.randn(1, 3, 4, 32)
    torch.testing.assert_close(plain(x), block.eval()(x), atol=1e-6, rtol=1e-6)


def test_folding_leaves_a_module_in_training_as_it_is():
    layer = nn.Linear(4, 4)
    add_spectral(layer)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for _ in range(2):
        assert folded_state(layer).keys() == {"weight", "bias"}
    assert parametrize.is_parametrized(layer, "weight")
    assert scale_of(layer).training
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    layer(torch.randn(2, 4)).sum().backward()
    assert scale_of(layer).log_scale.grad is not None


def test_folding_a_module_without_reparametrisation_gives_its_state_dict():
    layer = nn.Linear(2, 3)
    assert all(torch.equal(folded_state(layer)[key], value) for key, value in layer.state_dict().items())
