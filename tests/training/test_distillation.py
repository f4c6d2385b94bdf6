"""Distillation: students learn what teachers know, on a grid that fits, resume bit for bit, and are backbones then."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.backbones.student import STUDENT_FILE, Shape, StudentViT, load_student
from featsharp.builder import create_encoder, load_from_file, save_checkpoint
from featsharp.checkpoint import read_checkpoint, write_checkpoint
from featsharp.cli.main import main as command
from featsharp.configs.compose import compose_distillation
from featsharp.data.images import image_to_tensor
from featsharp.distill import distill, main
from featsharp.errors import BackboneMismatchError, CheckpointError, ConfigError, DataError
from featsharp.training.config import NormalizerConfig, VizConfig, flatten
from featsharp.training.distillation import (
    Distillation,
    DistillConfig,
    Student,
    StudentConfig,
    StudentRateConfig,
    Teacher,
    cosine_and_l1,
    open_teachers,
)
from featsharp.training.distributed import World
from featsharp.training.loggers import NullWriter

ALONE = World(0, 1, torch.device("cpu"))
SMALL = StudentConfig(size=64, patch_size=8, width=32, depth=2, num_heads=2)
CONFIGS = Path(compose_distillation.__code__.co_filename).parent


class Stopper(NullWriter):
    """The user who interrupts a run in its fourth step."""

    def __init__(self, folder: Path) -> None: ...

    def scalar(self, name: str, value: float, step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two regions each, with some noise."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(6):
        pixels = np.empty((70, 90, 3))
        pixels[:] = rng.integers(0, 256, 3)
        pixels[:, rng.integers(20, 70) :] = rng.integers(0, 256, 3)
        noisy = (pixels + rng.integers(-9, 10, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.png")
    return folder


def config_of(photos: Path, folder: Path, **settings: object) -> DistillConfig:
    defaults = {
        "train_data_dir": str(photos),
        "val_data_dir": str(photos),
        "dist_train_data_dir": str(photos),
        "output_root": str(folder),
        "teachers": ["toy-vit", "toy-cnn"],
        "upsamplers": "bilinear-2x",
        "student": SMALL,
        "num_training_steps": 6,
        "batch_size": 2,
        "num_workers": 0,
        "log_frequency": 1,
        "checkpoint_frequency": 2,
        "progress": False,
        "dtype": "float32",
        "device": "cpu",
        "normalizer": NormalizerConfig(num_samples=4, batch_size=4, cache=False),
        "viz": VizConfig(type="none", num_images=2),
    }
    return DistillConfig(**{**defaults, **settings})  # type: ignore[arg-type]


def crops(photos: Path) -> Tensor:
    return torch.stack([image_to_tensor(Image.open(path).resize((64, 64))) for path in sorted(photos.iterdir())])


def assert_same(found: object, expected: object) -> None:
    """Nested states, equal to the last bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)  # type: ignore[arg-type]
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()  # type: ignore[attr-defined]
        for key in expected:
            assert_same(found[key], expected[key])  # type: ignore[index]
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):  # type: ignore[call-overload]
            assert_same(a, b)
    else:
        assert found == expected


# Learning


def test_both_losses_fall(photos, tmp_path):
    """F17."""
    settings = {"batch_size": 6, "checkpoint_frequency": 0, "optim": StudentRateConfig(learning_rate=5e-3)}
    start = distill(config_of(photos, tmp_path / "start", num_training_steps=0, **settings))
    end = distill(config_of(photos, tmp_path / "end", num_training_steps=40, **settings))
    with torch.no_grad():
        before, after = (trainer.distillation(trainer.student, crops(photos)) for trainer in (start, end))
    assert after.reconstruction < 0.6 * before.reconstruction
    assert after.terms["summary"] < 0.3 * before.terms["summary"]
    assert end.best_score > start.best_score


