"""Regression on stored maps: against a plain loop, with pictures of several sizes, and what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featsharp.extraction
from featsharp.builder import create_encoder
from featsharp.data.loader import StepSampler, load_batches
from featsharp.data.mixture import Division, ImageMixture
from featsharp.data.views import ViewConfig
from featsharp.errors import ConfigError, DataError
from featsharp.extraction.pipeline import Extraction, Options
from featsharp.train import main
from featsharp.training.distributed import World
from featsharp.training.least_squares import fit_linear
from featsharp.training.objectives import create_objective
from featsharp.training.objectives.regression import RegressionConfig

SIZES = [(64, 64), (48, 80), (64, 64), (80, 48), (70, 53)]  # (h, w)
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        save_noise(folder / f"{number}.png", (height, width), rng)
    return folder


@pytest.fixture(scope="module")
def store(photos, tmp_path_factory):
    return extract(photos, tmp_path_factory.mktemp("targets"))


def save_noise(path, size, rng):
    pixels = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size[::-1]).save(path)


def extract(photos, folder, encoder=None, **options):
    """Maps of the photographs in ``folder``; another one than the student's, by default."""
    work = Extraction(
        encoder or create_encoder("toy-vit", "tile", 2).eval(), photos, folder, Options(dtype=torch.float32, **options)
    )
    work.run(work.missing)
    return folder


def student(upsampler="learned-views", factor=2, **options):
    torch.manual_seed(1)
    encoder = create_encoder("toy-vit", upsampler, factor, upsampler_options=options, bias_buffer=False)
    for parameter in encoder.upsampler.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder


def open_all(encoder, photos, store, **config):
    """The objective and one batch of all pictures."""
    objective = create_objective(encoder, RegressionConfig(store=str(store), **config))
    mixture = ImageMixture.from_data_dir(photos if isinstance(photos, list) else str(photos))
    dataset = objective.open_dataset(encoder, mixture, ViewConfig(), 0)
    return objective, dataset.load(range(len(SIZES)), Division())


@pytest.mark.parametrize("upsampler", ["learned-views", "featsharp", "lift"])
def test_loss_and_gradient_are_those_of_a_loop_over_pictures(photos, store, upsampler):
    encoder = student(upsampler).train(upsampler != "lift")  # batch normalisation would mix pictures
    objective, (samples, skipped) = open_all(encoder, photos, store)
    assert not skipped
    losses = objective.backward(encoder, samples, (64, 64), loss_scale=3.0)
    found = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    targets = featsharp.extraction.open(store)
    total = 0.0
    for key in targets:
        prepared = encoder.prepare_image(photos / key)
        out = encoder(encoder.input_conditioner(prepared.pixels), low_res_size=prepared.low_res_size)
        error = (out.high_res - encoder.normalizer(targets[key][None])).square().mean() / len(SIZES)
        (3 * error).backward()
        total += error.item()
    assert losses.total.item() == losses.reconstruction.item() == pytest.approx(total, rel=1e-4)
    assert found
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3)


def test_pictures_of_one_size_share_a_pass(photos, store):
    _, (samples, _) = open_all(student(), photos, store)
    assert sorted(len(group.images) for group in samples) == [1, 1, 1, 2]
    assert {group.maps.shape[1:] for group in samples} >= {(32, 16, 16)}


def test_the_fit_in_closed_form_finds_a_planted_mix(photos, tmp_path):
    """The targets are a linear map of the same inputs, which depend on each other: the maps agree, if not the mix."""
    planted = student(linear=True)
    store = extract(photos, tmp_path, planted.eval())
    encoder = create_encoder("toy-vit", "learned-views", 2, upsampler_options={"linear": True}, bias_buffer=False)
    objective, batch = open_all(encoder, photos, store)
    before = objective.backward(encoder, batch.samples, (64, 64)).total
    fit_linear(encoder, objective, [batch], 1e-7, (64, 64), ALONE)
    assert objective.backward(encoder, batch.samples, (64, 64)).total < 1e-3 * before


