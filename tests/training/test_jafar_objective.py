"""JAFAR's objective: the gradient of its formula at the sizes that it draws."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.builder import create_encoder
from featsharp.data.views import Views
from featsharp.errors import ConfigError, InputError
from featsharp.model import SharpEncoder
from featsharp.training.objectives import create_objective
from featsharp.training.objectives.jafar import JAFARConfig, JAFARObjective, min_max

LOW_RES = (32, 48)


def encoder_of(upsampler: str = "jafar", factor: float = 2) -> SharpEncoder:
    return create_encoder("toy-vit", upsampler, factor).train()


def some_views(batch: int = 2) -> Views:
    """Smooth pictures of twice LOW_RES, with a margin of 8 and 12 around them."""
    canvas = F.interpolate(torch.rand(batch, 3, 12, 18), (80, 120), mode="bilinear")
    return Views(canvas, torch.ones(batch, 1, 80, 120), torch.eye(3).expand(batch, 1, 3, 3))


def scaled(x: Tensor) -> Tensor:
    return torch.stack([(one - one.min()) / (one.max() - one.min()) for one in x])


@pytest.mark.parametrize("scale", [0.25, 0.33, 0.5])
def test_gradients_equal_those_of_the_formula(scale):
    encoder = encoder_of()
    naive = copy.deepcopy(encoder)
    settings = JAFARConfig(input_scale=[scale, scale], guidance_scale=0.4, mse_weight=0.7)
    views = some_views()
    losses = create_objective(encoder, settings).backward(encoder, views, LOW_RES)

    mean, std = (torch.tensor(value)[:, None, None] for value in (naive.backbone.mean, naive.backbone.std))
    image = (views.canvas[..., 8:72, 12:108] - mean) / std
    size = tuple(max(1, round(n * scale / 8)) * 8 for n in (64, 96))
    small = F.interpolate(image, size, mode="bilinear", antialias=True)
    guide = F.interpolate(image, (26, 38), mode="bilinear", antialias=True)
    target = naive.backbone(image).features
    found = naive.upsampler.upsample(naive.backbone(small).features, guide, (8, 12))
    cosine = 1 - F.cosine_similarity(found, target).mean()
    mse = (scaled(found) - scaled(target)).square().mean()
    (cosine + 0.7 * mse).backward()
    torch.testing.assert_close(losses.total, (cosine + 0.7 * mse).detach())
    torch.testing.assert_close(losses.reconstruction, cosine.detach())
    torch.testing.assert_close(losses.terms, {"mse": mse.detach()})
    for (name, p), expected in zip(encoder.named_parameters(), naive.parameters(), strict=True):
        if name.startswith("backbone."):
            assert p.grad is None
        else:
            assert (p.grad - expected.grad).abs().max() <= 1e-4 * expected.grad.abs().max() + 1e-7, name


def test_every_step_draws_its_own_scale_and_a_seed_repeats_it():
    encoder = encoder_of()
    objective = create_objective(encoder, JAFARConfig())
    views, sizes = some_views(), []
    encoder.backbone.register_forward_pre_hook(lambda module, given: sizes.append(tuple(given[0].shape[2:])))
    losses = []
    for seed in (0, 1, 2, 0):
        torch.manual_seed(seed)
        losses.append(objective.backward(encoder, views, LOW_RES).total)
    assert sizes[::2] == 4 * [(64, 96)]
    inputs = sizes[1::2]
    assert inputs[0] == inputs[3]
    assert losses[0] == losses[3]
    assert len(set(inputs)) > 1
    assert all(16 <= height <= 32 and 24 <= width <= 48 for height, width in inputs)
    assert all(height % 8 == width % 8 == 0 for height, width in inputs)


def test_min_max_looks_at_one_image():
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(min_max(maps), scaled(maps))
    torch.testing.assert_close(min_max(maps[:1] * 7 - 3), min_max(maps[:1]))
    assert torch.equal(min_max(torch.ones(1, 3, 2, 2)), torch.zeros(1, 3, 2, 2))


@pytest.mark.slow
def test_a_few_steps_lower_the_loss():
    encoder = encoder_of()
    objective = create_objective(encoder, JAFARConfig())
    assert objective.view_size(encoder) == (128, 128)
    optimizer = torch.optim.Adam(encoder.upsampler.parameters(), lr=3e-3)
    views, totals = some_views(4), []
    for _ in range(25):
        torch.manual_seed(0)
        optimizer.zero_grad()
        totals.append(objective.backward(encoder, views, LOW_RES).total.item())
        optimizer.step()
    assert totals[-1] < 0.9 * totals[0]


def test_loss_that_is_not_finite_is_refused():
    encoder = encoder_of()
    torch.nn.init.constant_(encoder.upsampler.gamma.weight, float("nan"))
    with pytest.raises(InputError, match="training loss is nan"):
        create_objective(encoder, JAFARConfig()).backward(encoder, some_views(), LOW_RES)


def test_what_it_cannot_train():
    for name, factor, said in (
        ("lift", 2, "LiFT has factors that are 'powers of two'; use objective=reconstruction"),
        ("featsharp", 2, "encodes the image again"),
        ("bilinear", 2, "nothing to train"),
    ):
        with pytest.raises(ConfigError, match=said):
            create_objective(encoder_of(name, factor), JAFARConfig())
    with pytest.raises(ConfigError, match=r"objective 'jafar' .* bias_buffer=false"):
        create_objective(create_encoder("toy-vit", "jafar", 2, bias_buffer=True), JAFARConfig())
    with pytest.raises(ConfigError, match="'toy-vit-fixed' takes 64x64 only"):
        create_objective(create_encoder("toy-vit-fixed", "jafar", 2), JAFARConfig())
    for settings, said in (
        (JAFARConfig(input_scale=[0.5, 0.25]), "input_scale must be"),
        (JAFARConfig(input_scale=[0.5]), "input_scale must be"),
        (JAFARConfig(guidance_scale=0), "guidance_scale must be"),
    ):
        with pytest.raises(ConfigError, match=said):
            JAFARObjective(32, 2, settings)