def test_a_stopped_run_ends_as_one_that_never_stopped(photos, tmp_path):
    whole = distill(config_of(photos, tmp_path / "whole"))
    stopped = config_of(photos, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        distill(dataclasses.replace(stopped, viz=VizConfig(type="test_distillation:Stopper", num_images=2)))
    assert read_step(tmp_path / "stopped") == 2
    resumed = distill(stopped)
    assert resumed.step == whole.step == 6
    contents = [torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("stopped", "whole")]
    for content in contents:
        content["config"]["output_root"] = ""
    assert_same(*contents)


def read_step(folder: Path) -> int:
    return int(torch.load(folder / "last.pth", weights_only=True)["training"]["step"])


def test_cached_teachers_encode_once(photos, tmp_path):
    config = config_of(photos, tmp_path, num_training_steps=4, teachers="toy-vit")
    config.feature_cache.samples, config.feature_cache.folder = 4, str(tmp_path / "features")
    distill(config)
    cached = list((tmp_path / "features").rglob("*.safetensors"))
    assert len(cached) == 4 + 2  # the samples, and the pictures of the validation


# Heads and targets


def open_small(photos: Path, folder: Path, **settings: object) -> tuple[Student, Distillation, list[Teacher]]:
    config = config_of(photos, folder, **settings)
    teachers = open_teachers(config, ALONE)
    return Student(config.student, teachers), Distillation(teachers, config), teachers


def test_each_teacher_has_heads_of_the_shapes_that_it_gives(photos, tmp_path):
    upsamplers = ["s2-2x", "tile-2x", "none"]
    teachers = ["toy-vit", "toy-cnn", "toy-vit"]
    student, _, opened = open_small(photos, tmp_path, teachers=teachers, upsamplers=upsamplers)
    images = crops(photos)[:3]
    predicted = student(images)
    targets = [teacher.encode(images, torch.nn.Identity(), student.grid) for teacher in opened]
    assert [tuple(one.spatial.shape) for one in predicted] == [(3, 64, 8, 8), (3, 32, 8, 8), (3, 32, 8, 8)]
    assert [None if one.summary is None else tuple(one.summary.shape) for one in predicted] == [(3, 32), None, (3, 32)]
    for given, target in zip(predicted, targets, strict=True):
        assert given.spatial.shape == target.spatial.shape
        assert (given.summary is None) == (target.summary is None)
    assert student.trunk.summary_dim == 2 * SMALL.width  # a class token for each summary


def test_without_an_upsampler_the_target_is_the_interpolated_coarse_map(photos, tmp_path):
    _, _, (teacher,) = open_small(photos, tmp_path, teachers="toy-vit", upsamplers="none")
    images = crops(photos)[:2]
    target = teacher.encode(images, lambda maps: 2 * maps, (8, 8))
    backbone = create_backbone("toy-vit")
    whitened = (images - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
    low = backbone(F.interpolate(whitened, (32, 32), mode="bilinear", antialias=True))
    expected = F.interpolate(2 * low.features, (8, 8), mode="bilinear")
    torch.testing.assert_close(target.spatial, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(target.summary, low.summary, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mse", "cosine-l1"])
def test_losses_are_those_of_the_papers(photos, tmp_path, name):
    settings = {"normalizer": NormalizerConfig(name="none"), "spatial_loss": name, "summary_weight": 0.25}
    student, objective, teachers = open_small(photos, tmp_path, **settings)
    images = crops(photos)[:2]
    with torch.no_grad():
        losses = objective(student, images)
        pairs = [
            (given, teacher.encode(images, torch.nn.Identity(), (8, 8)))
            for given, teacher in zip(student(images), teachers, strict=True)
        ]
    spatial = []
    for given, target in pairs:
        x, y = (part.spatial.double().movedim(1, -1).flatten(0, 2).numpy() for part in (given, target))
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        difference = np.abs(x - y)
        smooth = np.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
        spatial.append((difference**2).mean() if name == "mse" else 0.9 * (1 - cosine.mean()) + 0.1 * smooth)
    given, target = pairs[0]  # the other has no summary
    x, y = given.summary.double().numpy(), target.summary.double().numpy()
    summary = 1 - ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean()
    assert losses.reconstruction.item() == pytest.approx(np.mean(spatial), rel=1e-4)
    assert losses.terms["summary"].item() == pytest.approx(summary, rel=1e-4)
    assert losses.total.item() == pytest.approx(np.mean(spatial) + 0.25 * summary, rel=1e-4)


def test_identical_maps_have_no_loss():
    maps = torch.randn(2, 5, 3, 4)
    assert cosine_and_l1(maps, maps).item() == pytest.approx(0, abs=1e-6)


# The student as a backbone


def test_a_checkpoint_is_a_backbone(photos, tmp_path):
    trainer = distill(config_of(photos, tmp_path, num_training_steps=2))
    backbone = create_backbone(f"student:{tmp_path / 'last.pth'}")
    assert not any(p.requires_grad for p in backbone.parameters())
    assert (backbone.patch_size, backbone.embed_dim, backbone.summary_dim) == (8, 32, 32)
    images = torch.randn(2, 3, 64, 64)
    expected = trainer.student.trunk(images)
    found = backbone(images)
    torch.testing.assert_close(found.features, expected.features, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.summary, expected.summary, atol=1e-4, rtol=0)
    out = create_encoder(backbone, "tile", 2)(torch.randn(1, 3, 48, 112))
    assert out.high_res.shape == (1, 32, 6, 14)
    with pytest.raises(CheckpointError, match="is not a featsharp checkpoint"):
        load_from_file(tmp_path / "last.pth")


def test_layers_start_from_different_weights():
    student = StudentViT(Shape(32, 8, 16, 2, 2, 0))
    first, second = (block.linear1.weight for block in student.blocks)
    assert not torch.equal(first, second)
    assert student(torch.randn(1, 3, 32, 40)).summary is None


def test_another_file_is_no_student(tmp_path):
    save_checkpoint(create_encoder("toy-vit", "bilinear", 2), tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match="is not a student; `featsharp distill` writes them"):
        load_student(tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        create_backbone(f"student:{tmp_path / 'none.pth'}")


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"upsamplers": "tile-4x"}, r"enlarges by 4, factor=2 is set, and the student has 8x8 cells\. Take an"),
        ({"factor": 3, "upsamplers": "tile-3x"}, r"enlarges by 3.*and a factor that divides 8"),
        ({"teachers": "toy-vit-fixed"}, r"would have to encode 32x32 pixels.*takes 64x64 only.* / factor is 8"),
        ({"teachers": []}, "which teachers"),
        ({"teachers": "toy-vitt"}, "toy-vit"),
        ({"upsamplers": ["tile-2x"] * 3}, "2 teachers have 3 upsamplers; give one for all, or one for each"),
        ({"upsamplers": "featsharp-2x"}, "featsharp has to be trained"),
        ({"spatial_loss": "l7"}, "cosine-l1"),
        ({"student": StudentConfig(size=60, patch_size=8)}, "no whole number of patches of 8; take a size such as 64"),
        ({"student": StudentConfig(size=64, patch_size=8, width=32)}, "cannot be divided among 3"),
        ({"train_data_dir": None}, "which images"),
    ],
)
def test_what_cannot_be_distilled_is_said_before_anything_is_written(photos, tmp_path, settings, message):
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match=message):
        distill(config_of(photos, folder, **settings))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_command_names_what_is_missing_in_one_line(capsys):
    assert command(["distill", "teachers=toy-vit", "train_data_dir=null"]) == 1
    assert "which images? Set train_data_dir=FOLDER" in capsys.readouterr().err


