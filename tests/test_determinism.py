"""The switch ``deterministic`` of a training: what it sets, what it promises, and that it leaves nothing behind."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.checkpoint import read_checkpoint
from featsharp.configs.compose import compose
from featsharp.device import deterministic_algorithms
from featsharp.errors import ConfigError
from featsharp.train import train

SMALL = "+model=toy-vit +upsampler=featsharp-2x train_data_dir=photos num_training_steps=3 batch_size=2 log_frequency=1"
SMALL += " num_workers=0 normalizer.num_samples=4 normalizer.cache=false viz.num_images=1 progress=false"
WRITER = """
import torch
from featsharp.training.loggers import VizWriter

class Setting(VizWriter):
    def __init__(self, folder): self.folder = folder
    def scalar(self, name, value, step):
        (self.folder / "setting").write_text(str(torch.are_deterministic_algorithms_enabled()))
    def image(self, name, image, step): pass
"""


@pytest.fixture
def no_cublas_setting():
    before = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if before is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = before


@pytest.mark.slow
def test_two_equal_runs_give_the_same_bits(tmp_path, monkeypatch, no_cublas_setting):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "setting_writer.py").write_text(WRITER, encoding="utf-8")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 90, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    runs = {"one": "deterministic=true", "two": "deterministic=true", "plain": "", "other": "deterministic=true seed=1"}
    states = {}
    for name, setting in runs.items():
        torch.manual_seed(len(name))  # what ran before has no part in it
        torch.rand(3)
        train(compose([*SMALL.split(), *setting.split(), f"output_base={name}", "viz.type=setting_writer:Setting"]))
        folder = tmp_path / name / "toy-vit" / "64"
        assert (folder / "setting").read_text() == str("deterministic=true" in setting)
        states[name] = read_checkpoint(folder / "last.pth")["model"]
        assert not torch.are_deterministic_algorithms_enabled()
    for key, value in states["one"].items():
        assert torch.equal(value, states["two"][key]), key
        assert torch.equal(value, states["plain"][key]), key  # on a CPU it costs nothing and changes nothing
    assert any(not torch.equal(value, states["other"][key]) for key, value in states["one"].items())


def test_an_operation_without_such_an_algorithm_ends_the_run_by_its_name(no_cublas_setting):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(ConfigError, match="true: put_ does not have a deterministic"), deterministic_algorithms():
            torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(RuntimeError, match="something else"), deterministic_algorithms():
            raise RuntimeError("something else")
    finally:
        torch.use_deterministic_algorithms(False)
