"""Training by reconstruction: the gradient of its formula, the sizes it looks at, and that LiFT learns by it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.builder import create_encoder
from featsharp.data.loader import StepSampler, ViewDataset, load_batches
from featsharp.data.mixture import ImageMixture
from featsharp.data.views import ViewConfig, Views
from featsharp.errors import ConfigError, InputError
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics
from featsharp.ops.resize import size_of
from featsharp.training.config import RunConfig, UpsamplerConfig
from featsharp.training.distributed import World
from featsharp.training.objectives import create_objective
from featsharp.training.objectives.reconstruction import ReconstructionConfig, ReconstructionObjective
from featsharp.training.optim import OptimConfig
from featsharp.training.trainer import Trainer
from featsharp.upsamplers import GuidedUpsampler

LOW_RES = (32, 48)


def encoder_of(upsampler: str = "lift", factor: int = 2, backbone: str = "toy-vit") -> SharpEncoder:
    encoder = create_encoder(backbone, upsampler, factor, normalizer="phi-s")
    statistics = FeatureStatistics(encoder.embed_dim)
    statistics.update(encoder.backbone(torch.randn(8, 3, 64, 64)).features)
    encoder.normalizer.fit(statistics)
    return encoder.train()


def some_views(factor: int = 2, batch: int = 2) -> Views:
    """Smooth pictures of ``factor`` times LOW_RES, with the margin of a canvas around them."""
    height, width = (factor * n + 2 * round(factor * n / 8) for n in LOW_RES)
    canvas = F.interpolate(torch.rand(batch, 3, 12, 18), (height, width), mode="bilinear")
    return Views(canvas, torch.ones(batch, 1, height, width), torch.eye(3).expand(batch, 1, 3, 3))


def base_of(views: Views, factor: int = 2) -> Tensor:
    (top, left) = (round(factor * n / 8) for n in LOW_RES)
    return views.canvas[..., top : top + factor * LOW_RES[0], left : left + factor * LOW_RES[1]]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return 1 - ((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).mean()


DISTANCES = {"cosine": cosine, "l1": lambda a, b: (a - b).abs().mean(), "mse": lambda a, b: ((a - b) ** 2).mean()}


def naive_loss(encoder: SharpEncoder, views: Views, factor: int, settings: ReconstructionConfig) -> list[Tensor]:
    """The terms of the formula in one graph, in which nothing is shared."""

    def smaller(image: Tensor, times: int) -> Tensor:
        if settings.subsample == "slice":
            return image[..., ::times, ::times]
        size = (image.shape[-2] // times, image.shape[-1] // times)
        return F.interpolate(image, size, mode="bilinear", antialias=True)

    mean, std = (torch.tensor(value)[:, None, None] for value in (encoder.backbone.mean, encoder.backbone.std))
    full = (base_of(views, factor) - mean) / std

    def phi(image: Tensor) -> Tensor:
        return encoder.normalizer(encoder.backbone(image).features)

    def term(large: Tensor, small: Tensor) -> Tensor:
        assert isinstance(encoder.upsampler, GuidedUpsampler)
        return DISTANCES[settings.distance](encoder.upsampler.upsample(phi(small), small), phi(large))

    terms = [term(full, smaller(full, factor))]
    if factor == 2:
        terms.append(term(smaller(full, 2), smaller(full, 4)))
        if settings.terms == "all":
            upsampled = encoder.upsampler.upsample(phi(smaller(full, 4)), smaller(full, 4), size_of(phi(full)))
            terms.append(DISTANCES[settings.distance](upsampled, phi(full)))
    return terms


@pytest.mark.parametrize(
    ("upsampler", "factor", "distance", "subsample", "terms"),
    [("lift", 2, "cosine", "antialias", "next"), ("lift", 2, "mse", "slice", "next"),
     ("featup", 3, "l1", "antialias", "next"), ("jafar", 2, "cosine", "slice", "next"),
     ("naf", 2, "mse", "antialias", "next"), ("uplift", 2, "mse", "antialias", "all")],
)  # fmt: skip
def test_gradients_equal_those_of_the_formula(upsampler, factor, distance, subsample, terms):
    """The grid is 4 x 6, so that a second term exists for factor 2 and not for 3."""
    settings = ReconstructionConfig(distance=distance, subsample=subsample, terms=terms)
    encoder = encoder_of(upsampler, factor)
    naive = copy.deepcopy(encoder)
    views = some_views(factor)
    losses = create_objective(encoder, settings).backward(encoder, views, LOW_RES)
    terms = naive_loss(naive, views, factor, settings)
    sum(terms).backward()
    torch.testing.assert_close(losses.total, sum(terms).detach())
    torch.testing.assert_close(losses.reconstruction, terms[0].detach())
    torch.testing.assert_close(list(losses.terms.values()), [term.detach() for term in terms[1:]])
    assert list(losses.terms) == ["small", "twice"][: len(terms) - 1]
    for (name, found), expected in zip(encoder.named_parameters(), naive.parameters(), strict=True):
        if name.startswith("backbone."):
            assert found.grad is None
        else:
            scale = expected.grad.abs().max()
            assert (found.grad - expected.grad).abs().max() <= 1e-4 * scale + 1e-7, name


@pytest.mark.parametrize(
    ("factor", "low_res", "sizes"),
    [
        (2, (64, 64), [(128, 128), (64, 64), (32, 32)]),
        (4, (64, 96), [(256, 384), (64, 96), (16, 24)]),
        (8, (64, 64), [(512, 512), (64, 64)]),  # a grid of one cell is no map
        (2, (24, 32), [(48, 64), (24, 32)]),  # 3 cells have no half
    ],
)
def test_images_have_sizes_that_the_backbone_takes(factor, low_res, sizes):
    encoder = encoder_of("featup", factor)
    objective = create_objective(encoder, ReconstructionConfig())
    assert objective.view_size(encoder) == (64 * factor, 64 * factor)
    images = objective.pyramid(encoder, some_views(factor), low_res)
    assert [image.shape[2:] for image in images] == sizes
    for image in images:
        encoder.backbone.check_size(image)


def test_several_doublings_at_once_need_maps_of_any_size():
    with pytest.raises(
        ConfigError, match=r"terms=all needs .* any size; LiFT has one factor, use objective.terms=next"
    ):
        create_objective(encoder_of("lift"), ReconstructionConfig(terms="all")).check(encoder_of("lift"))
    with pytest.raises(ConfigError, match="unknown terms 'every'"):
        create_objective(encoder_of("lift"), ReconstructionConfig(terms="every"))


def test_running_statistics_are_those_of_the_native_grid():
    encoder = encoder_of("lift")
    alone = copy.deepcopy(encoder)
    views = some_views()
    objective = create_objective(encoder, ReconstructionConfig())
    objective.backward(encoder, views, LOW_RES)
    image = objective.pyramid(alone, views, LOW_RES)[1]
    alone.upsampler.upsample(alone.encode(image).features, image)
    for (name, found), expected in zip(encoder.upsampler.named_buffers(), alone.upsampler.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(found, expected)
            assert found.std() > 0
    momenta = {m.momentum for m in encoder.upsampler.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert momenta == {0.1}


def test_upsampler_in_autocast_and_losses_in_float32():
    encoder = encoder_of("lift")
    exact = create_objective(encoder, ReconstructionConfig()).backward(encoder, some_views(), LOW_RES)
    rounded = create_objective(encoder, ReconstructionConfig()).backward(encoder, some_views(), LOW_RES, torch.bfloat16)
    assert rounded.total.dtype == torch.float32
    assert exact.total.item() != rounded.total.item()
    assert all(p.grad.isfinite().all() for p in encoder.upsampler.parameters())


def test_loss_that_is_not_finite_is_refused():
    encoder = encoder_of("lift")
    torch.nn.init.constant_(encoder.upsampler.doubling.project.bias, float("nan"))
    with pytest.raises(InputError, match="training loss is nan"):
        create_objective(encoder, ReconstructionConfig()).backward(encoder, some_views(), LOW_RES)


@pytest.mark.parametrize(
    ("backbone", "upsampler", "factor", "said"),
    [
        ("toy-vit-fixed", "lift", 2, "toy-vit-fixed' takes 64x64 only; use objective=multi-view"),
        ("toy-vit", "featsharp", 2, "FeatSharp encodes the image again; train it with objective=multi-view"),
        ("toy-vit", "bilinear", 2, "nothing to train: Bilinear has no parameters"),
        ("toy-vit", "jafar", 1.5, "got factor 1.5, use 2"),
        ("toy-vit", "featup", 1, "got factor 1, use 2"),
    ],
)
def test_encoders_that_it_cannot_train(backbone, upsampler, factor, said):
    encoder = create_encoder(backbone, upsampler, factor)
    with pytest.raises(ConfigError, match=said):
        create_objective(encoder, ReconstructionConfig())


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="bias_buffer=false"):
        create_objective(create_encoder("toy-vit", "lift", 2, bias_buffer=True), ReconstructionConfig())
    with pytest.raises(ConfigError, match="unknown distance 'cosin'; did you mean 'cosine'"):
        ReconstructionObjective(8, 2, ReconstructionConfig(distance="cosin"))
    with pytest.raises(ConfigError, match="unknown subsample 'nearest'"):
        ReconstructionObjective(8, 2, ReconstructionConfig(subsample="nearest"))


# What it teaches


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of flat regions with a little noise: folders "seen" and "new"."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:160, :160][..., None]
    for number in range(48):
        centres, colours = rng.uniform(0, 160, (24, 2)), rng.integers(0, 256, (24, 3))
        nearest = ((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2).argmin(-1)
        pixels = (colours[nearest] + rng.integers(-6, 7, (160, 160, 3))).clip(0, 255)
        place = folder / ("new" if number < 8 else "seen")
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:02}.png")
    return folder


@pytest.mark.slow
def test_lift_learns_to_beat_bilinear_in_its_own_loss(photos, tmp_path):
    """X11: seconds of training on a CPU, scored on pictures that it did not see, in eval mode."""
    torch.manual_seed(0)
    encoder = encoder_of("lift", backbone="toy-cnn")
    objective = create_objective(encoder, ReconstructionConfig())
    seen, new = (
        ViewDataset(ImageMixture.from_data_dir(str(photos / name)), objective.view_size(encoder), ViewConfig(), seed=0)
        for name in ("seen", "new")
    )
    trainer = Trainer(
        encoder,
        objective,
        seen,
        RunConfig(
            num_training_steps=150,
            batch_size=6,
            num_workers=0,
            log_frequency=0,
            progress=False,
            upsampler=UpsamplerConfig(dtype="float32"),
            optim=OptimConfig(learning_rate=6e-3, warmup_steps=10),
        ),
        tmp_path,
        World(0, 1, torch.device("cpu")),
    )
    (probe,) = load_batches(new, StepSampler(0, 1, 16), 0)

    @torch.no_grad()
    def scores() -> tuple[float, float]:
        encoder.eval()
        full, small = objective.pyramid(encoder, probe.samples, (64, 64))[:2]
        target, features = encoder.encode(full).features, encoder.encode(small).features
        bilinear = F.interpolate(features, target.shape[2:], mode="bilinear", align_corners=False)
        return cosine(encoder.upsampler.upsample(features, small), target).item(), cosine(bilinear, target).item()

    before, bilinear = scores()
    trainer.run()
    after, _ = scores()
    assert before > bilinear
    assert after < 0.9 * bilinear
