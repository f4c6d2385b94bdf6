"""The shared protocol: its head against a plain one, known scores on synthetic twins, resuming, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.features import centre_crop
from featsharp.evaluation.layouts.labels import VOID
from featsharp.evaluation.layouts.layout import Sample
from featsharp.evaluation.papers import PAPERS
from featsharp.evaluation.protocol_head import (
    KitSchedule,
    Training,
    enlarge_through,
    moments,
    read_target,
    train_kit_head,
)
from featsharp.evaluation.runner import Subject, evaluate
from featsharp.evaluation.shared_protocol import (
    BINS,
    ProtocolTask,
    can_upsample_classes,
    class_loss,
    depth_loss,
    expected_depth,
    score_depth,
)

COLOURS = np.array([[220, 30, 40], [40, 200, 60], [30, 60, 210]], np.uint8)
SMALL: dict[str, Any] = {"image_size": (32, 48), "epochs": 12}


class PatchColour(Backbone):
    """The mean colour of patches of 8 pixels, or numbers that have nothing to do with the picture."""

    def __init__(self, *, random: bool = False) -> None:
        super().__init__("patch-colour", patch_size=8, embed_dim=3, input_size=(32, 48))
        self.generator = torch.Generator().manual_seed(0) if random else None
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        colours = F.avg_pool2d(images, 8)
        return BackboneOutput(
            colours if self.generator is None else torch.randn(colours.shape, generator=self.generator), None
        )


def subject(name: str = "bilinear-2x", *, random: bool = False) -> Subject:
    encoder = create_encoder(PatchColour(random=random), name)
    return Subject(name, lambda: encoder)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def halves(number: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Four rectangles of whole patches of random classes."""
    rng = np.random.default_rng(number)
    return np.kron(rng.integers(0, 3, (2, 3)), np.ones((size[0] // 2, size[1] // 3), np.uint8)).astype(np.uint8)


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    for number in range(9):
        split, truth = ("train" if number < 6 else "val"), halves(number)
        write(tmp_path / f"camvid/{split}/{number}.png", COLOURS[truth])
        truth[0, 0] = 11  # void
        write(tmp_path / f"camvid/{split}annot/{number}.png", truth)
    return tmp_path / "camvid"


# The head


@pytest.mark.parametrize("sizes", [[(21, 17)], [(8, 10), (21, 17)], [(4, 5)], [(3, 4)]])
def test_moments_are_those_of_the_enlarged_map(sizes):
    maps = 3 * torch.randn(2, 6, 4, 5) + torch.arange(6)[:, None, None] * 10
    mean, variance = moments(maps, sizes)
    large = enlarge_through(maps.double(), sizes)
    torch.testing.assert_close(mean.double(), large.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), large.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)


def random_samples(count: int, size: tuple[int, int]) -> tuple[list[Sample], dict[str, Tensor]]:
    rng = np.random.default_rng(0)
    targets = [rng.integers(-1, 3, size).astype(np.int16) for _ in range(count)]
    samples = [Sample(str(n), n, lambda: Image.new("RGB", (1, 1)), lambda n=n: targets[n]) for n in range(count)]
    return samples, {str(n): 2 + torch.randn(5, 4, 6) for n in range(count)}


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_head_is_trained_as_on_features_of_the_size_of_the_labels(batch_norm, tmp_path):
    samples, maps = random_samples(5, (13, 19))
    training = Training(samples, lambda s: maps[s.name], [(7, 9), (13, 19)], 3, class_loss, ["x"])
    schedule = KitSchedule(epochs=3, learning_rate=0.05, batch_norm=batch_norm)
    head = train_kit_head(training, schedule, torch.device("cpu"), tmp_path)

    norm: nn.Module = nn.BatchNorm2d(5, affine=False) if batch_norm else nn.Identity()
    torch.manual_seed(0)
    plain = nn.Sequential(norm, nn.Conv2d(5, 3, 1)).double().train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=1e-5)
    large = {name: enlarge_through(x[None].double(), [(7, 9), (13, 19)])[0] for name, x in maps.items()}
    for epoch in range(3):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(epoch)).tolist()
        for batch in (order[:2], order[2:4], order[4:]):
            logits = plain(torch.stack([large[str(n)] for n in batch]))
            truth = torch.stack([torch.from_numpy(samples[n].read_target()) for n in batch]).long()
            loss = F.cross_entropy(logits, truth, ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    plain.eval()
    expected = plain(large["0"][None]).float()
    torch.testing.assert_close(head(maps["0"][None]), expected, rtol=1e-3, atol=1e-3)


def test_training_goes_on_from_the_last_round_and_gives_the_same_head(tmp_path):
    samples, maps = random_samples(5, (8, 12))
    calls = []

    def features(sample: Sample) -> Tensor:
        calls.append(sample.name)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return maps[sample.name]

    def train(folder: str, epochs: int) -> Tensor:
        calls.clear()
        data = Training(samples, features, [(8, 12)], 3, class_loss, [])
        head = train_kit_head(data, KitSchedule(epochs, learning_rate=0.1), torch.device("cpu"), tmp_path / folder)
        return head.probe.classify.weight

    stop = 0
    expected = train("whole", 4)
    stop = 5 + 1 + 5 * 2 + 2
    with pytest.raises(KeyboardInterrupt):
        train("killed", 4)
    assert [path.name.rsplit("-")[1] for path in (tmp_path / "killed").iterdir()] == ["2.safetensors"]
    stop = 0
    assert torch.equal(train("killed", 4), expected)
    assert len(calls) == 5 * 2
    train("killed", 4)
    assert not calls
    # A damaged file is as none, and a head of fewer rounds is where one of more starts.
    next((tmp_path / "killed").iterdir()).write_bytes(b"x")
    assert torch.equal(train("killed", 4), expected)
    train("longer", 2)
    assert torch.equal(train("longer", 4), expected)


def test_targets_are_those_of_the_centre_of_the_picture():
    truth = np.arange(7 * 12, dtype=np.uint8).reshape(7, 12)
    sample = Sample("x", 0, lambda: Image.new("RGB", (1, 1)), lambda: truth)
    assert read_target(sample, (7, 7)).tolist() == truth[:, 2:9].tolist()
    enlarged = Image.fromarray(np.repeat(np.repeat(truth, 4, 0), 4, 1))  # blocks, whose bicubic centres are unchanged
    crop = np.asarray(centre_crop(enlarged, (28, 28)))
    assert read_target(sample, (28, 28)).tolist() == crop.tolist()


# Segmentation


def test_features_that_show_the_classes_score_full_marks_and_random_ones_chance(camvid):
    names = ("bilinear-2x", "tile-2x", "identity")
    result = evaluate(ProtocolTask("camvid", camvid, **SMALL | {"epochs": 60}), [subject(n) for n in names], progress=False)
    for name in names:
        scores = result[name]["result"]
        assert scores["pixel_accuracy"]["value"] > 0.8, name
        assert scores["pixel_accuracy_probabilities"]["value"] > 0.8, name
        assert scores["train_images"] == 6
    # A head that knows nothing says the more frequent class.
    lost = evaluate(ProtocolTask("camvid", camvid, **SMALL), [subject(random=True)], progress=False)
    assert lost["bilinear-2x"]["result"]["miou"]["value"] < 0.3
