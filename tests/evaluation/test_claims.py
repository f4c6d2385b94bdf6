"""What the method claims, on problems whose answer is known. Every training is the real one, shortened to seconds.

The backbone of most tests says two things about a patch: its mean colour, which depends on the picture alone, and a
fixed pattern by position, which has nothing to do with the picture.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.data.images import image_to_tensor
from featsharp.data.loader import ViewDataset
from featsharp.data.mixture import ImageMixture
from featsharp.data.views import ViewConfig
from featsharp.evaluation.boundaries import Matcher, f_measure, thin_edges
from featsharp.evaluation.fidelity import FidelityMeter
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics
from featsharp.training.config import RunConfig, UpsamplerConfig
from featsharp.training.distributed import World
from featsharp.training.objectives.multi_view import MultiViewConfig, MultiViewObjective
from featsharp.training.optim import OptimConfig
from featsharp.training.trainer import Trainer

VIEWS = ViewConfig(num_views=2, jitter_zoom=[0.9, 1.6], rotation=8.0, shift=0.15)
LOW_RES, SIZE = (64, 64), (128, 128)


class Planted(Backbone):
    """The mean colour of each patch, mixed to 16 channels, plus ``noise`` times a pattern by position."""

    def __init__(self, noise: float) -> None:
        super().__init__(f"planted-{noise}", patch_size=8, embed_dim=16, input_size=LOW_RES, flexible=False)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("mix", torch.randn(16, 3, 1, 1, generator=generator))
        pattern = torch.randn(1, 16, 8, 8, generator=generator)
        self.register_buffer("pattern", noise * (pattern - pattern.mean((2, 3), keepdim=True)))
        self.freeze()

    def signal(self, images: Tensor) -> Tensor:
        """What depends on the picture: at twice the native size the truth at 2x."""
        return F.conv2d(F.avg_pool2d(images, 8), self.mix)

    def extract(self, images: Tensor) -> BackboneOutput:
        return BackboneOutput(self.signal(images) + self.pattern, None)


class Pair(NamedTuple):
    """An encoder before and after its training."""

    start: SharpEncoder
    trained: SharpEncoder


def regions(seed: int, side: int = 160) -> tuple[Image.Image, np.ndarray]:
    """A picture of five flat regions, and the lines between them [side, side] bool."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side][..., None]
    centres, colours = rng.uniform(0, side, (5, 2)), rng.integers(0, 256, (5, 3))
    nearest = ((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2).argmin(-1)
    lines = np.zeros((side, side), dtype=bool)
    lines[:-1] |= nearest[:-1] != nearest[1:]
    lines[:, :-1] |= nearest[:, :-1] != nearest[:, 1:]
    return Image.fromarray(colours[nearest].astype(np.uint8)), lines


def held_out(count: int = 8, side: int = 160) -> list[tuple[Image.Image, np.ndarray]]:
    return [regions(1000 + seed, side) for seed in range(count)]


def pixels_of(encoder: SharpEncoder) -> Tensor:
    """Held-out pictures, whitened, at twice the native size."""
    pictures = [image_to_tensor(picture) for picture, _ in held_out(side=SIZE[0])]
    return encoder.input_conditioner(torch.stack(pictures))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Trains an upsampler and a bias buffer on a dozen pictures of flat regions."""
    folder = tmp_path_factory.mktemp("photos")
    pictures = [regions(seed)[0] for seed in range(12)]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")

    def run(backbone: Backbone, upsampler: str, *, steps: int, rate: float) -> Pair:
        torch.manual_seed(0)
        encoder = create_encoder(backbone, upsampler, 2, normalizer="phi-s", bias_buffer=True)
        crops = [image_to_tensor(picture)[:, a : a + 64, a : a + 64] for picture in pictures for a in (0, 48, 96)]
        statistics = FeatureStatistics(encoder.embed_dim)
        statistics.update(backbone(encoder.input_conditioner(torch.stack(crops))).features)
        encoder.normalizer.fit(statistics)
        start = copy.deepcopy(encoder)
        config = RunConfig(
            num_training_steps=steps,
            batch_size=2,
            num_workers=0,
            progress=False,
            upsampler=UpsamplerConfig(dtype="float32"),
            optim=OptimConfig(learning_rate=rate, jbu_learning_rate=rate, warmup_steps=5),
        )
        Trainer(
            encoder,
            MultiViewObjective(encoder.embed_dim, 2, MultiViewConfig()),
            ViewDataset(ImageMixture.from_data_dir(str(folder)), SIZE, VIEWS, seed=0),
            config,
            tmp_path_factory.mktemp("run"),
            World(0, 1, torch.device("cpu")),
        ).run()
        return Pair(start.eval(), encoder.eval())

    return run


@pytest.fixture(scope="module")
def planted(train: Callable[..., Pair]) -> Pair:
    return train(Planted(0.7), "featsharp", steps=80, rate=2e-2)


@pytest.fixture(scope="module")
def toys(train: Callable[..., Pair]) -> dict[str, Pair]:
    """On toy-vit, whose tokens see the whole picture: the fusion, and its two inputs by themselves."""
    names = ("featsharp", "tile", "featup")
    return {name: train(create_backbone("toy-vit"), name, steps=60, rate=1e-2) for name in names}


def sharp(encoder: SharpEncoder, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return encoder(images, denormalize=True, low_res_size=LOW_RES).high_res


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def fidelity(encoder: SharpEncoder) -> float:
    meter = FidelityMeter(encoder)
    for picture, _ in held_out():
        meter.add(picture)
    return meter.result()["area"].value


# F2


@pytest.mark.slow
def test_noise_by_position_is_attenuated_to_a_quarter_and_the_signal_kept_within_a_tenth(planted):
    """F2: the pattern is the difference between the backbone with and without it, everything else unchanged."""
    quiet = copy.deepcopy(planted.trained)
    quiet.backbone.pattern.zero_()
    quiet.bias_buffer = None
    images = pixels_of(quiet)
    pattern = rms(planted.trained.backbone.pattern)
    assert pattern > 0.6
    left = rms(sharp(planted.trained, images) - sharp(quiet, images))
    assert left < 0.25 * pattern
    assert rms(sharp(planted.start, images) - sharp(quiet, images)) > 2 * left

    # What differs between pictures at one place has nothing of the pattern in it.
    outcome, truth = sharp(planted.trained, images), quiet.backbone.signal(images)
    outcome, truth = outcome - outcome.mean(0), truth - truth.mean(0)
    assert torch.corrcoef(torch.stack([outcome.flatten(), truth.flatten()]))[0, 1] > 0.99
    assert 0.9 < rms(outcome) / rms(truth) < 1.1


# F3


@pytest.mark.slow
def test_the_fusion_is_more_faithful_than_tiles_alone_and_jbu_alone(toys):
    """F3: each has the same training and a bias buffer of its own."""
    outcome = {name: fidelity(pair.trained) for name, pair in toys.items()}
    assert outcome["featsharp"] > 1.2 * outcome["tile"]
    assert outcome["featsharp"] > 1.2 * outcome["featup"]
    assert outcome["featsharp"] > 1.1 * fidelity(toys["featsharp"].start)


# X7


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["toy-vit", "planted"])
@pytest.mark.parametrize("stage", ["start", "trained"])
def test_semantics_are_kept(toys, planted, backbone, stage):
    """X7: averaged back to its grid, the sharp map is that of the backbone; so is its mean."""
    encoder = getattr(planted if backbone == "planted" else toys["featsharp"], stage)
    with torch.inference_mode():
        out = encoder(pixels_of(encoder), denormalize=True, low_res_size=LOW_RES)
    cells = F.cosine_similarity(F.avg_pool2d(out.high_res, 2), out.low_res, dim=1)
    whole = F.cosine_similarity(out.high_res.mean((2, 3)), out.low_res.mean((2, 3)), dim=1)
    assert cells.mean() > 0.95
    assert whole.min() > 0.99


# E21


def test_the_cleaner_the_backbone_the_more_faithful_and_the_more_there_is_to_gain():
    """E21: fidelity, and the gain of the untrained FeatSharp over bilinear, are ordered as the planted noise."""
    rows = [
        [fidelity(create_encoder(Planted(noise), name, 2)) for name in ("bilinear", "featsharp")]
        for noise in (0.1, 0.4, 0.8)
    ]
    bilinear, fused = zip(*rows, strict=True)
    gains = [b / a for a, b in rows]
    for values in (bilinear, fused, gains):
        assert all(clean > 1.1 * noisy for clean, noisy in pairwise(values)), values
    assert min(gains) > 1


# E35


@pytest.mark.slow
def test_a_trained_upsampler_is_not_bilinear_and_has_sharper_boundaries(toys):
    """E35: F-measure of its edges against the known lines between regions, within three pixels."""

    def boundary_f(encoder: SharpEncoder) -> float:
        matcher, thresholds = Matcher(SIZE, 3), np.geomspace(0.01, 2, 30).tolist()
        features = sharp(encoder, pixels_of(encoder))
        counts = [
            matcher.count(thin_edges(one, SIZE).numpy(), thresholds, [lines])
            for one, (_, lines) in zip(features, held_out(side=SIZE[0]), strict=True)
        ]
        return float(f_measure(np.sum(counts, axis=0)).max())

    trained, bilinear = toys["featsharp"].trained, create_encoder("toy-vit", "bilinear", 2)
    images = pixels_of(trained)
    a, b = sharp(trained, images), sharp(bilinear, images)
    assert rms(a - b) > 0.2 * rms(b - b.mean((2, 3), keepdim=True))
    assert boundary_f(trained) > 1.4 * boundary_f(bilinear)
    assert boundary_f(trained) > boundary_f(toys["featsharp"].start)