def test_a_picture_that_the_store_lacks_is_replaced_and_named(store, tmp_path, photos):
    photos = Path(shutil.copytree(photos, tmp_path / "photos"))
    save_noise(photos / "9.png", (64, 64), np.random.default_rng(9))
    encoder = student()
    objective = create_objective(encoder, RegressionConfig(store=str(store)))
    mixture = ImageMixture.from_data_dir(str(photos))
    dataset = objective.open_dataset(encoder, mixture, ViewConfig(), 0)
    samples, skipped = dataset.load(range(6), Division())
    assert [name for name, _ in skipped] == ["9.png"]
    assert sum(len(group.images) for group in samples) == 6


def test_workers_load_the_same(photos, store):
    encoder = student()
    objective = create_objective(encoder, RegressionConfig(store=str(store)))

    def batches(workers):
        dataset = objective.open_dataset(encoder, ImageMixture.from_data_dir(str(photos)), ViewConfig(), 0)
        return [batch.samples for batch in load_batches(dataset, StepSampler(0, 4, 2), workers)]

    for ours, theirs in zip(batches(0), batches(1), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.low_res_size == other.low_res_size
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.maps, other.maps)


def test_maps_of_another_factor_are_refused(photos, store):
    encoder = student(factor=3)
    objective, (samples, _) = open_all(encoder, photos, store)
    with pytest.raises(ConfigError, match=r"makes \(24, 24\); extract them with --factor 3"):
        objective.backward(encoder, samples, (64, 64))


def test_maps_of_another_backbone_are_refused(photos, store):
    with pytest.raises(ConfigError, match=r"features of backbone 'toy-vit', not of 'toy-cnn'"):
        open_all(create_encoder("toy-cnn", "bilinear", 2, bias_buffer=False), photos, store)


def test_maps_of_something_else_are_refused(photos, tmp_path):
    store = extract(photos, tmp_path, normalized=True)
    with pytest.raises(ConfigError, match=r"maps as they are, without normalized"):
        open_all(student(), photos, store)


def test_other_pictures_are_refused(store, tmp_path):
    rng = np.random.default_rng(0)
    save_noise(tmp_path / "a.png", (64, 64), rng)
    with pytest.raises(DataError, match=r"has no map of any picture .* look like '0.png'"):
        open_all(student(), tmp_path, store)
    save_noise(tmp_path / "0.png", (96, 64), rng)
    with pytest.raises(DataError, match=r"0.png has another size than when its map was made"):
        open_all(student(), tmp_path, store)


def test_several_folders_and_a_bias_buffer_are_refused(photos, store):
    with pytest.raises(ConfigError, match=r"takes one folder or tar as train_data_dir"):
        open_all(student(), [str(photos), str(photos)], store)
    encoder = create_encoder("toy-vit", "learned-views", 2, bias_buffer=True)
    with pytest.raises(ConfigError, match=r"set bias_buffer=false"):
        create_objective(encoder, RegressionConfig(store=str(store)))


def test_the_command_learns_from_a_store(photos, tmp_path, monkeypatch):
    """A fit in closed form, then steps of the block, from features that are remembered."""
    monkeypatch.chdir(tmp_path)
    store = extract(photos, tmp_path / "targets", create_encoder("toy-vit", "views", 2).eval())
    arguments = ["+model=toy-vit", "+upsampler=learned-views-2x", "objective=regression", f"objective.store={store}"]
    arguments += [f"train_data_dir={photos}", "num_training_steps=4", "batch_size=3", "num_workers=0", "viz.type=none"]
    arguments += ["viz.num_images=1", "normalizer.num_samples=5", "linear_fit.samples=5", "feature_cache.samples=5"]
    assert main([*arguments, "progress=false"]) == 0
    encoder = featsharp.load_from_file(str(next(tmp_path.glob("outputs/**/last.pth"))))
    assert (encoder.upsampler.mix - torch.eye(32, 64)).abs().max() > 1e-3
