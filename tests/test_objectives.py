"""Choosing an objective: its configuration, and runs with it from the command line."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from featsharp.builder import create_encoder, load_from_file
from featsharp.checkpoint import read_checkpoint
from featsharp.cli.eval import load_downsampler
from featsharp.cli.main import main as featsharp
from featsharp.configs.compose import compose, options_of
from featsharp.errors import ConfigError
from featsharp.train import main
from featsharp.training.loggers import VizWriter
from featsharp.training.objectives import OBJECTIVES, config_type, create_objective
from featsharp.training.objectives.jafar import JAFARConfig
from featsharp.training.objectives.multi_view import MultiViewConfig
from featsharp.training.objectives.reconstruction import ReconstructionConfig

CONFIGS = Path(compose.__code__.co_filename).parent
BASE = ["+model=toy-vit", "+upsampler=featup-2x", "train_data_dir=photos"]
SMALL = [
    "batch_size=2",
    "num_workers=0",
    "num_training_steps=2",
    "normalizer.num_samples=8",
    "normalizer.batch_size=4",
    "viz.num_images=1",
    "viz.type=none",
    "progress=false",
]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(buffer, "PNG")
        (tmp_path / "photos" / f"{number}.png").write_bytes(buffer.getvalue())
    return tmp_path / "photos"


def train(data: Path, *overrides: str, model: str = "toy-vit", upsampler: str, output: str = "outputs") -> int:
    return main(
        [f"+model={model}", f"+upsampler={upsampler}", *SMALL, f"train_data_dir={data}", f"output_base={output}",
         "output_subdir=run", *overrides]
    )  # fmt: skip


# Configuration


def test_every_objective_has_a_file_and_every_file_an_objective():
    assert list(options_of("objective")) == OBJECTIVES.names()


@pytest.mark.parametrize("name", options_of("objective"))
def test_defaults_of_the_files_are_those_of_the_classes(name):
    given = {"regression": {"store": "targets"}, "loftup": {"masks": "masks"}}.get(name, {})
    settings = compose([*BASE, f"objective={name}", *(f"objective.{key}={value}" for key, value in given.items())])
    assert settings.objective == config_type(name)(**given)
    content = yaml.safe_load((CONFIGS / "objective" / f"{name}.yaml").read_text())
    assert content.get("objective", content) | given == dataclasses.asdict(settings.objective)


def test_multi_view_is_the_default_and_learns_the_bias():
    config = compose(BASE)
    assert config.objective == MultiViewConfig()
    assert config.bias_buffer
    changed = compose([*BASE, "objective.downsampler=attention", "objective.border_weight=1"]).objective
    assert changed == MultiViewConfig(downsampler="attention", border_weight=1.0)


def test_others_leave_the_bias_out_unless_told_otherwise():
    config = compose([*BASE, "objective=reconstruction", "objective.distance=l1"])
    assert config.objective == ReconstructionConfig(distance="l1")
    assert not config.bias_buffer
    assert compose([*BASE, "objective=jafar", "bias_buffer=true"]).bias_buffer
    config = compose(["+model=toy-vit", "+upsampler=lift-2x", "train_data_dir=x"])
    assert config.objective == ReconstructionConfig()
    config = compose(["+model=toy-vit", "+upsampler=lift-2x", "objective=multi-view", "train_data_dir=x"])
    assert config.objective == MultiViewConfig()
    assert config.bias_buffer


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective=reconstrution"], "did you mean 'reconstruction'"),
        (
            ["objective=reconstruction", "objective.downsampler=area"],
            "'reconstruction' has no 'downsampler', only name,",
        ),
        (["objective=reconstruction", "+objective.downsampler=area"], "'reconstruction' has no 'downsampler'"),
        (["objective.name=jafar"], "'jafar' has no 'distance'"),
        (["objective.subsample=slice"], "'multi-view' has no 'subsample'"),
        (["objective.distanc=l1"], "did you mean objective.distance"),
        (["objective=jafar", "objective.mse_weight=-1"], "objective.mse_weight must be at least 0"),
        (["objective=jafar", "objective.mse_weight=x"], "objective.mse_weight"),
        (["objective.kernel_size=0"], "objective.kernel_size must be at least 1"),
    ],
)
def test_mistakes_are_named_in_one_line(overrides, said):
    with pytest.raises(ConfigError) as caught:
        compose([*BASE, *overrides])
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_preset_of_another_objective_is_an_error():
    with pytest.raises(ConfigError, match="objective 'reconstruction' has no 'downsampler'"):
        compose(["+model=toy-vit", "+upsampler=featup-published", "objective=reconstruction", "train_data_dir=x"])


# Runs


@pytest.mark.parametrize(
    ("upsampler", "objective", "model"),
    [
        ("lift-2x", "reconstruction", "toy-cnn"),
        pytest.param("lift-4x", "reconstruction", "toy-vit", marks=pytest.mark.slow),
        ("lift-2x", "multi-view", "toy-vit"),
        pytest.param("featup-3x", "reconstruction", "toy-vit", marks=pytest.mark.slow),
        pytest.param("jafar-2x", "jafar", "toy-vit", marks=pytest.mark.slow),
        pytest.param("bilinear-1.5x", "multi-view", "toy-vit", marks=pytest.mark.slow),
    ],
)
def test_runs_train_validate_and_load(photos, upsampler, objective, model):
    assert train(photos, f"objective={objective}", upsampler=upsampler, model=model) == 0
    content = read_checkpoint("outputs/run/best.pth")
    assert content["config"]["objective"]["name"] == objective
    encoder = load_from_file("outputs/run/last.pth")
    out = encoder(torch.randn(1, 3, 64, 96))
    assert out.high_res.shape[2:] == tuple(int(n * encoder.factor) for n in out.low_res.shape[2:])
    assert out.high_res.isfinite().all()
    own = load_downsampler("outputs/run/last.pth", encoder)
    assert (own is not None) == (objective == "multi-view")
    assert featsharp(["eval", "fidelity", "--checkpoint", "outputs/run/last.pth", "--data", str(photos)]) == 0


class Interrupting(VizWriter):
    """Plays the user who interrupts the run in its third step, once."""

    def __init__(self, folder: Path) -> None:
        self.came = folder / "came"

    def scalar(self, name: str, value: float, step: int) -> None:
        if step == 3 and not self.came.exists():
            self.came.touch()
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_by_reconstruction_resumes_bit_for_bit(photos):
    """The running statistics of batch normalisation, too."""

    def run(output: str, viz: str = "none") -> int:
        steps = ("num_training_steps=4", "checkpoint_frequency=2", "log_frequency=1", f"viz.type={viz}")
        return train(photos, *steps, upsampler="lift-2x", model="toy-cnn", output=output)

    assert run("whole") == 0
    assert run("parts", f"{__name__}:Interrupting") == 130
    assert read_checkpoint("parts/run/last.pth")["training"]["step"] == 2
    assert run("parts") == 0
    whole, parts = (read_checkpoint(f"{output}/run/last.pth")["training"]["trained"] for output in ("whole", "parts"))
    assert "upsampler.doubling.fuse.1.running_var" in whole
    for key, value in whole.items():
        assert torch.equal(parts[key], value), key


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective=reconstruction", "bias_buffer=true"], "set bias_buffer=false"),
        (["objective=jafar", "upsampler.name=tile"], "objective=multi-view"),
        (["objective=reconstruction", "model.name=toy-vit-fixed"], "use objective=multi-view"),
        (["objective=reconstruction", "objective.distance=cos"], "'cosine'"),
        (["objective=jafar", "objective.input_scale=[0.5,2]"], "input_scale"),
    ],
)
def test_what_cannot_be_trained_costs_one_line(photos, capsys, overrides, said):
    assert train(photos, *overrides, upsampler="featup-2x") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("featsharp train: ")
    assert said in line
    assert not list(Path().rglob("*.pth"))


def test_checkpoints_older_than_the_choice_go_on(photos):
    """A configuration without objective.name was multi-view's."""
    assert train(photos, upsampler="featup-2x") == 0
    path = Path("outputs/run/last.pth")
    content = torch.load(path, weights_only=True)
    del content["config"]["objective"]["name"]
    torch.save(content, path)
    assert train(photos, "num_training_steps=3", upsampler="featup-2x") == 0
    assert read_checkpoint(path)["training"]["step"] == 3


def test_another_objective_does_not_resume(photos, capsys):
    assert train(photos, upsampler="featup-2x") == 0
    capsys.readouterr()
    assert train(photos, "objective=reconstruction", upsampler="featup-2x") == 1
    assert "objective.name 'reconstruction' instead of 'multi-view'" in capsys.readouterr().err


def test_objectives_are_built_on_the_device_of_the_encoder():
    for settings in (MultiViewConfig(uncertainty=True), ReconstructionConfig(), JAFARConfig()):
        encoder = create_encoder("toy-vit", "jafar", 2)
        objective = create_objective(encoder, settings)
        assert {p.device for p in objective.parameters()} <= {encoder.device}
        assert (objective.downsampler is None) == (objective.uncertainty is None)