def test_no_photographs(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        distill(config_of(tmp_path / "empty", tmp_path / "run"))


def test_an_unknown_upsampler(photos, tmp_path):
    with pytest.raises(CheckpointError, match=r"did you mean.*tile"):
        distill(config_of(photos, tmp_path, upsamplers="tyle-2x"))


def test_weights_of_another_backbone(photos, tmp_path):
    save_checkpoint(create_encoder("toy-cnn", "bilinear", 2), tmp_path / "cnn.pth")
    with pytest.raises(BackboneMismatchError, match="toy-cnn"):
        distill(config_of(photos, tmp_path / "run", teachers="toy-vit", upsamplers=str(tmp_path / "cnn.pth")))


def test_other_weights_of_a_teacher_are_no_continuation(photos, tmp_path):
    distill(config_of(photos, tmp_path, num_training_steps=0))
    content = read_checkpoint(tmp_path / "last.pth", STUDENT_FILE)
    content["training"]["teachers"][1] = "another"
    kept = {key: value for key, value in content.items() if key not in ("format", "version")}
    write_checkpoint(tmp_path / "last.pth", kept, STUDENT_FILE)
    with pytest.raises(CheckpointError, match="was taught by other teachers"):
        distill(config_of(photos, tmp_path))


# The command


def test_the_file_of_defaults_says_what_the_schema_says():
    written = flatten(yaml.safe_load((CONFIGS / "distill_config.yaml").read_text(encoding="utf-8")))
    del written["defaults"]
    schema = flatten(dataclasses.asdict(DistillConfig()))
    chosen = {"output_subdir": "distill", "batch_size": 16, "viz.num_images": 16}
    assert written == {name: chosen.get(name, schema[name]) for name in written}
    left_out = {name for name in schema if name not in written}
    groups = {"train_data_dir", "val_data_dir", "dist_train_data_dir", "normalizer.name"}
    assert {name for name in left_out if not name.startswith("views.")} == groups


@pytest.mark.slow
def test_the_command_composes_distils_and_resumes(photos, tmp_path, capsys):
    given = [
        "teachers=[toy-vit,toy-cnn]", "upsamplers=[tile-2x,none]", f"train_data_dir={photos}",
        f"output_base={tmp_path}", "student.size=64", "student.patch_size=8",
        "student.width=32", "student.depth=1", "student.num_heads=2",
        "num_training_steps=2", "batch_size=2", "num_workers=0", "normalizer.num_samples=4", "normalizer.cache=false",
        "viz.type=none", "viz.num_images=1",
    ]  # fmt: skip
    assert compose_distillation(given).upsamplers == ["tile-2x", "none"]
    assert main(given) == 0
    assert main(given) == 0  # it has nothing left to do
    assert (tmp_path / "distill" / "best.pth").is_file()
    assert main([*given, "factor=4"]) == 1
    assert "factor 4 instead of 2" in capsys.readouterr().err
    assert main(["teachers=toy-vit", "upsampler=tile-2x"]) == 1
    assert "did you mean upsamplers" in capsys.readouterr().err
    assert main(["num_training_steps=2"]) == 1
    assert "teachers=NAME or teachers=[NAME,NAME]" in capsys.readouterr().err
