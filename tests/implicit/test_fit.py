"""Fits: they improve on bilinear, start again where they ended, and refuse what they were not made for."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data

from featsharp.backbones import create_backbone
from featsharp.checkpoint import read_checkpoint
from featsharp.errors import BackboneMismatchError, CheckpointError, ConfigError, InputError
from featsharp.implicit import FitConfig, Fitter, load_fit
from featsharp.implicit.fitted import FIT_FILE
from featsharp.implicit.objective import FitObjective, blur, score_reconstruction, squared_variation
from featsharp.ops.resize import resize
from featsharp.ops.views import View
from featsharp.ops.warp import inside, warp

SMALL = FitConfig(views=12, views_per_step=4)


def photo(height: int = 96, width: int = 128) -> Image.Image:
    return Image.fromarray(data.astronaut()[40:300, 120:460]).resize((width, height))


def fitter(config: FitConfig = SMALL, *, backbone: str = "toy-vit", **options) -> Fitter:
    return Fitter(create_backbone(backbone), photo(), config, **options)


@pytest.fixture(scope="module")
def finished() -> Fitter:
    """A fit that is good enough to look at."""
    made = fitter(FitConfig(views=100))
    made.run(150)
    return made


# What it achieves


@pytest.mark.slow
def test_a_fit_explains_unseen_views_better_than_bilinear(finished):
    """P6."""
    targets, views = finished.held_out_views(16)
    low_res = finished.low_res()
    bilinear = score_reconstruction(resize(low_res, finished.render_size), targets, views)
    fitted = score_reconstruction(finished.fitted.features(finished.render_size), targets, views)
    assert fitted.fidelity > 1.2 * bilinear.fidelity
    assert fitted.cosine > bilinear.cosine + 0.01


def test_it_starts_as_the_bilinear_map(finished):
    new = fitter()
    torch.testing.assert_close(new.fitted.features((56, 72)), resize(new.low_res(), (56, 72)), atol=1e-4, rtol=1e-4)


def test_queries_at_several_resolutions_agree(finished):
    height, width = finished.render_size
    base = finished.fitted.features()
    assert base.shape == (1, 32, *finished.size)
    fine = finished.fitted.features((3 * height, 3 * width))
    for size in ((height, width), (2 * height, 2 * width), finished.grid):
        coarse = finished.fitted.features(size)
        assert coarse.shape == (1, 32, *size)
        cosine = F.cosine_similarity(resize(fine, size), coarse, dim=1)
        assert cosine.mean() > 0.95
    assert finished.fitted.features((1, 1)).isfinite().all()


def test_blocks_of_rows_make_the_whole_map(finished):
    whole = finished.fitted.features((37, 21))
    torch.testing.assert_close(finished.fitted.features((37, 21), points=100), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"start": "nothing", "frequencies": "published"},
        {"downsampler": "attention", "render": 2},
        {"colour": False, "dim": 5},
        {"downsampler": "area", "render": 8},
    ],
)
def test_published_and_other_choices_fit_too(options):
    made = fitter(dataclasses.replace(SMALL, **options))
    errors = [made.train_step().error.item() for _ in range(30)]
    assert np.mean(errors[-5:]) < np.mean(errors[:3])
    assert made.fitted.features((20, 30)).shape == (1, 32, 20, 30)


def test_a_backbone_of_one_size():
    made = fitter(backbone="toy-vit-fixed")
    made.run(2)
    assert made.size == (64, 64)
    assert made.fitted.features((10, 30)).shape == (1, 32, 10, 30)


@pytest.mark.gpu
def test_a_fit_on_a_gpu(tmp_path):
    def on_gpu(**options) -> Fitter:
        return Fitter(create_backbone("toy-vit").cuda(), photo(), SMALL, **options)

    before = torch.cuda.get_rng_state()
    made = on_gpu()
    made.run(20, tmp_path / "photo.pth", save_every=10)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert made.fitted.features((30, 20)).device.type == "cuda"
    resumed = on_gpu(resume=tmp_path / "photo.pth")
    resumed.run(21)
    loaded = load_fit(tmp_path / "photo.pth")
    torch.testing.assert_close(loaded.features((30, 20)), made.fitted.features((30, 20)).cpu(), atol=1e-2, rtol=1e-2)


def test_size_is_rounded_to_whole_patches():
    assert fitter(size=(45, 90)).size == (48, 88)


# The same numbers every time


def weights(made: Fitter) -> dict[str, torch.Tensor]:
    return {**made.fitted.state_dict(), **made.objective.state_dict()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


class Killed(BaseException):
    """Ends a fit where nothing catches it."""


@pytest.mark.parametrize("downsampler", ["simple", "attention"])
def test_a_killed_fit_goes_on_as_if_nothing_had_happened(tmp_path, downsampler):
    config = dataclasses.replace(SMALL, downsampler=downsampler, render=2)
    path = tmp_path / "photo.pth"

    def killing(items, doing):
        for number, item in enumerate(items):
            if doing == "fitting" and number == 8:
                raise Killed
            yield item

    with pytest.raises(Killed):
        fitter(config, progress=killing).run(12, path, save_every=5)
    assert read_checkpoint(path, FIT_FILE)["training"]["step"] == 5
    torch.manual_seed(99)  # what was drawn before must not matter
    resumed = fitter(config, resume=path)
    assert resumed.step == 5
    resumed.run(12, path)
    uninterrupted = fitter(config)
    uninterrupted.run(12)
    assert_equal(weights(resumed), weights(uninterrupted))
    assert_equal(load_fit(path).state_dict(), uninterrupted.fitted.state_dict())
    # And more steps continue it.
    longer = fitter(config, resume=path)
    longer.run(14)
    uninterrupted.run(14)
    assert_equal(weights(longer), weights(uninterrupted))


def test_the_seed_decides_and_global_random_numbers_are_left_alone(tmp_path):
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = fitter()
    first.run(3, tmp_path / "a.pth")
    load_fit(tmp_path / "a.pth").features((9, 9))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    other = fitter(dataclasses.replace(SMALL, seed=1))
    assert not torch.equal(other.views.to_base, first.views.to_base)
    held_out = first.held_out_views(12)[1]
    assert not torch.equal(held_out.to_base, first.views.to_base)


# The file


def test_a_loaded_fit_gives_the_same_features(finished, tmp_path):
    finished.save(tmp_path / "photo.pth")
    loaded = load_fit(tmp_path / "photo.pth")
    assert torch.equal(loaded.features((50, 31)), finished.fitted.features((50, 31)))
    assert loaded.image.dtype == torch.uint8
    assert loaded.image_size == finished.size
    assert not loaded.training
    assert (tmp_path / "photo.pth").stat().st_size < 2e6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"views": 13}, r"other settings: views 13 instead of 12\. Give the same"),
        ({"seed": 5, "dim": 8}, "dim 8 instead of 128; seed 5 instead of 0"),
        ({"render": 2}, "render 2 instead of 4"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, said):
    fitter().save(tmp_path / "photo.pth")
    with pytest.raises(CheckpointError, match=said):
        fitter(dataclasses.replace(SMALL, **change), resume=tmp_path / "photo.pth")


def test_another_picture_size_or_backbone_is_refused(tmp_path):
    path = tmp_path / "photo.pth"
    fitter().save(path)
    with pytest.raises(CheckpointError, match="other settings: another picture"):
        Fitter(create_backbone("toy-vit"), photo().rotate(180), SMALL, resume=path)
    with pytest.raises(CheckpointError, match=r"size \[64, 64\] instead of \[56, 72\]"):
        fitter(size=(64, 64), resume=path)
    with pytest.raises(BackboneMismatchError, match="was trained for backbone 'toy-vit', not for this 'toy-cnn'"):
        fitter(backbone="toy-cnn", resume=path)


@pytest.mark.parametrize("change", [{"exp_avg": 0.5}, {"exp_avg": torch.zeros(3, 3, 3)}])
def test_a_damaged_state_of_the_optimiser_is_refused(tmp_path, change):
    path = tmp_path / "photo.pth"
    fitter().run(2, path)
    content = torch.load(path, weights_only=True)
    content["training"]["optimizer"]["state"][0].update(change)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="exp_avg of the optimiser is not as large as its weights"):
        fitter(resume=path)


def test_fewer_steps_than_made_are_refused(tmp_path):
    made = fitter()
    made.run(3, tmp_path / "photo.pth")
    with pytest.raises(CheckpointError, match="has made 3 steps already; give at least as many, not 2"):
        fitter(resume=tmp_path / "photo.pth").run(2)


def test_files_that_are_no_fit(tmp_path):
    torch.save({"format": "featsharp", "version": 1}, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=r"last\.pth is not a fit to one image; `featsharp fit` writes them"):
        load_fit(tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_fit(tmp_path / "none.pth")
    path = tmp_path / "fit.pth"
    fitter().save(path)
    with pytest.raises(CheckpointError, match="is not a featsharp checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("network.layer.weight", None, "lacks network.layer.weight|Missing key"),
        ("network.layer.weight", torch.zeros(2, 2), "size mismatch"),
        ("projection.mean", torch.full((32,), float("nan")), "projection.mean holds NaN"),
        ("base", None, "lacks base"),
        ("base", "text", "base is no tensor"),
    ],
)
def test_damaged_fits(tmp_path, key, value, said):
    path = tmp_path / "fit.pth"
    fitter().save(path)
    content = torch.load(path, weights_only=True)
    content["model"].pop(key)
    if value is not None:
        content["model"][key] = value
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"fit\.pth is damaged: .*({said})"):
        load_fit(path)


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"views": 0}, "views must be at least 1; got 0"),
        ({"render": 0}, "render must be at least 1"),
        ({"downsampler": "simpel"}, "unknown downsampler 'simpel'; did you mean 'simple'"),
        ({"frequencies": "all"}, "unknown kind of frequencies 'all'"),
        ({"start": "bilinea"}, "did you mean 'bilinear'"),
    ],
)
def test_bad_settings(options, said):
    with pytest.raises(ConfigError, match=said):
        FitConfig(**options)


def test_bad_input():
    with pytest.raises(ConfigError, match=r"render=9 cells per token are more than pixels; .* patches of 8 pixels"):
        fitter(dataclasses.replace(SMALL, render=9))
    with pytest.raises(InputError, match="smaller than one 8-pixel patch"):
        Fitter(create_backbone("toy-vit"), photo(4, 4), SMALL)
    with pytest.raises(InputError, match="at least 1x1 cells; got 0x5"):
        fitter().fitted.features((0, 5))


# Parts of the loss


def test_the_loss_against_loops():
    torch.manual_seed(3)
    objective = FitObjective(3, 2, "area").double()
    features = torch.randn(1, 3, 6, 8, dtype=torch.float64)
    targets = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    homographies = torch.tensor(
        [[[0.7, 0, 0.5], [0, 0.7, -0.4], [0, 0, 1]], [[-1.0, 0, 0.1], [0, 1.0, 0], [0, 0, 1]]], dtype=torch.float64
    )
    found = objective(features, targets, View(homographies))
    magnitude = features.square().sum(1, keepdim=True).sqrt()
    views = warp(torch.cat([magnitude, features], 1).repeat(2, 1, 1, 1), homographies, (6, 8))
    weight, bias = objective.uncertainty.weight[0, :, 0, 0], objective.uncertainty.bias[0]
    valid = inside(homographies, (3, 4))
    assert 0 < valid.mean() < 1
    terms, errors = [], []
    for n in range(2):
        for y in range(3):
            for x in range(4):
                if not valid[n, 0, y, x]:
                    continue
                pooled = views[n, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((1, 2))
                target = targets[n, :, y, x]
                s = max(torch.exp(weight @ target + bias + 0.1), torch.tensor(1e-4))
                error = ((pooled[1:] - target) ** 2).mean()
                errors.append(error)
                term = error / (2 * s**2) + torch.log(s)
                terms.append(term + 0.001 * (pooled[0] - target.norm()) ** 2)
    variation = ((magnitude[..., 1:, :] - magnitude[..., :-1, :]) ** 2).mean()
    variation = variation + ((magnitude[..., 1:] - magnitude[..., :-1]) ** 2).mean()
    kernel = torch.exp(-(torch.arange(-2.0, 3.0, dtype=torch.float64)[:, None] ** 2) / 2)
    kernel = kernel @ kernel.T / kernel.sum() ** 2
    padded = F.pad(features, (2, 2, 2, 2), mode="replicate")
    smooth = torch.zeros_like(features)
    for y in range(6):
        for x in range(8):
            smooth[0, :, y, x] = (padded[0, :, y : y + 5, x : x + 5] * kernel).sum((1, 2))
    expected = sum(terms) / len(terms) + 0.05 * variation + 0.1 * ((features - smooth) ** 2).mean()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.error, sum(errors) / len(errors))
    torch.testing.assert_close(blur(features), smooth)


def test_variation_of_lines_and_points():
    assert squared_variation(torch.ones(1, 1, 1, 1)) == 0
    assert squared_variation(torch.tensor([[[[0.0, 1.0, 3.0]]]])).item() == pytest.approx((1 + 4) / 2)


def test_a_gradient_reaches_everything():
    made = fitter(dataclasses.replace(SMALL, start="nothing"))
    before = copy.deepcopy(weights(made))
    made.run(2)
    after = weights(made)
    trained = [f"network.{name}" for name, _ in made.fitted.network.named_parameters()]
    trained += [name for name, _ in made.objective.named_parameters()]
    assert all(not torch.equal(before[name], after[name]) for name in trained)


def test_reconstruction_of_the_truth(tmp_path: Path):
    made = fitter()
    features = made.low_res()
    views = View.crop(1, (0, 0))
    found = score_reconstruction(resize(features, made.grid), features, views)
    assert found.cosine == pytest.approx(1)
    assert found.fidelity > 1e6
    mean = features.mean((2, 3), keepdim=True).expand_as(features)
    assert score_reconstruction(mean, features, views).fidelity == pytest.approx(1, rel=1e-3)
