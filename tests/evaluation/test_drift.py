"""Drift of upsamplers whose drift is known, and of LiFT; and the command that prints it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.builder import create_encoder, save_checkpoint
from featsharp.cli.main import main
from featsharp.errors import ConfigError
from featsharp.evaluation.drift import DriftTask, compute_drift
from featsharp.evaluation.runner import Subject, evaluate
from featsharp.upsamplers import GuidedUpsampler


class Known(GuidedUpsampler):
    """Repeats every cell, times ``gain``, plus ``offset`` in all channels."""

    factors = "whole"

    def __init__(self, gain: float = 1.0, offset: float = 0.0, factor: float = 2) -> None:
        super().__init__(32, factor)
        self.gain, self.offset = gain, offset

    def upsample_to(self, features, image, size):
        repeated = features.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)
        return self.gain * repeated + self.offset


def picture(seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


@pytest.fixture
def drift_of(tmp_path: Path) -> Callable[..., dict[str, float]]:
    for seed in range(2):
        picture(seed).save(tmp_path / f"{seed}.png")

    def measure(upsampler: object, iterations: int = 2, factor: float | None = None) -> dict[str, float]:
        encoder = create_encoder("toy-vit", upsampler, factor)  # type: ignore[arg-type]
        task = DriftTask(data=tmp_path, iterations=iterations)
        result = evaluate(task, [Subject("x", lambda: encoder)], progress=False)["x"]["result"]
        return {name: estimate["value"] for name, estimate in result.items()}

    return measure


def test_against_a_loop_over_cells():
    low, high = torch.randn(1, 5, 2, 3, dtype=torch.float64), torch.randn(1, 5, 6, 9, dtype=torch.float64)
    cosines, squares, pooled_squares = [], 0.0, 0.0
    for y in range(2):
        for x in range(3):
            cell = high[0, :, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3].mean((1, 2))
            cosines.append((cell @ low[0, :, y, x] / (cell.norm() * low[0, :, y, x].norm())).item())
            squares += low[0, :, y, x].square().sum().item()
            pooled_squares += cell.square().sum().item()
    first, last = (x[0].flatten(1).T.numpy() for x in (low, high))
    spread = np.sqrt(first.var(0).sum())
    expected = (
        np.mean(cosines),
        np.sqrt(pooled_squares / squares),
        np.linalg.norm(last.mean(0) - first.mean(0)) / spread,
        np.sqrt(last.var(0).sum()) / spread,
    )
    assert compute_drift(low, high) == pytest.approx(expected, rel=1e-5)


def test_an_upsampler_that_keeps_features_does_not_drift(drift_of):
    outcome = drift_of(Known(), iterations=3)
    assert list(outcome)[:5] == ["cosine_0", "norm_0", "mean_0", "std_0", "cosine_1"]
    assert len(outcome) == 16
    for name, value in outcome.items():
        assert value == pytest.approx(0 if name.startswith("mean") else 1, abs=1e-5), name


def test_scale_and_offset_show_where_they_belong(drift_of):
    scaled = drift_of(Known(gain=1.5, factor=3))
    assert [scaled[f"{name}_2"] for name in ("cosine", "norm", "std")] == pytest.approx([1, 2.25, 2.25], rel=1e-5)
    moved = drift_of(Known(offset=2.0))
    assert moved["std_2"] == pytest.approx(1, rel=1e-5)
    assert moved["mean_2"] == pytest.approx(2 * moved["mean_1"], rel=1e-4)
    assert moved["cosine_2"] < moved["cosine_1"] < 0.95


def test_untrained_lift_drifts_and_bilinear_hardly_does(drift_of):
    lift, bilinear = drift_of("lift", 1, factor=2), drift_of("bilinear", 1, factor=2)
    assert lift["cosine_1"] < 0.5
    assert bilinear["cosine_1"] > 0.97
    assert bilinear["std_1"] < 1  # interpolation smooths


def test_what_has_no_drift(drift_of):
    with pytest.raises(ConfigError, match="Tile encodes the image"):
        drift_of("tile", factor=2)
    for name, factor in (("bilinear", 1.5), ("identity", 1)):
        with pytest.raises(ConfigError, match=f"whole factor of at least 2; got .* of factor {factor}"):
            drift_of(name, factor=factor)
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        drift_of("bilinear", 0, 2)
    with pytest.raises(ConfigError, match=r"12 iterations of a 2.*x upsampler make a map"):
        drift_of("bilinear", 12, 2)


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "photos").mkdir()
    picture().save(tmp_path / "photos" / "a.png")
    save_checkpoint(create_encoder("toy-cnn", "lift", 2), tmp_path / "lift.pth")
    command = ["eval", "drift", "--checkpoint", tmp_path / "lift.pth", "--data", tmp_path / "photos"]
    assert main([*map(str, command), "--iterations", "2", "--json", str(tmp_path / "r.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    names = [f"{quantity}_{k}" for k in range(3) for quantity in ("cosine", "norm", "mean", "std")]
    assert [line.split()[0] for line in table[1:]] == names
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["task"] == "drift"
    assert list(content["encoders"]["lift"]["result"]) == names
    with pytest.raises(SystemExit):
        main([*map(str, command), "--iterations", "0"])
    assert "'0' is no count; give a whole number of at least 1" in capsys.readouterr().err
