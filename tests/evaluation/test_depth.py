"""Depth probes: scores by hand, and a twin of a room whose colours say, or do not say, how far everything is."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.evaluation.depth import DepthTask, depth_scores, fit_scale, log_error, to_depth
from featsharp.evaluation.runner import Subject, evaluate

SIZE = (36, 48)


class Grey(Backbone):
    """Features that are the grey level of a pixel, or have nothing to do with the picture."""

    def __init__(self, *, random: bool = False) -> None:
        super().__init__("grey", patch_size=1, embed_dim=3, input_size=SIZE, mean=(0, 0, 0), std=(1, 1, 1))
        self.generator = torch.Generator().manual_seed(0) if random else None
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        if self.generator is not None:
            images = torch.randn(images.shape, generator=self.generator)
        return BackboneOutput(images, None)


def write_room(root: Path, frames: int = 20) -> Path:
    """Halves at one and two metres, in another order in each frame; white is near. A stripe has no depth."""
    rng = np.random.default_rng(0)
    (root / "camera-intrinsics.txt").write_text("50 0 24\n0 50 18\n0 0 1\n")
    for number in range(frames):
        near = np.repeat(rng.permutation(6) < 3, 8)[None] & np.ones(SIZE, dtype=bool)
        Image.fromarray(np.where(near, 230, 40).astype(np.uint8)).convert("RGB").save(root / f"{number:03d}.color.png")
        depth = np.where(near, 1000, 2000).astype(np.uint16)
        depth[:3] = 0
        Image.fromarray(depth).save(root / f"{number:03d}.depth.png")
    return root


def measure(root: Path, backbone: Backbone, **settings: object) -> dict:
    # Bins begin at the mean of all depths, 5 metres.
    rate = 0.5 if settings["head"] == "bins" else 0.05
    task = DepthTask(root, steps=60, batch=2, learning_rate=rate, low_res_size=(9, 12), **settings)  # type: ignore[arg-type]
    subject = Subject("x", lambda: create_encoder(backbone, "native-highres", 2))
    return evaluate(task, [subject], progress=False)["x"]


@pytest.mark.parametrize("head", ["linear", "bins"])
def test_features_that_say_the_depth_are_read(tmp_path, head):
    outcome = measure(write_room(tmp_path), Grey(), head=head)
    assert (len(outcome["items"]), outcome["result"]["train_images"]) == (5, 13)
    values = {name: value["value"] for name, value in outcome["result"].items() if isinstance(value, dict)}
    # All but the pixels between two cells.
    assert min(values["d1"], values["free_d1"]) > 0.9
    assert values["rmse"] < 0.25
    assert values["free_rmse"] <= values["rmse"]


@pytest.mark.parametrize("head", ["linear", "bins"])
def test_random_features_leave_the_best_constant(tmp_path, head):
    """The logarithms' mean, the root of 2: off by 0.41 of a metre where it is near, by 0.29 of two where it is far."""
    result = measure(write_room(tmp_path), Grey(random=True), head=head)["result"]
    assert result["abs_rel"]["value"] == pytest.approx((0.4142 + 0.2929) / 2, abs=0.03)
    assert result["d1"]["value"] < 0.1
    assert result["d3"]["value"] > 0.95
    # What fits best is the mean, 1.5 metres: half a metre off.
    assert result["free_rmse"]["value"] == pytest.approx(0.5, abs=0.02)


def test_the_median_of_the_training_pictures_stands_beside(tmp_path):
    """As many pixels are near as far: 1.5 metres."""
    result = measure(write_room(tmp_path), Grey(), head="linear")["result"]
    assert result["constant"] == 1.5
    found = {name: value["value"] for name, value in result.items() if name.startswith("constant_")}
    assert found["constant_rmse"] == pytest.approx(0.5)
    assert found["constant_abs_rel"] == pytest.approx((0.5 / 1 + 0.5 / 2) / 2)
    assert [found[f"constant_d{power}"] for power in (1, 2, 3)] == [0, 1, 1]
    assert found["constant_free_rmse"] == pytest.approx(0.5)


def test_scores_by_hand():
    scores = depth_scores(np.array([1.0, 2.0, 3.0, 8.0]), np.array([1.0, 2.5, 2.0, 4.0]))
    assert scores["rmse"] == pytest.approx(math.sqrt((0 + 0.25 + 1 + 16) / 4))
    assert scores["abs_rel"] == pytest.approx((0 + 0.2 + 0.5 + 1) / 4)
    # Factors 1, 1.25, 1.5 and 2, against 1.25, 1.5625 and 1.953: less, not as much.
    assert [scores[name] for name in ("d1", "d2", "d3")] == [0.25, 0.75, 0.75]


def test_scale_and_shift_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    predicted, truth = rng.random(50), rng.random(50)
    solution = np.linalg.lstsq(np.stack([predicted, np.ones(50)], 1), truth, rcond=None)[0]
    assert fit_scale(predicted, truth) == pytest.approx(predicted * solution[0] + solution[1])
    assert fit_scale(3 * truth - 1, truth) == pytest.approx(truth)
    assert fit_scale(np.ones(50), truth) == pytest.approx(np.full(50, truth.mean()))


def test_bins_and_the_error():
    output = torch.full((1, 3, 1, 1), -100.0)
    output[0, 1] = 100  # softplus of the others is nothing beside it
    assert to_depth(output, 10).item() == pytest.approx((0.001 + 10) / 2)
    assert to_depth(torch.zeros(1, 4, 1, 1), 10).item() == pytest.approx((0.001 + 10) / 2)
    assert to_depth(torch.full((1, 1, 1, 1), math.log(3)), 10).item() == pytest.approx(3)
    depth, truth = torch.tensor([1.0, 2, 4]).view(1, 1, 1, 3), torch.tensor([[[1.0, 1, 0]]])
    g = torch.tensor([0, math.log(2)])
    assert log_error(depth, truth).item() == pytest.approx(math.sqrt(g.var(correction=0) + 0.15 * g.mean() ** 2))
    one = log_error(depth[..., :1], truth[..., :1] * 2)  # a single known pixel has no spread
    assert one.item() == pytest.approx(math.sqrt(0.15) * math.log(2))


def test_pictures_without_depth_are_counted(tmp_path):
    write_room(tmp_path)
    (tmp_path / "001.depth.png").unlink()
    Image.fromarray(np.zeros(SIZE, np.uint16)).save(tmp_path / "018.depth.png")
    (tmp_path / "019.color.png").write_bytes(b"junk")
    outcome = measure(tmp_path, Grey(), head="linear")
    skipped = dict(outcome["skipped"])
    assert skipped["018.color.png"] == "no pixel has a depth of 0.001 to 10 metres"
    assert "not an image" in skipped["019.color.png"]
    assert outcome["result"]["train_skipped"][0][0] == "001.color.png"
    assert outcome["result"]["train_images"] == 12


def test_the_command(tmp_path, capsys):
    command = ["eval", "depth", "--data", str(write_room(tmp_path)), "--backbone", "toy-vit", "--steps", "2"]
    assert main([*command, "--upsampler", "bilinear-2x", "--json", str(tmp_path / "r" / "d.json")]) == 0
    *_, header, constant, encoder, note = capsys.readouterr().out.splitlines()
    assert header.split() == ["depth", "rmse", "abs_rel", "d1", "free_rmse", "free_abs_rel", "free_d1"]
    assert constant.split()[:4] == ["constant,", "1.50", "m", "0.500"]
    assert encoder.startswith("bilinear-2x ")
    assert "of one scene" in note
