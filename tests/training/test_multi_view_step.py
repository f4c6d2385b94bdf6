"""A step's two-part backward equals the gradient of the whole, and never touches the backbone."""

import copy

import numpy as np
import pytest
import torch

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.data.views import ViewConfig, Views, base_view, sample_homography
from featsharp.errors import ConfigError, InputError
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics
from featsharp.ops.resize import resize
from featsharp.ops.warp import inside, warp
from featsharp.training.objectives import create_objective
from featsharp.training.objectives.multi_view import MultiViewConfig, MultiViewObjective, encode_views
from featsharp.upsamplers.interpolate import Bilinear

LOW_RES = (32, 48)


def encoder_of(upsampler: str, backbone: str = "toy-vit", factor: float = 2) -> SharpEncoder:
    encoder = create_encoder(backbone, upsampler, factor, normalizer="phi-s", bias_buffer=True)
    statistics = FeatureStatistics(encoder.embed_dim)
    statistics.update(encoder.backbone(torch.randn(8, 3, 64, 64)).features)
    encoder.normalizer.fit(statistics)
    assert encoder.bias_buffer is not None
    encoder.bias_buffer.buffer.data.normal_(std=0.1)
    return encoder.train()


def some_views(batch: int = 2, count: int = 2) -> Views:
    """Views of 64 x 96 pixels with a margin of 8 and 12, black in one corner."""
    rng = np.random.default_rng(0)
    canvas = torch.rand(batch, 3, 80, 120)
    mask = torch.ones(batch, 1, 80, 120)
    mask[0, :, :20, :30] = 0
    matrices = [sample_homography((64, 96), ViewConfig(jitter_zoom=[0.9, 1.5]), rng) for _ in range(batch * count)]
    homographies = torch.from_numpy(np.stack(matrices)).float().unflatten(0, (batch, count))
    return Views(canvas * mask, mask, homographies)


@pytest.mark.parametrize("upsampler", ["featsharp", "featup", "bilinear"])
@pytest.mark.parametrize(
    "settings",
    [
        MultiViewConfig(downsampler="simple", uncertainty=False, tv_weight=0.1),
        MultiViewConfig(downsampler="attention", kernel_size=3, uncertainty=True),
    ],
    ids=["simple", "attention"],
)
def test_gradients_equal_those_of_one_graph(upsampler, settings):
    encoder = encoder_of(upsampler)
    objective = MultiViewObjective(encoder.embed_dim, 2, settings).train()
    if objective.uncertainty is not None:
        objective.uncertainty.out.weight.data.normal_(std=0.1)
    naive_encoder, naive_objective = copy.deepcopy(encoder), copy.deepcopy(objective)
    views = some_views()

    torch.manual_seed(1)
    losses = objective.backward(encoder, views, LOW_RES)

    torch.manual_seed(1)
    base, base_mask = base_view(views)
    targets, token_masks = encode_views(naive_encoder, views, LOW_RES)
    image = naive_encoder.input_conditioner(base)
    high_res = naive_encoder.upsampler(image, naive_encoder.encode, LOW_RES).high_res
    naive = naive_objective(high_res, base_mask, targets, token_masks, views.homographies)
    naive.total.backward()

    assert torch.equal(losses.total, naive.total)
    found = {**dict(encoder.named_parameters()), **dict(objective.named_parameters())}
    expected = {**dict(naive_encoder.named_parameters()), **dict(naive_objective.named_parameters())}
    trained = [name for name in found if not name.startswith("backbone.")]
    assert "bias_buffer.buffer" in trained
    for name in trained:
        assert found[name].grad is not None, name
        scale = expected[name].grad.abs().max()
        assert (found[name].grad - expected[name].grad).abs().max() <= 1e-5 * scale + 1e-9, name
    assert found["bias_buffer.buffer"].grad.abs().max() > 0


def test_backbone_gets_no_gradient_and_keeps_its_weights():
    """F10."""
    encoder = encoder_of("featsharp")
    objective = MultiViewObjective(encoder.embed_dim, 2, MultiViewConfig())
    before = copy.deepcopy(encoder.backbone.state_dict())
    optimizer = torch.optim.NAdam([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        objective.backward(encoder, some_views(), LOW_RES)
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in encoder.backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.backbone.state_dict().items())
    assert not encoder.backbone.training


def test_gradients_add_up_until_they_are_cleared():
    encoder = encoder_of("bilinear")
    objective = MultiViewObjective(encoder.embed_dim, 2, MultiViewConfig(downsampler="area", uncertainty=False))
    views = some_views()
    objective.backward(encoder, views, LOW_RES)
    assert encoder.bias_buffer is not None
    once = encoder.bias_buffer.buffer.grad.clone()
    objective.backward(encoder, views, LOW_RES)
    assert torch.allclose(encoder.bias_buffer.buffer.grad, 2 * once, rtol=1e-4)


def test_token_masks_cover_what_the_canvas_shows():
    encoder = encoder_of("bilinear")
    views = some_views()._replace(homographies=torch.eye(3).expand(2, 2, 3, 3))
    features, masks = encode_views(encoder, views, LOW_RES)
    assert features.shape == (4, 32, 4, 6)
    # A token is 16 pixels of the base view; the first image is black in the first 12 rows of the first 18 columns.
    # The antialias kernel may cost the tokens next to these, too, and no others.
    assert masks.shape == (4, 1, 4, 6)
    assert masks[:2, :, 0, :2].max() == 0
    assert masks[:2, :, 2:].min() == masks[:2, :, :, 3:].min() == masks[2:].min() == 1


def test_loss_that_is_not_finite_is_refused():
    encoder = encoder_of("bilinear")
    assert encoder.bias_buffer is not None
    encoder.bias_buffer.buffer.data[0, 0, 0, 0] = float("nan")
    objective = MultiViewObjective(encoder.embed_dim, 2, MultiViewConfig())
    with pytest.raises(InputError, match="training loss is nan"):
        objective.backward(encoder, some_views(), LOW_RES)


@pytest.mark.parametrize(
    "settings", [MultiViewConfig(uncertainty=True, tv_weight=0.1), MultiViewConfig(downsampler="area")]
)
def test_fractional_factors_are_compared_on_the_next_whole_multiple(settings):
    """Factor 1.5: a map of 6 x 9 cells for targets of 4 x 6 is warped on, and pooled from, 8 x 12."""
    encoder = encoder_of("bilinear", factor=1.5)
    objective = MultiViewObjective(encoder.embed_dim, 1.5, settings)
    views = some_views()
    losses = objective.backward(encoder, views, LOW_RES)

    base, base_mask = base_view(views)
    targets, token_masks = encode_views(encoder, views, LOW_RES)
    high_res = encoder.upsampler(encoder.input_conditioner(base), encoder.encode, LOW_RES).high_res
    assert high_res.shape[2:] == (6, 9)
    assert targets.shape[2:] == (4, 6)
    to_base = views.homographies.flatten(0, 1)
    warped = warp(high_res.repeat_interleave(2, 0), to_base, (8, 12))
    error = (objective.downsampler(warped) - targets).square().mean(1, keepdim=True)
    shown = warp(resize(base_mask, (8, 12)).repeat_interleave(2, 0), to_base, (4, 6), padding_mode="zeros") > 0.5
    # Tiles of 1.5 cells have no border between cells: all places weigh the same, whatever border_weight says.
    even = warp(torch.ones(4, 1, 8, 12), to_base, (4, 6), padding_mode="zeros")
    valid = shown * token_masks * inside(to_base, (4, 6))
    scale = valid.sum((1, 2, 3)).clamp(min=12)
    expected = ((valid * even * error).sum((1, 2, 3)) / scale).mean()
    torch.testing.assert_close(losses.reconstruction, expected.detach())
    assert encoder.bias_buffer is not None
    assert encoder.bias_buffer.buffer.grad.abs().max() > 0


def test_view_sizes_are_whole_patches():
    for name, factor in (("bilinear", 1.5), ("tile", 2)):
        encoder = encoder_of(name, factor=factor)
        assert create_objective(encoder, MultiViewConfig()).view_size(encoder) == (128, 128)

    class Wide(Bilinear):
        input_upsample_factor = 2.3

    encoder = create_encoder("toy-vit", Wide(32, 2.3))
    assert MultiViewObjective(32, 2.3, MultiViewConfig()).view_size(encoder) == (152, 152)  # 2.3 * 64 is 147.2


def test_several_maps_at_once_are_refused():
    class Twice(Bilinear):
        num_maps = 2

    with pytest.raises(ConfigError, match="Twice returns 2 maps at once"):
        create_objective(create_encoder("toy-vit", Twice(32, 2)), MultiViewConfig())


def test_views_in_parts_have_the_same_losses_and_gradients():
    views = some_views(count=3)
    found = []
    for budget in (2**27, 1):
        torch.manual_seed(0)
        encoder = encoder_of("featsharp")
        objective = MultiViewObjective(encoder.embed_dim, 2, MultiViewConfig(uncertainty=True, tv_weight=0.1))
        objective.max_warped_elements = budget
        losses = objective.backward(encoder, views, (64, 64))
        gradients = [p.grad for p in [*encoder.parameters(), *objective.parameters()] if p.requires_grad]
        found.append((list(losses), gradients))
    torch.testing.assert_close(found[1], found[0])


class Watched(Backbone):
    """Mean colours of patches; notes whether it runs under autocast."""

    def __init__(self) -> None:
        super().__init__("watched", patch_size=8, embed_dim=3, input_size=(64, 64))
        self.under_autocast: list[bool] = []

    def extract(self, images: torch.Tensor) -> BackboneOutput:
        self.under_autocast.append(torch.is_autocast_enabled("cpu"))
        return BackboneOutput(torch.nn.functional.avg_pool2d(images, 8), None)


@pytest.mark.parametrize("caller", [False, True])
def test_the_type_of_the_upsampler_is_not_that_of_backbone_passes(caller):
    """Tiles are encoded as views are: as the caller of the step has it."""
    backbone = Watched()
    encoder = create_encoder(backbone, "tile", 2, bias_buffer=True)
    objective = MultiViewObjective(3, 2, MultiViewConfig(downsampler="area"))
    with torch.autocast("cpu", torch.bfloat16, enabled=caller):
        objective.backward(encoder, some_views(), (64, 64), torch.bfloat16)
    assert set(backbone.under_autocast) == {caller}
    assert len(backbone.under_autocast) == 2  # views; low resolution and tiles
